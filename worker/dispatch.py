"""One query after another through the handler, with memory, whatever transport it came by.

A transport submits `Job`s and gets each answered exactly once, on the event loop. Where the handler
runs is a subclass's: `loop_dispatcher` for `async def`, `thread_dispatcher` for plain functions.
What holds for both is here: what a return value must be, what a failure leaves behind, when an
answer may leave (not before a durable memory is), and what becomes of a query that takes too long.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from time import perf_counter_ns
from traceback import TracebackException
from typing import Any, Final

import anyio
import anyio.abc

from shared.ipc import BUCKETS, Counters, Mishap, Outcome
from shared.logs import Folded, get_logger, shortened
from shared.redaction import Discretion
from worker.flusher import Flusher
from worker.handler import Handler
from worker.jobs import CANCELLED, RETURNED, Answer, Job, Source
from worker.memory import Memory
from worker.results import HandlerFault

NS: Final = 1_000_000_000

SLICE_S: Final = 0.001
"""How long finished answers may wait for slower ones behind them, and the loop for the handler."""

SLICE_NS: Final = int(SLICE_S * NS)

STOP_GRACE_S: Final = 1.0
"""How long an `async def` handler that is cancelled for its time-out may take to stop."""

CATCH_UP_POLL_S: Final = 0.005

LONGEST_ERROR_CHARS: Final = 4000
"""How much of an exception's words is told as the last error; its traceback is in the log."""

_OF_CODE: Final = (ImportError, AttributeError, NameError, TypeError)
"""What these quote are names of the program, not its data."""

SUSPENDED_S: Final = 1.0
"""A clock that is later than this was stopped, with the handler: the time is not counted against it."""


class Lane:
    """A place where the handler runs one query at a time: what it runs, since when (`perf_counter_ns`).

    `durations` and `busy_ns` are as `Counters` has them, of this lane alone: lanes may be threads.
    """

    __slots__ = ("busy_ns", "durations", "grace_ns", "hung", "job", "since_ns", "timed_out")

    def __init__(self) -> None:
        self.job: Job | None = None
        self.since_ns = 0
        self.grace_ns = 0  # how much longer than the time-out it may take: to stop once it is told to
        self.timed_out = False
        self.hung = False
        self.durations = [0] * BUCKETS
        self.busy_ns = 0

    @property
    def held_since_s(self) -> float:
        """From when on its query's time-out counts."""
        return (self.since_ns + self.grace_ns) / NS


class Dispatcher(ABC):
    """Runs jobs through one handler. Use as: `async with dispatcher.running(): await dispatcher.set_up()`.

    Args:
        handler: what answers.
        memory: what one query leaves for the next.
        counters: where errors are counted.
        concurrency: how many queries run at once; more than one only without memory.
        timeout_s: how long one query may take; None sets no limit.

    Attributes:
        pending: how many jobs are not answered.
        on_hung: called with the reason when a handler can be stopped no more.
        quotes_queries: whether the log may have the text of a query that a failure quotes.
    """

    def __init__(
        self,
        handler: Handler,
        memory: Memory,
        counters: Counters,
        concurrency: int = 1,
        timeout_s: float | None = None,
    ) -> None:
        self.pending = 0
        self.on_hung: Callable[[str], None] = lambda reason: None
        self.quotes_queries = False
        self._counters = counters
        self._handler = handler
        self._memory = memory
        self._concurrency = concurrency
        self._timeout_s = timeout_s
        self._queue: deque[Job] = deque()
        self._lanes: list[Lane] = []
        self._too_long = f"a query took longer than {round((timeout_s or 0) * 1000)} ms"
        self._flusher = Flusher(memory, self._settle)
        self._idle: anyio.Event | None = None
        self._folded = Folded()
        self._log = get_logger("worker.dispatch")

    # --- what a subclass decides ---

    @abstractmethod
    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""

    @abstractmethod
    async def _call(self, function: Callable[[], Any]) -> None:
        """Call the handler's `setup` or `close` where its `handle` runs."""

    @abstractmethod
    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Start what runs the handler."""

    @abstractmethod
    def _stop(self) -> None:
        """End what runs the handler; a call that hangs is left behind."""

    @abstractmethod
    def _interrupt(self, lane: Lane) -> bool:
        """Try to stop what runs in a lane; return False when that cannot be done in this process."""

    def _waiting(self) -> Iterable[Job]:
        """Return the jobs that were submitted and may not have begun."""
        return list(self._queue)

    # --- its life ---

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep ready what runs the handler."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            self._start(tasks)
            if self._memory.durable:
                self._flusher.start()
            if self._timeout_s is not None:
                tasks.start_soon(self._watch, self._timeout_s)
            try:
                yield
            finally:
                self._stop()
                self._flusher.stop()
                tasks.cancel_scope.cancel()

    async def set_up(self) -> None:
        """Call the handler's `setup`, where it has one.

        Raises:
            HandlerFault: when it fails, whatever it raised.
        """
        await self._call_named("setup", self._handler.setup)

    async def tear_down(self) -> None:
        """Call the handler's `close`, where it has one.

        Raises:
            HandlerFault: when it fails, whatever it raised.
        """
        await self._call_named("close", self._handler.close)

    async def _call_named(self, name: str, function: Callable[[], Any] | None) -> None:
        if function is None:
            return
        try:
            await self._call(function)
        except (Exception, SystemExit, asyncio.CancelledError) as exc:
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # it is we who end it; else it is of a task of the handler's own, which it waited for
            raise HandlerFault(f"the handler's {name}() failed: {type(exc).__name__}: {_words(exc)}") from exc

    def count(self) -> None:
        """Put into the counters how long the handler has taken."""
        self._counters.durations = [
            sum(counts) for counts in zip(*(lane.durations for lane in self._lanes), strict=True)
        ]
        self._counters.busy_s = sum(lane.busy_ns for lane in self._lanes) / NS

    async def idle(self) -> None:
        """Wait until every job that was submitted is answered."""
        while self.pending:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    async def caught_up(self) -> None:
        """Wait until every job that is there now is answered; those that come meanwhile are not waited for."""
        there = [*(lane.job for lane in self._lanes), *self._waiting()]
        # An event would cost each query something; this costs a drain a little.
        while there := [job for job in there if job is not None and not job.settled]:  # noqa: ASYNC110
            await anyio.sleep(CATCH_UP_POLL_S)

    def give_back(self, source: Source | None = None) -> None:
        """Answer every job that has not begun (of one source, or of all) with `RETURNED`: another may run it."""
        for job in self._waiting():
            if source is not None and job.source is not source:
                continue
            # In this order, and the other way round where it runs: one of the two sides sees the other.
            job.cancelled = True
            if not job.begun:
                self._settle(job, RETURNED)

    # --- the end of a query ---

    def _finish(self, job: Job, answer: Answer) -> None:
        """Take what became of a job. It is answered now, or once its memory is durable. On the loop."""
        if self._memory.durable and answer[0] is Outcome.OK and not job.durable:
            self._flusher.hold(job, answer)
        else:
            self._settle(job, answer)

    def tell_overdue(self) -> None:
        """Log how many failures were held back, once their time is up."""
        for kind, held in self._folded.overdue():
            event = "handler_timed_out" if kind == self._too_long else "handler_failed"
            self._log.error(event, error=kind, more=held)

    def _settle(self, job: Job, answer: Answer) -> None:
        """Hand an answer to its source and count it, unless the job has had one. On the loop."""
        if job.settled:
            return
        job.settled = True
        if answer[0] is Outcome.HANDLER_FAILED or answer[0] is Outcome.TIMED_OUT:
            self._counters.errors += 1
            self._counters.handler_error = Mishap.now(answer[1].decode("utf-8", "replace"))
        job.source.answer(job, answer)
        self.pending -= 1
        if not self.pending and self._idle is not None:
            self._idle.set()
            self._idle = None

    def _conclude(self, job: Job, returned: Any) -> Answer:
        """Turn what `handle` returned into an answer, and keep its memory. Where `handle` ran."""
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise HandlerFault(f"handle() must return (result, memory), it returned {_kind(returned)}")
        result, memory = returned
        if not isinstance(memory, dict):
            swapped = " and a dict as result: are the two swapped?" if isinstance(result, dict) else ""
            raise HandlerFault(f"handle() must return a dict as memory, it returned {_kind(memory)}{swapped}")
        encoded = job.source.encode(result)
        if job.settled:  # it came too late, and was answered without it
            self._memory.rollback()
            return CANCELLED
        job.commit = self._memory.commit(memory)
        return Outcome.OK, encoded

    def _fail(self, job: Job, exc: BaseException, body: str) -> Answer:
        """Undo what a failed call did to the memory, and put its traceback in the log. Where `handle` ran.

        `body` is what the handler was called with: the job may have been withdrawn and emptied since.
        """
        self._memory.rollback()
        if job.settled:
            return CANCELLED
        discreet = Discretion("" if self.quotes_queries or isinstance(exc, HandlerFault) else body)
        quoted = not isinstance(exc, _OF_CODE)
        words = f"{type(exc).__name__}: {discreet(_words(exc), quoted=quoted)}"
        what = shortened(words, LONGEST_ERROR_CHARS)
        last = exc.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        held = self._folded.admit(f"{type(exc).__name__} in line {last.tb_lineno if last else 0}")
        if held is not None:
            more: dict[str, Any] = {"like_it_before": held} if held else {}
            if not isinstance(exc, HandlerFault):  # what was returned is at fault: no line of the handler to be shown
                lines = TracebackException.from_exception(exc).format()
                more["exception"] = "".join(_without_query(line, discreet, quoted) for line in lines).rstrip()
            self._log.error("handler_failed", error=what, **more)
        return Outcome.HANDLER_FAILED, what.encode("utf-8", "replace")

    # --- the time-out ---

    async def _watch(self, timeout_s: float) -> None:
        """Hold every lane to the time-out. Costs one timer, however many queries there are."""
        while True:
            now = perf_counter_ns() / NS
            running = (lane.held_since_s for lane in self._lanes if lane.job is not None and not lane.hung)
            since = min(running, default=now)
            due = min(max(since + timeout_s, now + 0.001), now + timeout_s)
            await anyio.sleep(due - now)
            now = perf_counter_ns() / NS
            if (late_s := now - due) > SUSPENDED_S:
                for lane in self._lanes:
                    lane.since_ns += int(late_s * NS)
                continue
            for lane in self._lanes:
                if lane.job is not None and not lane.hung and now - lane.held_since_s >= timeout_s:
                    self._time_out(lane, lane.job, now)

    def _time_out(self, lane: Lane, job: Job, now: float) -> None:
        assert self._timeout_s is not None
        words = self._too_long
        if not lane.timed_out:
            lane.timed_out = True
            if (held := self._folded.admit(words)) is not None:
                self._log.error("handler_timed_out", error=words, **({"like_it_before": held} if held else {}))
            self._settle(job, (Outcome.TIMED_OUT, words.encode()))
            if self._interrupt(lane):
                lane.grace_ns = int((now + STOP_GRACE_S - self._timeout_s) * NS) - lane.since_ns
                return
        lane.hung = True  # said once
        self.on_hung(f"{words} and cannot be stopped")


def _without_query(line: str, discreet: Discretion, quoted: bool) -> str:
    """Return what a traceback says, without the query; places in the source, and names of classes, are none of it."""
    if line.lstrip(" |").startswith("File "):
        return line
    name, colon, words = line.partition(": ")
    if colon and name.strip(" |").replace(".", "").isidentifier():
        return f"{name}: {discreet(words, quoted=quoted)}"
    return discreet(line, quoted=quoted)


def _words(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 - a handler's own exception class may fail at this too
        return "(its text cannot be had)"


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"
