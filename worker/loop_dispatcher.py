"""Runs an `async def` handler on the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from time import perf_counter_ns
from typing import Any

import anyio.abc

from worker.dispatch import SLICE_NS, Dispatcher, Lane
from worker.jobs import CANCELLED, Job


class TaskLane(Lane):
    """A lane that is a task."""

    __slots__ = ("task",)

    def __init__(self) -> None:
        super().__init__()
        self.task: asyncio.Task[Any] | None = None


class LoopDispatcher(Dispatcher):
    """Each lane takes one job after the other; one that has none sleeps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sleepers: list[asyncio.Future[None]] = []
        self._stopping = False

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""
        before = len(self._queue)
        self._queue.extend(jobs)
        added = len(self._queue) - before
        self.pending += added
        for _ in range(min(added, len(self._sleepers))):
            if not (sleeper := self._sleepers.pop()).done():
                sleeper.set_result(None)

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        for _ in range(self._concurrency):
            lane = TaskLane()
            self._lanes.append(lane)
            tasks.start_soon(self._consume, lane)

    def _stop(self) -> None:
        self._stopping = True

    def _interrupt(self, lane: Lane) -> bool:
        assert isinstance(lane, TaskLane)
        return lane.task is not None and lane.task.cancel()

    async def _call(self, function: Callable[[], Any]) -> None:
        returned = function()
        if inspect.isawaitable(returned):
            await returned

    async def _consume(self, lane: TaskLane) -> None:
        lane.task = asyncio.current_task()
        queue = self._queue
        lane.since_ns = began = perf_counter_ns()  # there may be work already
        slice_ends = began + SLICE_NS
        last: Job | None = None
        while True:
            if not queue:
                if last is not None:
                    last.source.flush()
                    last = None
                lane.busy_ns += lane.since_ns - began
                await self._undisturbed(lane, self._sleep())
                lane.since_ns = began = perf_counter_ns()
                slice_ends = began + SLICE_NS
                continue
            job = queue.popleft()
            if job.cancelled:
                self._settle(job, CANCELLED)
                continue
            lane.job, body = job, job.body
            try:
                answer = self._conclude(job, await self._handler.handle(body, self._memory.checkout()))
            except BaseException as exc:  # a handler's SystemExit or stray CancelledError is its failure, not ours
                if self._stopping:
                    raise
                answer = self._fail(job, exc, body)
            if lane.timed_out:
                self._forgive(lane)
            self._finish(job, answer)
            lane.job, last = None, job
            now = perf_counter_ns()
            lane.durations[(now - lane.since_ns).bit_length()] += 1
            lane.since_ns = now
            # A handler that never waits would keep the loop from reading, writing and ponging.
            if now > slice_ends:
                lane.busy_ns += now - began
                await self._undisturbed(lane, asyncio.sleep(0))
                lane.since_ns = began = perf_counter_ns()
                slice_ends = began + SLICE_NS

    def _forgive(self, lane: TaskLane) -> None:
        """Have the lane go on after a query that was cancelled for its time-out."""
        lane.timed_out, lane.grace_ns = False, 0
        if lane.task is not None:
            lane.task.uncancel()

    async def _undisturbed(self, lane: TaskLane, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait; a cancellation that a handler has left behind is not the lane's."""
        try:
            await waiting
        except asyncio.CancelledError:
            if self._stopping or lane.task is None:
                raise
            lane.task.uncancel()

    async def _sleep(self) -> None:
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper
