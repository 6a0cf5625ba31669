"""Runs queries through the handler: one at a time, or `concurrency` at once without memory.

A source submits `Job`s, and gets an answer to each exactly once, on the event loop. A subclass
decides where the handler runs: `_loop_dispatcher` for `async def`, `_thread_dispatcher` for plain
functions. This module decides what holds for both: what a return value must be, what a failure
leaves behind, that an answer waits for a durable memory, and what a timeout does.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from time import perf_counter_ns
from typing import Any, Final, NamedTuple, Protocol

import anyio
import anyio.abc

from shared.errors import kind_of, text_of
from shared.ipc import BUCKETS, Counters, LastError, Outcome
from shared.logs.logger import LogThrottle, get_logger, place_of, shortened
from worker.dispatching._flusher import Flusher
from worker.dispatching.handler import Handler, without_internal_frames
from worker.dispatching.jobs import CANCELLED, GIVEN_BACK, Answer, Job, Source
from worker.dispatching.results import HandlerFault
from worker.memory.base import Memory

_NS_PER_S: Final = 1_000_000_000

SLICE_S: Final = 0.001
"""After running queries for this long, a dispatcher delivers answers and lets the loop run."""

SLICE_NS: Final = int(SLICE_S * _NS_PER_S)

STOP_GRACE_NS: Final = _NS_PER_S
"""How long an `async def` handler may take to stop after its timeout cancelled it."""

SUBMITTED_POLL_S: Final = 0.005
"""How often `wait_for_submitted` checks whether the jobs are answered."""

LONGEST_ERROR_CHARS: Final = 4000
"""How much of an exception's text is reported. The log has its traceback."""

SUSPENDED_NS: Final = _NS_PER_S
"""If the timer fires this late, the process was suspended, or the handler blocked the loop."""

_log = get_logger()


class Slot:
    """A task or a thread in which the handler runs one query at a time.

    Attributes:
        job: the query that runs now.
        started_ns: when the query started, by `perf_counter_ns`. If the process was suspended, that
            time is added, so that it does not count.
        task: the slot's task, for an `async def` handler.
        grace_ns: how much longer than the timeout the query may take, to stop after a cancellation.
        timed_out: whether the query exceeded the timeout.
        hung: whether the query did not stop. `on_hung` is called only once for it.
        durations, busy_ns: as in `Counters`. Each slot counts for itself, because slots may be
            threads, and two threads that add to one number lose counts.
    """

    __slots__ = (
        "busy_ns",
        "durations",
        "grace_ns",
        "hung",
        "job",
        "started_ns",
        "task",
        "timed_out",
    )

    def __init__(self) -> None:
        self.job: Job | None = None
        self.started_ns = 0
        self.task: asyncio.Task[Any] | None = None
        self.grace_ns = 0
        self.timed_out = False
        self.hung = False
        self.durations = [0] * BUCKETS
        self.busy_ns = 0


CURRENT_SLOT: Final[ContextVar[Slot]] = ContextVar("slot")
"""The slot of the current task or thread. Each sets it once, not for every query."""


class Observer(Protocol):
    """Sees what happens to each job, for tracing."""

    def submitted(self, job: Job) -> None:
        """Note that a job was submitted. Called on the event loop."""

    def failed(self, job: Job, exc: BaseException) -> None:
        """Note what the handler raised. Called where the handler runs, before `settled`."""

    def settled(self, job: Job, answer: Answer) -> None:
        """Note the answer of a job. Called on the event loop, once for each job."""


class DispatcherOptions(NamedTuple):
    """How a dispatcher runs its handler.

    Attributes:
        concurrency: how many queries run at once. More than one only without memory.
        timeout_s: how long one query may take. None sets no limit.
        on_hung: called with the reason when a handler cannot be stopped in this process.
        on_error: called on the event loop after each failure or timeout of the handler.
        observer: sees each job. Without one, no calls are made for it.
    """

    concurrency: int = 1
    timeout_s: float | None = None
    on_hung: Callable[[str], None] = lambda reason: None
    on_error: Callable[[], None] = lambda: None
    observer: Observer | None = None


class Dispatcher(ABC):
    """Runs jobs through one handler.

    Use as: `async with dispatcher.running(): await dispatcher.set_up()`.

    Args:
        handler: what answers the queries.
        memory: what one query leaves for the next.
        options: how the handler runs.

    Attributes:
        pending: how many jobs are not answered.
    """

    def __init__(
        self,
        handler: Handler,
        memory: Memory,
        options: DispatcherOptions,
    ) -> None:
        self.pending = 0
        self._handler = handler
        self._memory = memory
        self._concurrency = options.concurrency
        self._timeout_s = options.timeout_s
        self._on_hung = options.on_hung
        self._on_error = options.on_error
        self._observer = options.observer
        self._errors = 0
        self._last_error: LastError | None = None
        self._queue: deque[Job] = deque()
        self._slots: list[Slot] = []
        self._flusher = Flusher(memory, self._settle)
        self._all_answered: anyio.Event | None = None
        self._failures = LogThrottle("handler_failed")
        self._timeouts = LogThrottle("handler_timed_out")

    # --- what a subclass decides ---

    @abstractmethod
    def _wake(self, added: int) -> None:
        """Make the slots run the queue. Its last `added` jobs are new."""

    @abstractmethod
    async def _call(self, function: Callable[[], Any]) -> None:
        """Call the handler's `setup` or `close` where its `handle` runs."""

    @abstractmethod
    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start what runs the handler."""

    @abstractmethod
    def _stop(self) -> None:
        """End what runs the handler. A call that hangs is abandoned."""

    @abstractmethod
    def _interrupt(self, slot: Slot) -> bool:
        """Try to stop what runs in a slot. Return False if that is impossible in this process."""

    def _not_started(self) -> Iterable[Job]:
        """Return all jobs that the handler has not started, and perhaps some that it has."""
        return list(self._queue)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""
        if self._observer is not None:
            for job in jobs:
                self._observer.submitted(job)
        self._queue.extend(jobs)
        self.pending += len(jobs)
        self._wake(len(jobs))

    # --- start and end ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the tasks or threads of the handler, and stop them at the end of the block."""
        async with anyio.create_task_group() as tasks:
            self._start(tasks)
            if self._memory.needs_flush:
                self._flusher.start()
            if self._timeout_s is not None:
                tasks.start_soon(self._watch, round(self._timeout_s * _NS_PER_S))
            try:
                yield
            finally:
                # `_stop` comes before the cancellation. Otherwise a slot's task would treat the
                # cancellation as a failure of the handler, and continue.
                self._stop()
                self._flusher.stop()
                tasks.cancel_scope.cancel()

    async def set_up(self) -> None:
        """Call the handler's `setup`, if any.

        Raises:
            HandlerFault: if it raises an Exception or SystemExit.
        """
        await self._call_life_cycle("setup", self._handler.setup)

    async def tear_down(self) -> None:
        """Call the handler's `close`, if any.

        Raises:
            HandlerFault: if it raises an Exception or SystemExit.
        """
        await self._call_life_cycle("close", self._handler.close)

    async def _call_life_cycle(
        self,
        name: str,
        function: Callable[[], Any] | None,
    ) -> None:
        if function is None:
            return
        try:
            await self._call(function)
        except (Exception, SystemExit, asyncio.CancelledError) as exc:
            # If this task is being cancelled, the CancelledError is for it. Otherwise the handler
            # has waited for one of its own tasks that was cancelled, which is a failure of the
            # handler.
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            text = f"the handler's {name}() failed: {type(exc).__name__}: {text_of(exc)}"
            raise HandlerFault(text) from without_internal_frames(exc)

    def counters(self) -> Counters:
        """Return the fields of `Counters` that describe the handler. The others are zero.

        `in_flight_node` includes the direct queries, because jobs of all sources are counted here.
        `Link.all_counters` subtracts them.
        """
        durations = (slot.durations for slot in self._slots)
        busy_ns = sum(slot.busy_ns for slot in self._slots)
        return Counters(
            errors=self._errors,
            handler_error=self._last_error,
            in_flight_node=self.pending,
            durations=[sum(counts) for counts in zip(*durations, strict=True)],
            busy_s=busy_ns / _NS_PER_S,
        )

    async def wait_until_idle(self) -> None:
        """Wait until every job that was submitted is answered."""
        while self.pending:
            self._all_answered = self._all_answered or anyio.Event()
            await self._all_answered.wait()

    async def wait_for_submitted(self) -> None:
        """Wait until the handler has ended every job that was submitted before this call.

        Answers that wait for the disk may still be unsent.
        """
        jobs = [*(slot.job for slot in self._slots), *self._not_started()]
        # An event in each job would slow down every query. Polling slows down only a drain.
        while any(job is not None and not job.settled for job in jobs):  # noqa: ASYNC110
            await anyio.sleep(SUBMITTED_POLL_S)

    def give_back(self, source: Source | None = None) -> None:
        """Give the jobs of a source, or of all sources, the answer `GIVEN_BACK`.

        Jobs that the handler has started are left out. Another worker may run the others.
        """
        for job in self._not_started():
            if source is not None and job.source is not source:
                continue
            # The order of the next two lines is a protocol with the handler's thread, see `Job`.
            job.skipped_as = GIVEN_BACK
            if not job.claimed:
                self._settle(job, GIVEN_BACK)

    # --- the end of a query ---

    def _settle_when_durable(self, job: Job, answer: Answer) -> None:
        """Settle a job, if necessary after its memory is durable. Runs on the event loop."""
        # If an answer left before its memory is on disk, a crash could undo a memory that the
        # answer already depends on.
        if self._memory.needs_flush and answer[0] is Outcome.OK and not job.durable:
            self._flusher.hold(job, answer)
        else:
            self._settle(job, answer)

    def _settle(self, job: Job, answer: Answer) -> None:
        """Give a job's source the answer, unless it has one. Runs on the event loop."""
        # A job that timed out or was given back is already answered. Its handler may end later.
        if job.settled:
            return
        job.settled = True
        if answer[0] is Outcome.HANDLER_FAILED or answer[0] is Outcome.TIMED_OUT:
            self._errors += 1
            self._last_error = LastError.now(answer[1].decode("utf-8", "replace"))
            self._on_error()
        if self._observer is not None:
            self._observer.settled(job, answer)
        job.source.answer(job, answer)
        self.pending -= 1
        if not self.pending and self._all_answered is not None:
            self._all_answered.set()
            self._all_answered = None

    def _answer_to_return_value(self, job: Job, returned: Any) -> Answer:
        """Commit the returned memory, and return the answer. Runs where the handler runs."""
        if not isinstance(returned, tuple) or len(returned) != 2:
            text = f"handle() must return (result, memory), it returned {_shape_of(returned)}"
            raise HandlerFault(f"{text}; end it with: return result, memory")
        result, memory = returned
        if not isinstance(memory, dict):
            text = f"handle() must return a dict as memory, it returned {kind_of(memory)}"
            if isinstance(result, dict):
                text += " and a dict as result; are the two swapped?"
            raise HandlerFault(text)
        # The result is encoded before the memory is committed: a result that cannot be encoded is a
        # failure, and a failure leaves the memory unchanged.
        encoded = job.source.encode(result)
        # The job timed out and was answered without this result. So its memory is not kept either.
        if job.settled:
            self._memory.rollback()
            return CANCELLED
        job.commit_number = self._memory.commit(memory)
        return Outcome.OK, encoded

    def _answer_to_exception(self, job: Job, exc: BaseException) -> Answer:
        """Roll back the memory, and return the answer. Runs where the handler runs."""
        self._memory.rollback()
        if job.settled:
            return CANCELLED
        if self._observer is not None:
            self._observer.failed(job, exc)
        text = shortened(f"{type(exc).__name__}: {text_of(exc)}", LONGEST_ERROR_CHARS)
        # The throttle's key is the place, not the text. A text may quote the query, so each query
        # would get a line.
        suppressed = self._failures.admit(place_of(exc))
        if suppressed is not None:
            # A HandlerFault is about a returned value. Its traceback has no line of the handler.
            exc_info = None if isinstance(exc, HandlerFault) else exc
            _log.error(
                "handler_failed",
                error=text,
                exc_info=exc_info,
                **suppressed,
            )
        return Outcome.HANDLER_FAILED, text.encode("utf-8", "replace")

    # --- the timeout ---

    async def _watch(self, timeout_ns: int) -> None:
        """Enforce the timeout in every slot. It costs one timer for any number of queries."""
        while True:
            now = perf_counter_ns()
            earliest_start = min(
                (
                    slot.started_ns + slot.grace_ns
                    for slot in self._slots
                    if slot.job is not None and not slot.hung
                ),
                default=now,
            )
            # The sleep lasts at least a millisecond, so that rounding cannot make this a busy loop.
            # It lasts at most the timeout. With a longer sleep (a slot in its grace period), a
            # query that starts meanwhile would be checked too late.
            due = max(earliest_start + timeout_ns, now + 1_000_000)
            due = min(due, now + timeout_ns)
            await anyio.sleep((due - now) / _NS_PER_S)
            now = perf_counter_ns()
            # A process that was suspended, for example by SIGSTOP, could not run its handler, so
            # that time does not count. A handler that blocks the event loop looks the same here:
            # the runner's liveness timeout ends it.
            late = now - due
            if late > SUSPENDED_NS:
                for slot in self._slots:
                    slot.started_ns += late
                continue
            for slot in self._slots:
                # A handler's thread may start its next job at any moment. So the job is read once,
                # and before the time. In the other order, this could be a new job with the start
                # time of the job before it.
                job = slot.job
                if job is None or slot.hung:
                    continue
                if now - slot.started_ns - slot.grace_ns >= timeout_ns:
                    self._time_out(slot, job, now, timeout_ns)

    def _time_out(
        self,
        slot: Slot,
        job: Job,
        now: int,
        timeout_ns: int,
    ) -> None:
        reason = f"a query took longer than {timeout_ns // 1_000_000} ms"
        if not slot.timed_out:
            slot.timed_out = True
            suppressed = self._timeouts.admit()
            if suppressed is not None:
                _log.error(
                    "handler_timed_out",
                    reason=reason,
                    **suppressed,
                )
            # The answer leaves before the handler has stopped, so its source waits no longer.
            self._settle(job, (Outcome.TIMED_OUT, reason.encode()))
            if self._interrupt(slot):
                overrun_ns = now - slot.started_ns - timeout_ns
                slot.grace_ns = overrun_ns + STOP_GRACE_NS
                return
        # It cannot be interrupted, or it did not stop within its grace.
        slot.hung = True
        self._on_hung(f"{reason} and cannot be stopped")


def _shape_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return kind_of(value)
