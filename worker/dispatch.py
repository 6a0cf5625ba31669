"""One query after another through the handler, with memory, whatever transport it came by.

A transport submits `Job`s and gets each answered exactly once, on the event loop. `async def`
handlers run on the loop; plain functions run on a thread of their own and are fed in batches, so
that two thread switches serve many queries. With `concurrency` above one (no memory), as many
queries run at once.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Final, Protocol

import anyio
import anyio.abc
import msgspec
import structlog

from shared.ipc import Counters, Outcome
from shared.logs import Folded
from worker.handler import Handler
from worker.memory import Memory

BATCH: Final = 64
"""How many queries a handler's thread gets at once."""

SLICE_S: Final = 0.001
"""How long finished answers may wait for slower ones behind them, and the loop for the handler."""

CANCELLED: Final = (Outcome.CANCELLED, b"")
Answer = tuple[Outcome, bytes]


class Source(Protocol):
    """Where a job came from, and how it wants its answer."""

    def encode(self, result: Any) -> bytes:
        """Return a handler's result as JSON. May be called on any thread; may raise anything."""

    def answer(self, job: Job, answer: Answer) -> None:
        """Take the answer. Called once a job, on the event loop."""


class Job:
    """One query. `ticket` is whatever its source needs to know it again."""

    __slots__ = ("body", "cancelled", "size", "source", "ticket")

    def __init__(self, source: Source, ticket: Any, body: str, size: int = 0) -> None:
        self.source = source
        self.ticket = ticket
        self.body = body
        self.size = size
        self.cancelled = False


class HandlerFault(Exception):
    """A handler returned what it must not."""


class Dispatcher(ABC):
    """Runs jobs through one handler. Use as: `async with dispatcher.running(): await dispatcher.set_up()`."""

    def __init__(self, handler: Handler, memory: Memory, counters: Counters, concurrency: int = 1) -> None:
        self.pending = 0
        self._counters = counters
        self._handler = handler
        self._memory = memory
        self._concurrency = concurrency
        self._queue: deque[Job] = deque()
        self._idle: anyio.Event | None = None
        self._folded = Folded()
        self._log = structlog.get_logger("worker.dispatch")

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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep ready what runs the handler."""
        async with anyio.create_task_group() as tasks:
            self._start(tasks)
            try:
                yield
            finally:
                self._stop()
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
        except (Exception, SystemExit) as exc:
            raise HandlerFault(f"the handler's {name}() failed: {type(exc).__name__}: {_words(exc)}") from exc

    async def idle(self) -> None:
        """Wait until every job that was submitted is answered."""
        while self.pending:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    def _settle(self, job: Job, answer: Answer) -> None:
        """Hand an answer to its source and count it. On the loop."""
        if answer[0] is Outcome.HANDLER_FAILED:
            self._counters.errors += 1
            self._counters.last_error = answer[1].decode("utf-8", "replace")
        job.source.answer(job, answer)
        self.pending -= 1
        if not self.pending and self._idle is not None:
            self._idle.set()
            self._idle = None

    def _conclude(self, job: Job, returned: Any) -> Answer:
        """Turn what `handle` returned into an answer, and keep its memory. Where `handle` ran."""
        if type(returned) is not tuple or len(returned) != 2:
            raise HandlerFault(f"handle() must return (result, memory), it returned {_kind(returned)}")
        result, memory = returned
        if not isinstance(memory, dict):
            raise HandlerFault(f"handle() must return a dict as memory, it returned {_kind(memory)}")
        encoded = job.source.encode(result)
        self._memory.commit(memory)
        return Outcome.OK, encoded

    def _fail(self, exc: BaseException) -> Answer:
        """Undo what a failed call did to the memory, and put its traceback in the log. Where `handle` ran."""
        self._memory.rollback()
        what = f"{type(exc).__name__}: {_words(exc)}"[:500]
        last = exc.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        held = self._folded.admit(f"{type(exc).__name__}:{last.tb_lineno if last else 0}")
        if held is not None:
            more = {"like_it_before": held} if held else {}
            self._log.error("handler_failed", error=what, exc_info=exc, **more)
        return Outcome.HANDLER_FAILED, what.encode("utf-8", "replace")


class LoopDispatcher(Dispatcher):
    """Runs an `async def` handler on the event loop."""

    def __init__(self, handler: Handler, memory: Memory, counters: Counters, concurrency: int = 1) -> None:
        super().__init__(handler, memory, counters, concurrency)
        self._sleepers: list[asyncio.Future[None]] = []
        self._stopping = False

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""
        before = len(self._queue)
        self._queue.extend(jobs)
        added = len(self._queue) - before
        self.pending += added
        for _ in range(min(added, len(self._sleepers))):
            self._sleepers.pop().set_result(None)

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        for _ in range(self._concurrency):
            tasks.start_soon(self._consume)

    def _stop(self) -> None:
        self._stopping = True

    async def _call(self, function: Callable[[], Any]) -> None:
        returned = function()
        if inspect.isawaitable(returned):
            await returned

    async def _consume(self) -> None:
        queue = self._queue
        slice_ends = 0.0
        while True:
            if not queue:
                await self._sleep()
                slice_ends = perf_counter() + SLICE_S
                continue
            job = queue.popleft()
            self._settle(job, CANCELLED if job.cancelled else await self._run(job))
            # A handler that never waits would keep the loop from reading, writing and ponging.
            if perf_counter() > slice_ends:
                await asyncio.sleep(0)
                slice_ends = perf_counter() + SLICE_S

    async def _run(self, job: Job) -> Answer:
        try:
            return self._conclude(job, await self._handler.handle(job.body, self._memory.checkout()))
        except BaseException as exc:  # a handler's SystemExit or stray CancelledError is its failure, not ours
            if self._stopping:
                raise
            return self._fail(exc)

    async def _sleep(self) -> None:
        sleeper: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append(sleeper)
        await sleeper


class ThreadDispatcher(Dispatcher):
    """Runs a plain function on its own thread (`concurrency` threads where there is no memory)."""

    def __init__(self, handler: Handler, memory: Memory, counters: Counters, concurrency: int = 1) -> None:
        super().__init__(handler, memory, counters, concurrency)
        self._inbox: SimpleQueue[list[Job] | Callable[[], None] | None] = SimpleQueue()
        self._batches_out = 0
        self._answered: deque[tuple[Job, Answer]] = deque()
        self._collecting = False

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, in order. Call it on the event loop."""
        before = len(self._queue)
        self._queue.extend(jobs)
        self.pending += len(self._queue) - before
        self._feed()

    def _start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._loop = asyncio.get_running_loop()
        for number in range(self._concurrency):
            # A daemon, so that a call that hangs cannot keep the process from leaving.
            threading.Thread(target=self._serve, name=f"handler-{number + 1}", daemon=True).start()

    def _stop(self) -> None:
        for _ in range(self._concurrency):
            self._inbox.put(None)

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
        while queue and self._batches_out <= self._concurrency:
            self._batches_out += 1
            self._inbox.put([queue.popleft() for _ in range(min(len(queue), most))])

    def _serve(self) -> None:
        """Run batches. On the handler's thread."""
        while (item := self._inbox.get()) is not None:
            if callable(item):
                item()
                continue
            slice_ends = perf_counter() + SLICE_S
            for job in item:
                if self._answered and not self._collecting:
                    # The next query may take long: have the loop fetch what is finished meanwhile.
                    self._collecting = True
                    self._to_loop(self._collect_soon)
                self._answered.append((job, CANCELLED if job.cancelled else self._run(job)))
                if perf_counter() > slice_ends:
                    self._to_loop(self._deliver)
                    slice_ends = perf_counter() + SLICE_S
            self._to_loop(self._batch_done)

    def _run(self, job: Job) -> Answer:
        try:
            returned = self._handler.handle(job.body, self._memory.checkout())
            if inspect.iscoroutine(returned):
                returned.close()
                raise HandlerFault("handle() returned a coroutine; write it as 'async def'")
            return self._conclude(job, returned)
        except BaseException as exc:  # noqa: BLE001 - SystemExit too: a handler's failure is a failed query
            return self._fail(exc)

    def _batch_done(self) -> None:
        self._batches_out -= 1
        self._feed()
        self._deliver()

    def _collect_soon(self) -> None:
        self._loop.call_later(SLICE_S, self._collect)

    def _collect(self) -> None:
        self._collecting = False  # first, so that an answer which comes after the next line asks again
        self._deliver()

    def _deliver(self) -> None:
        while self._answered:
            self._settle(*self._answered.popleft())

    def _to_loop(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: the process is leaving
            return


def dispatcher_for(handler: Handler, memory: Memory, counters: Counters, concurrency: int = 1) -> Dispatcher:
    """Return the dispatcher that a handler's kind asks for."""
    kind = LoopDispatcher if handler.is_async else ThreadDispatcher
    return kind(handler, memory, counters, concurrency)


def encode_result(result: Any) -> bytes:
    """Return a handler's result as the JSON that goes to a node.

    `bytes` are JSON already encoded: checked, then kept as they are. A `str` is a JSON string.

    Raises:
        HandlerFault: when bytes are not JSON.
        Exception: whatever `msgspec` raises for what JSON cannot hold.
    """
    if isinstance(result, bytes | bytearray | memoryview):
        encoded = bytes(result)
        if not is_json(encoded):
            raise HandlerFault("handle() returned bytes that are not JSON; return text as str")
        return encoded
    return msgspec.json.encode(result)


def is_json(data: bytes) -> bool:
    """Return whether `data` is one JSON value in UTF-8."""
    try:
        data.decode("utf-8")
        _skim(data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return False
    return True


_skim = msgspec.json.Decoder(msgspec.Raw).decode


def _words(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception:  # noqa: BLE001 - a handler's own exception class may fail at this too
        return "(its text cannot be had)"


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"
