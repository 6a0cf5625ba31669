"""Holds answers back until the memory that their queries left is on disk.

A thread waits for the disk, so the handler and the event loop continue. One flush serves all
answers that came during the flush before it. A plain handler's thread itself flushes at the end of
each batch, which saves two switches between threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from shared.ipc import Outcome
from shared.logs.logger import LogThrottle, get_logger
from worker.dispatching.jobs import Answer, Job
from worker.memory.base import Memory, MemoryFault

_log = get_logger()


class Flusher:
    """One thread that flushes one memory.

    Args:
        memory: what is flushed.
        settle: gets each job with its answer once the answer may leave. Called on the event loop.
    """

    def __init__(
        self,
        memory: Memory,
        settle: Callable[[Job, Answer], None],
    ) -> None:
        self._memory = memory
        self._settle = settle
        self._waiting: list[tuple[Job, Answer]] = []
        self._batches: SimpleQueue[list[tuple[Job, Answer]] | None] = SimpleQueue()
        self._busy = False
        self._error = "the memory of this query could not be written"
        self._throttle = LogThrottle("memory_not_written")

    def start(self) -> None:
        """Start the thread. Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        # It is a daemon, so that a disk that hangs cannot keep the process from exiting.
        threading.Thread(
            target=self._serve,
            name="flusher",
            daemon=True,
        ).start()

    def stop(self) -> None:
        """End the thread after the batches that it already has."""
        self._batches.put(None)

    def hold(self, job: Job, answer: Answer) -> None:
        """Hold an answer until its memory is durable. Call it on the event loop."""
        self._waiting.append((job, answer))
        if not self._busy:
            self._start_flush()

    def flush_on_this_thread(self, jobs: Iterable[Job]) -> None:
        """Flush on the calling thread, and mark the jobs whose memory is durable now."""
        self._flush()
        for job in jobs:
            job.durable = self._memory.is_durable(job.commit_number)

    def _start_flush(self) -> None:
        batch = self._waiting
        self._waiting = []
        self._busy = True
        self._batches.put(batch)

    def _serve(self) -> None:
        while (batch := self._batches.get()) is not None:
            self._flush()
            # The loop may be closed, because the process is exiting.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_flushed, batch)

    def _flush(self) -> None:
        # A failure does not say which queries it affects. So the caller asks the memory about each
        # job's commit (`is_durable`).
        try:
            self._memory.flush()
        except MemoryFault as exc:
            self._error = str(exc)
            suppressed = self._throttle.admit()
            if suppressed is not None:
                _log.error(
                    "memory_not_written",
                    error=self._error,
                    **suppressed,
                )

    def _on_flushed(self, batch: list[tuple[Job, Answer]]) -> None:
        """Settle the jobs of a batch: each of their commits is durable now, or was taken back."""
        # The next flush starts first, so that the disk works while these answers are sent.
        self._busy = False
        if self._waiting:
            self._start_flush()
        for job, answer in batch:
            if not self._memory.is_durable(job.commit_number):
                answer = (Outcome.HANDLER_FAILED, self._error.encode())
            self._settle(job, answer)
        batch[-1][0].source.send_answers()
