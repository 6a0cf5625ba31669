"""Runs a plain function on a thread of its own, fed in batches, so that two thread switches serve many queries."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from time import perf_counter_ns
from types import CoroutineType
from typing import Any, Final

import anyio.abc

from worker.dispatch import SLICE_NS, SLICE_S, Dispatcher, Lane
from worker.jobs import CANCELLED, Answer, Job
from worker.results import HandlerFault

BATCH: Final = 64
"""How many queries a handler's thread gets at once."""

LONGEST_LOOK_S: Final = 0.05
"""How long a finished answer may wait at the most while the handler is busy with a slower query behind it."""


class ThreadDispatcher(Dispatcher):
    """One thread, or `concurrency` of them where there is no memory."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._inbox: SimpleQueue[list[Job] | Callable[[], None] | None] = SimpleQueue()
        self._batches: deque[list[Job]] = deque()
        self._answered: deque[tuple[Job, Answer]] = deque()
        self._looking = False

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""
        before = len(self._queue)
        self._queue.extend(jobs)
        self.pending += len(self._queue) - before
        self._feed()

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._loop = asyncio.get_running_loop()
        for number in range(self._concurrency):
            lane = Lane()
            self._lanes.append(lane)
            # A daemon, so that a call that hangs cannot keep the process from leaving.
            name = f"handler-{number + 1}"
            threading.Thread(target=self._serve, args=(lane,), name=name, daemon=True).start()

    def _stop(self) -> None:
        for _ in range(self._concurrency):
            self._inbox.put(None)

    def _interrupt(self, lane: Lane) -> bool:
        return False  # nothing ends a thread but the end of its process

    def _waiting(self) -> Iterable[Job]:
        return [*(job for batch in self._batches for job in batch), *self._queue]

    async def _call(self, function: Callable[[], Any]) -> None:
        if inspect.iscoroutinefunction(function):
            await function()
            return
        done: asyncio.Future[None] = self._loop.create_future()

        def finish(exc: BaseException | None) -> None:
            if done.cancelled():
                return
            if exc is None:
                done.set_result(None)
            else:
                done.set_exception(exc if isinstance(exc, Exception) else RuntimeError(repr(exc)))

        def call() -> None:
            error: BaseException | None = None
            try:
                function()
            except BaseException as exc:  # noqa: BLE001 - carried to the caller
                error = exc
            self._to_loop(finish, error)

        self._inbox.put(call)
        await done

    def _feed(self) -> None:
        # One batch more than there are threads, so that a thread finds work while the loop delivers.
        queue = self._queue
        # Several threads get one query each: none may wait behind a slow one while a thread is free.
        most = BATCH if self._concurrency == 1 else 1
        while queue and len(self._batches) <= self._concurrency:
            batch = [queue.popleft() for _ in range(min(len(queue), most))]
            self._batches.append(batch)
            self._inbox.put(batch)
        if self._batches and not self._looking:
            self._looking = True
            self._loop.call_later(SLICE_S, self._look, SLICE_S)

    def _serve(self, lane: Lane) -> None:
        """Run batches. On the handler's thread."""
        while (item := self._inbox.get()) is not None:
            if callable(item):
                item()
                continue
            lane.since_ns = began = perf_counter_ns()
            slice_ends = began + SLICE_NS
            for job in item:
                lane.job = job
                job.begun = True
                body = job.body  # before the next look: who withdraws a job says so first, and empties it then
                if job.cancelled:
                    self._answered.append((job, CANCELLED))
                    lane.job = None
                    continue
                self._answered.append((job, self._run(job, body)))
                lane.job = None
                now = perf_counter_ns()
                lane.durations[(now - lane.since_ns).bit_length()] += 1
                lane.since_ns = now
                if now > slice_ends:
                    self._to_loop(self._deliver)
                    slice_ends = now + SLICE_NS
            lane.busy_ns += lane.since_ns - began
            if self._memory.durable:
                self._flusher.flush_here(item)
            self._to_loop(self._batch_done, item)

    def _run(self, job: Job, body: str) -> Answer:
        try:
            returned = self._handler.handle(body, self._memory.checkout())
            if type(returned) is CoroutineType:
                returned.close()
                raise HandlerFault(
                    "handle() returned a coroutine; write it as 'async def', and where it is one behind a decorator, "
                    "have that use functools.wraps"
                )
            return self._conclude(job, returned)
        except BaseException as exc:  # noqa: BLE001 - SystemExit too: a handler's failure is a failed query
            return self._fail(job, exc, body)

    def _batch_done(self, batch: list[Job]) -> None:
        self._batches.remove(batch)
        self._feed()
        self._deliver()
        batch[-1].source.flush()

    def _look(self, waited_s: float) -> None:
        """Deliver what is finished while the thread goes on, for its next query may take long.

        The loop looks by itself, and less often while it finds nothing: a word from the thread each
        time would cost both more than a query does.
        """
        wait_s = SLICE_S if self._answered else min(2 * waited_s, LONGEST_LOOK_S)
        self._deliver()
        self._looking = bool(self._batches)
        if self._looking:
            self._loop.call_later(wait_s, self._look, wait_s)

    def _deliver(self) -> None:
        while self._answered:
            self._finish(*self._answered.popleft())

    def _to_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: the process is leaving
            return
