"""Holds answers back until what their queries left in memory is durable.

The disk is waited for on a thread of its own: handler and loop go on meanwhile, and one commit
serves all the answers that have come in the time of the one before it. A handler's own thread, when
it has come to the end of a batch, waits itself: that spares it two hand-overs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Final

from shared.ipc import Outcome
from shared.logs import Folded, get_logger
from worker.jobs import Answer, Job
from worker.memory import Memory, MemoryFault

_NOT_WRITTEN: Final = "the memory of this query could not be written"


class Flusher:
    """One thread that writes one memory.

    Args:
        memory: what is flushed.
        settle: takes each job with its answer once that may leave. Called on the event loop.
    """

    def __init__(self, memory: Memory, settle: Callable[[Job, Answer], None]) -> None:
        self._memory = memory
        self._settle = settle
        self._waiting: list[tuple[Job, Answer]] = []
        self._work: SimpleQueue[list[tuple[Job, Answer]] | None] = SimpleQueue()
        self._busy = False
        self._fault = _NOT_WRITTEN
        self._folded = Folded(what="memory_not_written")
        self._log = get_logger("worker.dispatch")

    def start(self) -> None:
        """Start the thread. Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        # A daemon, so that a disk that hangs cannot keep the process from leaving.
        threading.Thread(target=self._serve, name="flusher", daemon=True).start()

    def stop(self) -> None:
        """End the thread after what it is at."""
        self._work.put(None)

    def hold(self, job: Job, answer: Answer) -> None:
        """Hold an answer until the memory is durable. On the loop."""
        self._waiting.append((job, answer))
        if not self._busy:
            self._flush()

    def flush_here(self, jobs: Iterable[Job]) -> None:
        """Flush on this thread, and note which of these jobs left a memory that is durable now."""
        self._try()
        for job in jobs:
            job.durable = self._memory.kept(job.commit)

    def _flush(self) -> None:
        batch, self._waiting = self._waiting, []
        self._busy = True
        self._work.put(batch)

    def _serve(self) -> None:
        while (batch := self._work.get()) is not None:
            self._try()
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is leaving
                self._loop.call_soon_threadsafe(self._flushed, batch)

    def _try(self) -> None:
        """Flush; a failure is told to those whose commits it takes back."""
        try:
            self._memory.flush()
        except MemoryFault as exc:
            self._fault = str(exc)
            if (held := self._folded.admit("another commit")) is not None:
                self._log.error("memory_not_written", error=self._fault, like_it_before=held)

    def _flushed(self, batch: list[tuple[Job, Answer]]) -> None:
        """Let the answers go: each of their commits is durable now, or was taken back."""
        self._busy = False
        if self._waiting:
            self._flush()
        for job, answer in batch:
            kept = self._memory.kept(job.commit)
            self._settle(job, answer if kept else (Outcome.HANDLER_FAILED, self._fault.encode()))
        batch[-1][0].source.flush()
