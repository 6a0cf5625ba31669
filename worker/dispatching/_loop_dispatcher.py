"""Runs an `async def` handler on the event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from time import perf_counter_ns
from typing import Any

import anyio.abc

from worker.dispatching.dispatch import CURRENT_SLOT, SLICE_NS, Dispatcher, Slot
from worker.dispatching.jobs import Job


class LoopDispatcher(Dispatcher):
    """Each slot is a task that runs one job after another, and sleeps while the queue is empty."""

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._sleepers: list[asyncio.Future[None]] = []
        self._stopping = False
        for _ in range(self._concurrency):
            slot = Slot()
            self._slots.append(slot)
            tasks.start_soon(self._consume, slot)

    def _wake(self, added: int) -> None:
        for _ in range(min(added, len(self._sleepers))):
            sleeper = self._sleepers.pop()
            # A stray cancellation may have ended its sleep already.
            if not sleeper.done():
                sleeper.set_result(None)

    def _stop(self) -> None:
        self._stopping = True

    def _interrupt(self, slot: Slot) -> bool:
        return slot.task is not None and slot.task.cancel()

    async def _call(self, function: Callable[[], Any]) -> None:
        returned = function()
        if inspect.isawaitable(returned):
            await returned

    async def _consume(self, slot: Slot) -> None:
        """Run jobs until the dispatcher stops."""
        # One task runs all jobs of a slot, because a new task for each query would be slower.
        CURRENT_SLOT.set(slot)
        task = slot.task = asyncio.current_task()
        assert task is not None
        queue = self._queue
        last: Job | None = None
        # The queue may already contain jobs. Without this, the first would seem to have started at
        # time zero, and to have exceeded its timeout.
        slot.started_ns = began = now = perf_counter_ns()
        slice_ends = began + SLICE_NS
        while True:
            if not queue or now > slice_ends:
                slot.busy_ns += now - began
                if queue:
                    # A handler that never waits would keep the loop from reading, writing and
                    # answering pings.
                    pause = asyncio.sleep(0)
                else:
                    # No other answer is expected soon, so the finished ones are not held for the
                    # loop's next turn. With one query in flight, that would add to its latency.
                    if last is not None:
                        last.source.send_answers()
                        last = None
                    pause = self._sleep()
                await self._wait_despite_cancellation(task, pause)
                slot.started_ns = began = now = perf_counter_ns()
                slice_ends = began + SLICE_NS
                continue  # another slot may have taken the job
            job = queue.popleft()
            if job.skipped_as is not None:
                self._settle(job, job.skipped_as)
                continue
            slot.job = job
            try:
                answer = self._answer_to_return_value(
                    job,
                    await self._handler.handle(job.body, self._memory.checkout()),
                )
            # SystemExit and a stray CancelledError, too: they fail the query, not the worker.
            except BaseException as exc:
                if self._stopping:
                    raise
                answer = self._answer_to_exception(job, exc)
            if slot.timed_out:
                slot.timed_out = False
                slot.grace_ns = 0
                # The timeout cancelled this task for this query alone. The task counts the request
                # until `uncancel`, and scopes in the next query would read that count.
                task.uncancel()
            self._settle_when_durable(job, answer)
            slot.job = None
            last = job
            now = perf_counter_ns()
            slot.durations[(now - slot.started_ns).bit_length()] += 1
            slot.started_ns = now

    async def _wait_despite_cancellation(
        self,
        task: asyncio.Task[Any],
        pause: Coroutine[Any, Any, None],
    ) -> None:
        """Wait. A cancellation that a query left pending does not end the slot."""
        try:
            await pause
        except asyncio.CancelledError:
            if self._stopping:
                raise
            task.uncancel()

    async def _sleep(self) -> None:
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper
