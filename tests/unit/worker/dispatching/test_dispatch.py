"""`worker.dispatching.dispatch`: both dispatchers, with real threads and a real event loop."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config.schema import MemoryKind
from shared.ipc import Outcome
from tests.logs import capture_logs
from worker.dispatching._loop_dispatcher import LoopDispatcher
from worker.dispatching._thread_dispatcher import BATCH, ThreadDispatcher
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.dispatch import Dispatcher, DispatcherOptions
from worker.dispatching.handler import Handler
from worker.dispatching.jobs import CANCELLED, Answer, Job
from worker.dispatching.results import HandlerFault, encode_result, is_json
from worker.memory._disk import DiskMemory
from worker.memory.base import Memory
from worker.memory.choose import create_memory

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
Plain = Callable[[str, dict[Any, Any]], Any]
KINDS = pytest.mark.parametrize("kind", ["async", "plain"])


class RecordingSource:
    """A source of queries that records the answers in order of arrival."""

    def __init__(self) -> None:
        self.answers: list[tuple[Any, Outcome, bytes]] = []
        self._more = anyio.Event()

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        self.answers.append((job.ticket, *answer))
        self._more.set()
        self._more = anyio.Event()

    def send_answers(self) -> None:
        pass

    async def wait_for(self, number: int) -> list[tuple[Any, Outcome, bytes]]:
        with anyio.fail_after(LIMIT_S):
            while len(self.answers) < number:
                await self._more.wait()
        return self.answers


class Harness(NamedTuple):
    """A running dispatcher and the source of its queries."""

    dispatcher: Dispatcher
    source: RecordingSource

    def submit(self, *bodies: str) -> list[Job]:
        jobs = [Job(self.source, body, body) for body in bodies]
        self.dispatcher.submit(jobs)
        return jobs

    async def ask(self, *bodies: str) -> list[tuple[Outcome, bytes]]:
        """Return the answers to these queries alone, in the order of the queries."""
        before = len(self.source.answers)
        self.submit(*bodies)
        answers = (await self.source.wait_for(before + len(bodies)))[before:]
        assert [ticket for ticket, _, _ in answers] == list(bodies)
        return [(outcome, payload) for _, outcome, payload in answers]

    async def failure(self, body: str) -> str:
        """Return the error message of this query."""
        ((outcome, payload),) = await self.ask(body)
        assert outcome is Outcome.HANDLER_FAILED
        return payload.decode()


def handler_of(kind: str, function: Plain, **parts: Any) -> Handler:
    if kind == "plain":
        return Handler(handle=function, is_async=False, **parts)

    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        return function(body, memory)

    return Handler(handle=handle, is_async=True, **parts)


@asynccontextmanager
async def start(
    handler: Handler, memory: MemoryKind = "ram", concurrency: int = 1
) -> AsyncIterator[Harness]:
    options = DispatcherOptions(concurrency=concurrency)
    dispatcher = create_dispatcher(handler, create_memory(memory, "w", Path("/nowhere")), options)
    async with dispatcher.running():
        yield Harness(dispatcher, RecordingSource())


def echo(body: str, memory: dict[Any, Any]) -> Any:
    return body, memory


def ok(value: Any) -> tuple[Outcome, bytes]:
    return Outcome.OK, encode_result(value)


def names(count: int) -> list[str]:
    return [f"q{number}" for number in range(count)]


def test_handler_kind_selects_the_dispatcher() -> None:
    memory = create_memory("none", "w", Path("/nowhere"))
    assert isinstance(create_dispatcher(handler_of("async", echo), memory), LoopDispatcher)
    assert isinstance(create_dispatcher(handler_of("plain", echo), memory), ThreadDispatcher)


# --- order and memory ---


@KINDS
async def test_queries_are_answered_in_order_of_arrival(kind: str) -> None:
    async with start(handler_of(kind, echo)) as harness:
        bodies = names(3 * BATCH + 1)
        harness.submit(*bodies[:5])
        harness.submit(*bodies[5:])
        answers = await harness.source.wait_for(len(bodies))
        assert answers == [(body, *ok(body)) for body in bodies]


@KINDS
async def test_only_one_query_runs_at_a_time(kind: str) -> None:
    running = 0
    seen = []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        nonlocal running
        running += 1
        seen.append(running)
        running -= 1
        return body, memory

    async with start(handler_of(kind, handle)) as harness:
        await harness.ask(*names(BATCH * 2))
    assert set(seen) == {1}


@KINDS
async def test_next_query_gets_the_memory_of_the_previous_one(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        return dict(memory), {**memory, body: len(memory)}

    async with start(handler_of(kind, handle)) as harness:
        assert await harness.ask("a", "b") == [ok({}), ok({"a": 0})]
        assert await harness.ask("c") == [ok({"a": 0, "b": 1})]


@KINDS
async def test_without_memory_every_query_gets_an_empty_dict(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        found = dict(memory)
        memory["changed"] = True
        return found, {"returned": True}

    async with start(handler_of(kind, handle), memory="none") as harness:
        assert await harness.ask("a", "b") == [ok({}), ok({})]


def mutate(memory: dict[Any, Any]) -> None:
    """Change a memory in place, at every depth."""
    memory["n"] = -1
    memory["new"] = True
    del memory["gone"]
    memory["nested"]["list"].append("x")
    memory["nested"]["deep"]["set"].clear()


BEFORE = {"n": 1, "gone": 2, "nested": {"list": [1], "deep": {"set": [2]}}}


def fails_with(exception: BaseException | type[BaseException]) -> Plain:
    def fail(body: str, memory: dict[Any, Any]) -> Any:
        mutate(memory)
        raise exception

    return fail


def returns(value: Any) -> Plain:
    """Return a handler that changes its memory in place and returns this value."""

    def give(body: str, memory: dict[Any, Any]) -> Any:
        mutate(memory)
        return value(memory) if callable(value) else value

    return give


class ExceptionWithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExceptionThatExits(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


def cycle(memory: dict[Any, Any]) -> Any:
    found: list[Any] = []
    found.append(found)
    return found, memory


RAISED: dict[str, tuple[Plain, str]] = {
    "exception": (fails_with(ValueError("bad value")), "ValueError: bad value"),
    "exception_class": (fails_with(LookupError), "LookupError: "),
    "exception_without_text": (fails_with(ExceptionWithoutText()), "ExceptionWithoutText: "),
    "exception_that_exits": (fails_with(ExceptionThatExits()), "ExceptionThatExits: "),
    "exception_with_surrogates": (fails_with(ValueError("a\ud800")), "ValueError: a"),
    "long_exception": (fails_with(ValueError("x" * 10_000)), "ValueError: xxx"),
    "exit": (fails_with(SystemExit(3)), "SystemExit: 3"),
    "interrupt": (fails_with(KeyboardInterrupt()), "KeyboardInterrupt: "),
    "stray_cancellation": (fails_with(asyncio.CancelledError("stray")), "CancelledError: stray"),
    "memory_error": (fails_with(MemoryError()), "MemoryError: "),
    "recursion": (fails_with(RecursionError("too deep")), "RecursionError: too deep"),
    "objects": (returns(lambda memory: ({object()}, memory)), "TypeError: "),
    "surrogates": (returns(lambda memory: ("\ud800", memory)), "UnicodeEncodeError: "),
    "cycle": (returns(cycle), "RecursionError: "),
    "odd_keys": (returns(lambda memory: ({(1, 2): 3}, memory)), "TypeError: "),
}
"""Handlers that raise, or whose result cannot be encoded, and the exception in the answer."""

INVALID: dict[str, tuple[Plain, str]] = {
    "returns_none": (returns((None,)[0]), "must return (result, memory), it returned None"),
    "returns_one": (returns((1,)), "must return (result, memory), it returned a tuple of 1"),
    "returns_three": (
        returns((1, {}, 3)),
        "must return (result, memory), it returned a tuple of 3",
    ),
    "returns_a_list": (returns([1, {}]), "must return (result, memory), it returned a list"),
    "returns_text": (returns("ab"), "must return (result, memory), it returned a str"),
    "memory_is_none": (returns((1, None)), "must return a dict as memory, it returned None"),
    "memory_is_a_list": (returns((1, [])), "must return a dict as memory, it returned a list"),
    "result_and_memory_swapped": (
        returns(({}, [])),
        "it returned a list and a dict as result; are the two swapped?",
    ),
    "bytes_that_are_not_json": (
        returns(lambda memory: (b"{", memory)),
        "bytes that are not JSON; return text as str",
    ),
    "bytes_that_are_not_text": (
        returns(lambda memory: (b'"\xff"', memory)),
        "bytes that are not JSON",
    ),
    "no_bytes": (returns(lambda memory: (b"", memory)), "bytes that are not JSON"),
    "two_values": (returns(lambda memory: (b"1 2", memory)), "bytes that are not JSON"),
}
"""Handlers that return an invalid value, and what the message says about it."""

FAILURES = RAISED | INVALID


def failing_handler(kind: str, name: str) -> Handler:
    """Return a handler that fails for the query `fail`, and otherwise returns its memory."""
    fail, _ = FAILURES[name]

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "first":
            return 0, {"n": 1, "gone": 2, "nested": {"list": [1], "deep": {"set": [2]}}}
        return fail(body, memory) if body == "fail" else (dict(memory), memory)

    return handler_of(kind, handle)


@KINDS
@pytest.mark.parametrize("name", FAILURES)
async def test_failed_query_changes_no_memory_and_no_other_query(kind: str, name: str) -> None:
    async with start(failing_handler(kind, name)) as harness:
        answers = await harness.ask("first", "fail", "look", "fail", "look")
        assert answers[0] == ok(0)
        assert answers[2] == answers[4] == ok(BEFORE)
        for outcome, payload in (answers[1], answers[3]):
            assert outcome is Outcome.HANDLER_FAILED
            assert len(payload) <= 4100
        assert harness.dispatcher.counters().errors == 2
        assert harness.dispatcher.counters().handler_error is not None


async def check_message(kind: str, name: str, text: str) -> None:
    """Check that a failed query's answer, and the last error of the worker, contain a text."""
    async with start(failing_handler(kind, name)) as harness:
        await harness.ask("first")
        for _ in range(2):
            assert text in await harness.failure("fail")
        last_error = harness.dispatcher.counters().handler_error
        assert last_error is not None
        assert text in last_error.error


@KINDS
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (_, text) in RAISED.items()])
async def test_failed_query_is_answered_and_reported_with_its_exception(
    kind: str, name: str, text: str
) -> None:
    await check_message(kind, name, text)


@pytest.mark.message_text
@KINDS
@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (_, text) in INVALID.items()])
async def test_message_for_an_invalid_return_value_describes_it(
    kind: str, name: str, text: str
) -> None:
    await check_message(kind, name, text)


@KINDS
async def test_memory_that_cannot_be_unpickled_does_not_stop_the_dispatcher(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "fail":
            raise ValueError("failed")
        return len(memory), {"kept": Unreadable("a", "b")}

    async with start(handler_of(kind, handle)) as harness:
        assert [outcome for outcome, _ in await harness.ask("a", "fail", "fail", "b")] == [
            Outcome.OK,
            Outcome.HANDLER_FAILED,
            Outcome.HANDLER_FAILED,
            Outcome.OK,
        ]


class Unreadable(Exception):
    """An exception that can be pickled but not unpickled, because of its two arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@KINDS
async def test_repeated_failures_are_counted_and_logged_once_with_a_traceback(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        raise ValueError(body)

    with capture_logs() as logs:
        async with start(handler_of(kind, handle)) as harness:
            await harness.ask(*names(20))
            assert harness.dispatcher.counters().errors == 20
    (line,) = logs
    assert (line["event"], line["error"]) == ("handler_failed", "ValueError: q0")
    assert traceback.extract_tb(line["exc_info"].__traceback__)[-1].name == "handle"


async def later() -> Any:
    return 1, {}


RETURNS_A_COROUTINE = Handler(handle=lambda body, memory: later(), is_async=False)


async def test_plain_handler_that_returns_a_coroutine_fails() -> None:
    async with start(RETURNS_A_COROUTINE) as harness:
        ((outcome, _),) = await harness.ask("q")
        assert outcome is Outcome.HANDLER_FAILED


@pytest.mark.message_text
async def test_message_for_a_returned_coroutine_suggests_async() -> None:
    async with start(RETURNS_A_COROUTINE) as harness:
        assert "write it as 'async def'" in await harness.failure("q")


# --- results ---


@pytest.mark.parametrize(
    ("result", "encoded"),
    [
        (
            [{"type": "url", "properties": {"title": "é"}}],
            '[{"type":"url","properties":{"title":"é"}}]'.encode(),
        ),
        (None, b"null"),
        ("text", b'"text"'),
        ('{"a":1}', b'"{\\"a\\":1}"'),
        (b'{"a" : 1.10}', b'{"a" : 1.10}'),
        (bytearray(b" [1] "), b" [1] "),
        (memoryview(b"null"), b"null"),
        (float("nan"), b"null"),
    ],
)
def test_result_is_encoded_as_json_and_bytes_are_kept(result: Any, encoded: bytes) -> None:
    assert encode_result(result) == encoded


@given(st.binary() | st.text(alphabet='{}[]",:019.eE-+ntrufalse\\ \n').map(str.encode))
def test_bytes_are_json_only_when_a_strict_parser_agrees(data: bytes) -> None:
    import json

    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(data.decode(), parse_constant=refuse)
    except ValueError:
        strict = False
    else:
        strict = True
    assert is_json(data) == strict


# --- concurrency ---


@KINDS
@pytest.mark.parametrize("at_once", [True, False])
async def test_queries_without_memory_run_at_the_configured_concurrency(
    kind: str, at_once: bool
) -> None:
    concurrency, running, seen = 4, 0, []
    lock, barrier, event = threading.Lock(), threading.Barrier(concurrency), asyncio.Event()

    def enter_handler() -> int:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
            return running

    def exit_handler() -> None:
        nonlocal running
        with lock:
            running -= 1

    def plain(body: str, memory: dict[Any, Any]) -> Any:
        enter_handler()
        barrier.wait(LIMIT_S)
        exit_handler()
        return body, memory

    async def on_loop(body: str, memory: dict[Any, Any]) -> Any:
        if enter_handler() == concurrency:
            event.set()
        await event.wait()
        exit_handler()
        return body, memory

    handler = Handler(handle=plain if kind == "plain" else on_loop, is_async=kind == "async")
    async with start(handler, memory="none", concurrency=concurrency) as harness:
        bodies = names(concurrency * 3)
        if at_once:
            harness.submit(*bodies)
        else:
            for body in bodies:
                harness.submit(body)
        answers = await harness.source.wait_for(len(bodies))
    assert {outcome for _, outcome, _ in answers} == {Outcome.OK}
    assert max(seen) == concurrency


@KINDS
async def test_slow_query_does_not_delay_others_while_a_slot_is_free(kind: str) -> None:
    hold, release = threading.Event(), asyncio.Event()

    def plain(body: str, memory: dict[Any, Any]) -> Any:
        if body == "slow":
            hold.wait(LIMIT_S)
        return body, memory

    async def on_loop(body: str, memory: dict[Any, Any]) -> Any:
        if body == "slow":
            await release.wait()
        return body, memory

    handler = Handler(handle=plain if kind == "plain" else on_loop, is_async=kind == "async")
    async with start(handler, memory="none", concurrency=2) as harness:
        harness.submit("slow", *names(40))
        answers = await harness.source.wait_for(40)
        assert [ticket for ticket, _, _ in answers] == names(40)
        hold.set()
        release.set()
        assert (await harness.source.wait_for(41))[40][0] == "slow"


# --- cancelled, idle ---


@KINDS
async def test_cancelled_query_is_answered_without_being_run(kind: str) -> None:
    ran: list[str] = []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        ran.append(body)
        return body, memory

    async with start(handler_of(kind, handle)) as harness:
        jobs = [Job(harness.source, body, body) for body in names(4)]
        jobs[1].skipped_as = jobs[3].skipped_as = CANCELLED
        harness.dispatcher.submit(jobs)
        answers = await harness.source.wait_for(4)
    assert ran == ["q0", "q2"]
    assert [outcome for _, outcome, _ in answers] == [
        Outcome.OK,
        Outcome.CANCELLED,
        Outcome.OK,
        Outcome.CANCELLED,
    ]
    assert answers[1][2] == b""


async def test_query_cancelled_while_another_blocks_the_thread_is_not_run() -> None:
    started, hold, ran = threading.Event(), threading.Event(), []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        ran.append(body)
        started.set()
        hold.wait(LIMIT_S)
        return body, memory

    async with start(handler_of("plain", handle)) as harness:
        _, second = harness.submit("q0", "q1")
        await anyio.to_thread.run_sync(started.wait, LIMIT_S)
        second.skipped_as = CANCELLED
        hold.set()
        answers = await harness.source.wait_for(2)
    assert ran == ["q0"]
    assert answers[1] == ("q1", Outcome.CANCELLED, b"")


@pytest.mark.parametrize("when", ["at once", "soon", "later"])
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_handler_that_cancels_its_task_does_not_affect_other_queries(
    when: str, concurrency: int
) -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "cancel":
            task = asyncio.current_task()
            assert task is not None
            if when == "at once":
                task.cancel()
            elif when == "soon":
                asyncio.get_running_loop().call_soon(task.cancel)
            else:
                asyncio.get_running_loop().call_later(0.01, task.cancel)
        return body, memory

    async with start(Handler(handle=handle, is_async=True), "none", concurrency) as harness:
        for _ in range(5):
            await harness.ask("cancel")
            await asyncio.sleep(0.02 if when == "later" else 0)
            assert await harness.ask("x") == [ok("x")]


@KINDS
async def test_every_waiter_for_idle_resumes_after_the_last_answer(kind: str) -> None:
    async with start(handler_of(kind, echo)) as harness:
        await harness.dispatcher.wait_until_idle()
        seen = []

        async def wait() -> None:
            await harness.dispatcher.wait_until_idle()
            seen.append(len(harness.source.answers))

        harness.submit(*names(BATCH + 10))
        assert harness.dispatcher.pending == BATCH + 10
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                tasks.start_soon(wait)
        assert seen == [BATCH + 10] * 2
        assert harness.dispatcher.pending == 0


# --- threads and the event loop ---


class CallRecorder:
    """A handler that records the thread of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def record(self, what: str) -> None:
        self.calls.append((what, threading.get_ident()))

    def setup(self) -> None:
        self.record("setup")

    def handle(self, body: str, memory: dict[Any, Any]) -> Any:
        self.record("handle")
        return body, memory

    def close(self) -> None:
        self.record("close")

    async def setup_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.record("setup")

    async def close_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.record("close")


@KINDS
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_setup_and_close_are_called_where_handle_runs(kind: str, concurrency: int) -> None:
    recorder = CallRecorder()
    handler = handler_of(kind, recorder.handle, setup=recorder.setup, close=recorder.close)
    async with start(handler, memory="none", concurrency=concurrency) as harness:
        await harness.dispatcher.set_up()
        await harness.ask("q")
        await harness.dispatcher.tear_down()
    assert [what for what, _ in recorder.calls] == ["setup", "handle", "close"]
    on_loop = [thread == threading.get_ident() for _, thread in recorder.calls]
    assert on_loop == [kind == "async"] * 3
    if concurrency == 1:
        assert len({thread for _, thread in recorder.calls}) == 1


@KINDS
async def test_async_setup_and_close_are_awaited_on_the_loop(kind: str) -> None:
    recorder = CallRecorder()
    handler = handler_of(
        kind, recorder.handle, setup=recorder.setup_later, close=recorder.close_later
    )
    async with start(handler) as harness:
        await harness.dispatcher.set_up()
        await harness.dispatcher.tear_down()
    assert recorder.calls == [("setup", threading.get_ident()), ("close", threading.get_ident())]


EXCEPTIONS = pytest.mark.parametrize(
    ("exception", "text"),
    [
        (ValueError("no database"), "no database"),
        (SystemExit("no database"), "no database"),
        (ExceptionWithoutText(), "ExceptionWithoutText"),
    ],
)


@KINDS
@EXCEPTIONS
async def test_failed_setup_or_close_is_a_fault_for_any_exception(
    kind: str, exception: BaseException, text: str
) -> None:
    def fail() -> None:
        raise exception

    async with start(handler_of(kind, echo, setup=fail, close=fail)) as harness:
        with pytest.raises(HandlerFault, match=text):
            await harness.dispatcher.set_up()
        with pytest.raises(HandlerFault, match=text):
            await harness.dispatcher.tear_down()
        assert await harness.ask("q") == [ok("q")]


@pytest.mark.message_text
@KINDS
@EXCEPTIONS
async def test_message_for_a_failed_setup_or_close_names_it(
    kind: str, exception: BaseException, text: str
) -> None:
    def fail() -> None:
        raise exception

    async with start(handler_of(kind, echo, setup=fail, close=fail)) as harness:
        with pytest.raises(HandlerFault, match=rf"^the handler's setup\(\) failed: .*{text}"):
            await harness.dispatcher.set_up()
        with pytest.raises(HandlerFault, match=rf"^the handler's close\(\) failed: .*{text}"):
            await harness.dispatcher.tear_down()


@KINDS
async def test_handler_needs_neither_setup_nor_close(kind: str) -> None:
    async with start(handler_of(kind, echo)) as harness:
        await harness.dispatcher.set_up()
        await harness.dispatcher.tear_down()


async def test_async_handler_that_never_awaits_does_not_starve_the_loop() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    def busy(body: str, memory: dict[Any, Any]) -> Any:
        ends = time.perf_counter() + 0.002
        while time.perf_counter() < ends:
            pass
        return ticks, memory

    async with start(handler_of("async", busy)) as harness, anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        answers = await harness.ask(*names(30))
        tasks.cancel_scope.cancel()
    seen = [int(payload) for _, payload in answers]
    assert seen == sorted(seen)
    assert len(set(seen)) >= 25, "the loop ran between the queries"


async def test_finished_answers_are_sent_while_a_later_slow_query_runs() -> None:
    hold = threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "slow":
            hold.wait(LIMIT_S)
        return body, memory

    async with start(handler_of("plain", handle)) as harness:
        harness.submit("q0", "q1", "slow", "q3", "slow", "q5")
        try:
            assert [ticket for ticket, _, _ in await harness.source.wait_for(2)] == ["q0", "q1"]
            assert len(harness.source.answers) == 2, "the slow query still runs"
        finally:
            hold.set()
        assert [ticket for ticket, _, _ in await harness.source.wait_for(6)] == [
            "q0",
            "q1",
            "slow",
            "q3",
            "slow",
            "q5",
        ]


async def test_event_loop_runs_while_a_plain_handler_blocks() -> None:
    hold = threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        # It ends before the limit only if the event loop still runs.
        hold.wait(LIMIT_S)
        return body, memory

    async with start(handler_of("plain", handle)) as harness:
        harness.submit("q0")
        asyncio.get_running_loop().call_later(0.001, hold.set)
        assert len(await harness.source.wait_for(1)) == 1


async def test_dispatcher_stops_without_waiting_for_a_hung_handler() -> None:
    started, hold = threading.Event(), threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        started.set()
        hold.wait(LIMIT_S)
        return body, memory

    before = time.monotonic()
    try:
        async with start(handler_of("plain", handle)) as harness:
            harness.submit("q0")
            await anyio.to_thread.run_sync(started.wait, LIMIT_S)
        assert time.monotonic() - before < LIMIT_S / 2
        assert harness.source.answers == []
    finally:
        hold.set()


async def test_query_cancelled_by_the_dispatchers_stop_is_not_a_handler_failure() -> None:
    started = asyncio.Event()

    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        started.set()
        await anyio.sleep_forever()

    with capture_logs() as logs:
        async with start(Handler(handle=handle, is_async=True)) as harness:
            harness.submit("q0")
            await started.wait()
    assert harness.source.answers == []
    assert harness.dispatcher.counters().errors == 0
    assert logs == []


# --- each job, exactly once ---

acts = st.sampled_from(["keep", "fail", "exit", "shape", "memory", "encode", "bytes", "cancelled"])


def perform(body: str, memory: dict[Any, Any]) -> Any:
    """Perform the act that the body names as `number:act`."""
    number, act = body.split(":")
    memory.setdefault("seen", []).append(int(number))
    match act:
        case "fail":
            raise ValueError(body)
        case "exit":
            raise SystemExit(body)
        case "shape":
            return None
        case "memory":
            return 1, None
        case "encode":
            return {object()}, memory
        case "bytes":
            return b"{", memory
    return list(memory["seen"]), memory


@settings(max_examples=60)
@given(st.sampled_from(["async", "plain"]), st.lists(st.lists(acts, max_size=8), max_size=6))
def test_each_query_is_answered_once_and_memory_holds_the_successful_ones(
    kind: str, turns: list[list[str]]
) -> None:
    async def main() -> list[tuple[Any, Outcome, bytes]]:
        async with start(handler_of(kind, perform)) as harness:
            number = 0
            for turn in turns:
                jobs = []
                for act in turn:
                    jobs.append(Job(harness.source, number, f"{number}:{act}"))
                    jobs[-1].skipped_as = CANCELLED if act == "cancelled" else None
                    number += 1
                harness.dispatcher.submit(jobs)
                await asyncio.sleep(0)
            with anyio.fail_after(LIMIT_S):
                await harness.dispatcher.wait_until_idle()
            return harness.source.answers

    with capture_logs():
        answers = anyio.run(main, backend_options={"use_uvloop": True})
    assert [ticket for ticket, _, _ in answers] == list(range(sum(map(len, turns))))
    kept: list[int] = []
    for (number, outcome, payload), act in zip(answers, flat(turns), strict=True):
        if act == "keep":
            kept.append(number)
            assert (outcome, payload) == ok(kept)
        else:
            assert outcome is (Outcome.CANCELLED if act == "cancelled" else Outcome.HANDLER_FAILED)


def flat(turns: Iterable[list[str]]) -> list[str]:
    return [act for turn in turns for act in turn]


async def test_query_that_waits_for_its_memory_flush_is_not_given_back(tmp_path: Path) -> None:
    gate, hanging, hung = threading.Event(), threading.Event(), anyio.Event()

    class Slow(DiskMemory):
        def send_answers(self) -> None:
            gate.wait(LIMIT_S)
            super().send_answers()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "hangs":
            hanging.set()
            gate.wait(LIMIT_S)
        return body, memory | {body: True}

    memory = Slow(tmp_path / "m.sqlite")
    memory.open()
    source = RecordingSource()
    options = DispatcherOptions(timeout_s=0.5, on_hung=lambda reason: hung.set())
    dispatcher = create_dispatcher(handler_of("plain", handle), memory, options)
    try:
        async with dispatcher.running():
            dispatcher.submit([Job(source, body, body) for body in ("done", "hangs", "behind")])
            with anyio.fail_after(LIMIT_S):
                await hung.wait()
            assert hanging.is_set()
            dispatcher.give_back()
            given_back = [
                ticket for ticket, outcome, _ in source.answers if outcome is Outcome.GIVEN_BACK
            ]
            # Another worker must not run a query that was run here.
            assert given_back == ["behind"]
            gate.set()
            await source.wait_for(3)
    finally:
        memory.close()
    assert {ticket: outcome for ticket, outcome, _ in source.answers} == {
        "done": Outcome.OK,
        "hangs": Outcome.TIMED_OUT,
        "behind": Outcome.GIVEN_BACK,
    }


class Cancelled(Job):
    """A job that is cancelled right after the handler's thread has checked `skipped_as`."""

    @property
    def skipped_as(self) -> Answer | None:  # type: ignore[override]
        self.body = ""
        return None

    @skipped_as.setter
    def skipped_as(self, value: Answer | None) -> None:
        pass


async def test_query_cancelled_after_the_check_still_runs_with_its_text() -> None:
    bodies: list[str] = []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        bodies.append(body)
        return body, memory

    async with start(handler_of("plain", handle)) as harness:
        harness.dispatcher.submit([Cancelled(harness.source, 1, "a query")])
        await harness.source.wait_for(1)
    assert bodies == ["a query"]


@KINDS
async def test_cancelled_queries_are_not_counted_in_the_durations(kind: str) -> None:
    async with start(handler_of(kind, echo)) as harness:
        jobs = [Job(harness.source, number, "q") for number in range(10)]
        for job in jobs[1:]:
            job.skipped_as = CANCELLED
        harness.dispatcher.submit(jobs)
        await harness.source.wait_for(10)
        assert sum(harness.dispatcher.counters().durations) == 1


async def test_duration_of_a_timed_out_query_excludes_its_time_to_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.dispatching.dispatch.STOP_GRACE_NS", 60_000_000_000)

    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep_forever()

    dispatcher = create_dispatcher(
        Handler(handle=handle, is_async=True), Memory(), DispatcherOptions(timeout_s=0.02)
    )
    source = RecordingSource()
    async with dispatcher.running():
        dispatcher.submit([Job(source, 1, "q")])
        await source.wait_for(1)
        await dispatcher.wait_for_submitted()
        while not sum(dispatcher.counters().durations):  # noqa: ASYNC110
            await anyio.sleep(0.001)
    (bucket,) = (at for at, count in enumerate(dispatcher.counters().durations) if count)
    # The time that a cancelled handler has to stop would be in a later bucket.
    assert 2**bucket < 60e9


async def test_flood_of_timeouts_is_logged_once() -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep_forever()

    handler = Handler(handle=handle, is_async=True)
    dispatcher = create_dispatcher(
        handler, create_memory("none", "w", Path("/nowhere")), DispatcherOptions(20, 0.02)
    )
    source = RecordingSource()
    with capture_logs() as logs:
        async with dispatcher.running():
            dispatcher.submit([Job(source, body, body) for body in names(40)])
            answers = await source.wait_for(40)
    assert {outcome for _, outcome, _ in answers} == {Outcome.TIMED_OUT}
    (line,) = logs
    assert line["event"] == "handler_timed_out"
    assert line["reason"]


async def test_query_submitted_before_the_handler_starts_has_its_full_timeout() -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep(0.02)
        return body, memory

    handler = Handler(handle=handle, is_async=True)
    dispatcher = create_dispatcher(
        handler, create_memory("ram", "w", Path("/nowhere")), DispatcherOptions(timeout_s=LIMIT_S)
    )
    source = RecordingSource()
    async with dispatcher.running():
        dispatcher.submit([Job(source, "x", "x")])
        assert await source.wait_for(1) == [("x", *ok("x"))]
    # The first 36 buckets have the durations below 2**35 ns, which are 34 s.
    assert sum(dispatcher.counters().durations[:36]) == 1


class GivenBack(Job):
    """A job that is given back between the writing of `claimed` and the check of `skipped_as`."""

    @property
    def claimed(self) -> bool:  # type: ignore[override]
        return self.has_begun

    @claimed.setter
    def claimed(self, value: bool) -> None:
        self.has_begun = value
        if value:
            self.give_back()


async def test_query_given_back_at_its_start_is_returned() -> None:
    async with start(handler_of("plain", echo)) as harness:
        loop, done = asyncio.get_running_loop(), threading.Event()

        def on_the_loop() -> None:
            harness.dispatcher.give_back()
            done.set()

        def give_back() -> None:
            loop.call_soon_threadsafe(on_the_loop)
            done.wait(LIMIT_S)

        job = GivenBack(harness.source, "x", "x")
        job.give_back = give_back
        harness.dispatcher.submit([job])
        assert await harness.source.wait_for(1) == [("x", Outcome.GIVEN_BACK, b"")]
