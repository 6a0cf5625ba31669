"""Runs a plain function on a thread, in batches of queries. A batch costs two thread switches."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import chain
from queue import SimpleQueue
from time import perf_counter_ns
from types import CoroutineType
from typing import Any, Final

import anyio.abc

from worker.dispatching.dispatch import CURRENT_SLOT, SLICE_NS, SLICE_S, Dispatcher, Slot
from worker.dispatching.jobs import Answer, Job
from worker.dispatching.results import HandlerFault

BATCH: Final = 64
"""How many queries a handler's thread gets at once if it is the only one."""

MAX_POLL_S: Final = 0.05
"""The longest interval between two polls, and so the longest wait of a finished answer."""


class ThreadDispatcher(Dispatcher):
    """One thread, or `concurrency` threads for an agent without memory."""

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._inbox: SimpleQueue[list[Job] | Callable[[], None] | None] = SimpleQueue()
        self._batches: deque[list[Job]] = deque()
        self._undelivered: deque[tuple[Job, Answer]] = deque()
        self._polling = False
        self._loop = asyncio.get_running_loop()
        for number in range(self._concurrency):
            slot = Slot()
            self._slots.append(slot)
            # It is a daemon, so that a call that hangs cannot keep the process from exiting.
            threading.Thread(
                target=self._serve,
                args=(slot,),
                name=f"handler-{number + 1}",
                daemon=True,
            ).start()

    def _wake(self, added: int) -> None:
        self._feed()

    def _stop(self) -> None:
        for _ in range(self._concurrency):
            self._inbox.put(None)

    def _interrupt(self, slot: Slot) -> bool:
        return False  # a thread ends only with its process

    def _not_started(self) -> Iterable[Job]:
        return [*chain(*self._batches, self._queue)]

    async def _call(self, function: Callable[[], Any]) -> None:
        if inspect.iscoroutinefunction(function):
            await function()
            return
        done: Future[BaseException | None] = Future()

        def call() -> None:
            # If the caller was cancelled, so is `done`, and the call is skipped. From here on
            # `done` cannot be cancelled. Otherwise setting its result could raise and end the
            # thread.
            if not done.set_running_or_notify_cancel():
                return
            # The error is a result, because a future refuses a StopIteration as its exception.
            try:
                function()
            except BaseException as exc:  # noqa: BLE001 - raised again in the caller
                done.set_result(exc)
            else:
                done.set_result(None)

        self._inbox.put(call)
        if (error := await asyncio.wrap_future(done)) is not None:
            raise error

    def _feed(self) -> None:
        queue = self._queue
        # One thread gets many queries for one switch. Several threads get one query each, because
        # none may wait behind a slow one while another thread is free.
        size = BATCH if self._concurrency == 1 else 1
        # One batch more than there are threads, so that a thread finds work while the loop sends
        # the answers to the batch before it.
        while queue and len(self._batches) <= self._concurrency:
            count = min(len(queue), size)
            batch = [queue.popleft() for _ in range(count)]
            self._batches.append(batch)
            self._inbox.put(batch)
        if self._batches and not self._polling:
            self._polling = True
            self._loop.call_later(SLICE_S, self._poll, SLICE_S)

    def _serve(self, slot: Slot) -> None:
        """Run batches, on the handler's thread."""
        CURRENT_SLOT.set(slot)
        while (item := self._inbox.get()) is not None:
            if callable(item):
                item()
                continue
            slot.started_ns = began = perf_counter_ns()
            slice_ends = began + SLICE_NS
            for job in item:
                slot.job = job
                # The order of the next three lines is a protocol with the event loop, see `Job`:
                # `claimed` is set and the text is read before `skipped_as` is read.
                job.claimed = True
                body = job.body
                if job.skipped_as is not None:
                    self._undelivered.append((job, job.skipped_as))
                    slot.job = None
                    continue
                self._undelivered.append((job, self._run(job, body)))
                slot.job = None
                now = perf_counter_ns()
                slot.durations[(now - slot.started_ns).bit_length()] += 1
                slot.started_ns = now
                # A batch may take long, so its finished answers are delivered about once a slice.
                if now > slice_ends:
                    self._to_loop(self._deliver)
                    slice_ends = now + SLICE_NS
            slot.busy_ns += slot.started_ns - began
            # One flush for the whole batch, before `_batch_done` delivers its answers, so that they
            # need no switch to the flusher's thread and back. Answers that were delivered earlier,
            # after a slice or by `_poll`, wait for the flusher.
            if self._memory.needs_flush:
                self._flusher.flush_on_this_thread(item)
            self._to_loop(self._batch_done, item)

    def _run(self, job: Job, body: str) -> Answer:
        try:
            returned = self._handler.handle(body, self._memory.checkout())
            # A decorator can hide that a function is async. An exact type is the cheapest check.
            if type(returned) is CoroutineType:
                returned.close()
                raise HandlerFault(
                    "handle() returned a coroutine; write it as 'async def', and if it is behind a "
                    "decorator, use functools.wraps there"
                )
            return self._answer_to_return_value(job, returned)
        except BaseException as exc:  # noqa: BLE001 - SystemExit, too: it fails only the query
            return self._answer_to_exception(job, exc)

    def _batch_done(self, batch: list[Job]) -> None:
        # The next batch goes to the thread first, so that it runs while these answers are sent.
        self._batches.remove(batch)
        self._feed()
        self._deliver()
        batch[-1].source.send_answers()

    def _poll(self, waited_s: float) -> None:
        """Deliver what is finished while the thread runs, because its next query may take long.

        The loop polls, and less often while it finds nothing. A notification from the thread after
        each query would cost more than the query itself.
        """
        wait_s = SLICE_S if self._undelivered else min(2 * waited_s, MAX_POLL_S)
        self._deliver()
        self._polling = bool(self._batches)
        if self._polling:
            self._loop.call_later(wait_s, self._poll, wait_s)

    def _deliver(self) -> None:
        while self._undelivered:
            self._settle_when_durable(*self._undelivered.popleft())

    def _to_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: the process is exiting
            return
