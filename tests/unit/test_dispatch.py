"""`worker.dispatch`: both dispatchers, with real threads and a real event loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.ipc import Counters, Outcome
from shared.schema import MemoryKind
from tests.logs import capture_logs
from worker.disk_memory import DiskMemory
from worker.dispatch import Dispatcher
from worker.dispatchers import dispatcher_for
from worker.handler import Handler
from worker.jobs import Answer, Job
from worker.loop_dispatcher import LoopDispatcher
from worker.memories import memory_for
from worker.memory import NoMemory
from worker.results import HandlerFault, encode_result, is_json
from worker.thread_dispatcher import BATCH, ThreadDispatcher

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
Plain = Callable[[str, dict[Any, Any]], Any]
KINDS = pytest.mark.parametrize("kind", ["async", "plain"])


class Asker:
    """A source that keeps every answer, in the order in which they came."""

    def __init__(self) -> None:
        self.answers: list[tuple[Any, Outcome, bytes]] = []
        self._more = anyio.Event()

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        self.answers.append((job.ticket, *answer))
        self._more.set()
        self._more = anyio.Event()

    def flush(self) -> None:
        pass

    async def have(self, number: int) -> list[tuple[Any, Outcome, bytes]]:
        with anyio.fail_after(LIMIT_S):
            while len(self.answers) < number:
                await self._more.wait()
        return self.answers


class Bench(NamedTuple):
    """A dispatcher that runs, and who asks it."""

    dispatcher: Dispatcher
    asker: Asker
    counters: Counters

    def submit(self, *bodies: str) -> list[Job]:
        jobs = [Job(self.asker, body, body) for body in bodies]
        self.dispatcher.submit(jobs)
        return jobs

    async def ask(self, *bodies: str) -> list[tuple[Outcome, bytes]]:
        """Return the answers to these queries alone, in the order of the queries."""
        before = len(self.asker.answers)
        self.submit(*bodies)
        came = (await self.asker.have(before + len(bodies)))[before:]
        assert [ticket for ticket, _, _ in came] == list(bodies)
        return [(outcome, payload) for _, outcome, payload in came]

    async def failure(self, body: str) -> str:
        """Return the words with which this query failed."""
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
async def bench(handler: Handler, memory: MemoryKind = "ram", concurrency: int = 1) -> AsyncIterator[Bench]:
    counters = Counters()
    dispatcher = dispatcher_for(handler, memory_for(memory, "w", Path("/nowhere")), counters, concurrency)
    async with dispatcher.running():
        yield Bench(dispatcher, Asker(), counters)


def echo(body: str, memory: dict[Any, Any]) -> Any:
    return body, memory


def ok(value: Any) -> tuple[Outcome, bytes]:
    return Outcome.OK, encode_result(value)


def names(count: int) -> list[str]:
    return [f"q{number}" for number in range(count)]


def test_kind_of_the_handler_chooses_where_it_runs() -> None:
    memory, counters = memory_for("none", "w", Path("/nowhere")), Counters()
    assert isinstance(dispatcher_for(handler_of("async", echo), memory, counters), LoopDispatcher)
    assert isinstance(dispatcher_for(handler_of("plain", echo), memory, counters), ThreadDispatcher)


# --- order and memory ---


@KINDS
async def test_queries_are_answered_in_the_order_they_came(kind: str) -> None:
    async with bench(handler_of(kind, echo)) as table:
        bodies = names(3 * BATCH + 1)
        table.submit(*bodies[:5])
        table.submit(*bodies[5:])
        answers = await table.asker.have(len(bodies))
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

    async with bench(handler_of(kind, handle)) as table:
        await table.ask(*names(BATCH * 2))
    assert set(seen) == {1}


@KINDS
async def test_memory_of_one_query_is_what_the_next_one_gets(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        return dict(memory), {**memory, body: len(memory)}

    async with bench(handler_of(kind, handle)) as table:
        assert await table.ask("a", "b") == [ok({}), ok({"a": 0})]
        assert await table.ask("c") == [ok({"a": 0, "b": 1})]


@KINDS
async def test_without_memory_every_query_gets_an_empty_dict(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        found = dict(memory)
        memory["changed"] = True
        return found, {"returned": True}

    async with bench(handler_of(kind, handle), memory="none") as table:
        assert await table.ask("a", "b") == [ok({}), ok({})]


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
    """Return a handler that changes its memory, and returns a result that cannot be taken."""

    def give(body: str, memory: dict[Any, Any]) -> Any:
        mutate(memory)
        return value(memory) if callable(value) else value

    return give


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def cycle(memory: dict[Any, Any]) -> Any:
    found: list[Any] = []
    found.append(found)
    return found, memory


FAILURES: dict[str, tuple[Plain, str]] = {
    "exception": (fails_with(ValueError("bad value")), "ValueError: bad value"),
    "exception_class": (fails_with(LookupError), "LookupError: "),
    "exception_without_words": (fails_with(Unspeakable()), "Unspeakable: "),
    "exception_with_surrogates": (fails_with(ValueError("a\ud800")), "ValueError: a"),
    "long_exception": (fails_with(ValueError("x" * 10_000)), "ValueError: xxx"),
    "exit": (fails_with(SystemExit(3)), "SystemExit: 3"),
    "interrupt": (fails_with(KeyboardInterrupt()), "KeyboardInterrupt: "),
    "stray_cancellation": (fails_with(asyncio.CancelledError("stray")), "CancelledError: stray"),
    "memory_error": (fails_with(MemoryError()), "MemoryError: "),
    "recursion": (fails_with(RecursionError("too deep")), "RecursionError: too deep"),
    "returns_none": (returns((None,)[0]), "must return (result, memory), it returned a NoneType"),
    "returns_one": (returns((1,)), "must return (result, memory), it returned a tuple of 1"),
    "returns_three": (returns((1, {}, 3)), "must return (result, memory), it returned a tuple of 3"),
    "returns_a_list": (returns([1, {}]), "must return (result, memory), it returned a list"),
    "returns_text": (returns("ab"), "must return (result, memory), it returned a str"),
    "memory_is_none": (returns((1, None)), "must return a dict as memory, it returned a NoneType"),
    "memory_is_a_list": (returns((1, [])), "must return a dict as memory, it returned a list"),
    "result_and_memory_swapped": (returns(({}, [])), "it returned a list and a dict as result: are the two swapped?"),
    "objects": (returns(lambda memory: ({object()}, memory)), "TypeError: "),
    "surrogates": (returns(lambda memory: ("\ud800", memory)), "UnicodeEncodeError: "),
    "cycle": (returns(cycle), "RecursionError: "),
    "odd_keys": (returns(lambda memory: ({(1, 2): 3}, memory)), "TypeError: "),
    "bytes_that_are_no_json": (returns(lambda memory: (b"{", memory)), "bytes that are not JSON; return text as str"),
    "bytes_that_are_no_text": (returns(lambda memory: (b'"\xff"', memory)), "bytes that are not JSON"),
    "no_bytes": (returns(lambda memory: (b"", memory)), "bytes that are not JSON"),
    "two_values": (returns(lambda memory: (b"1 2", memory)), "bytes that are not JSON"),
}


@KINDS
@pytest.mark.parametrize("name", FAILURES)
async def test_failed_query_says_why_leaves_the_memory_as_it_was_and_harms_no_other(kind: str, name: str) -> None:
    fail, words = FAILURES[name]

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "first":
            return 0, {"n": 1, "gone": 2, "nested": {"list": [1], "deep": {"set": [2]}}}
        return fail(body, memory) if body == "fail" else (dict(memory), memory)

    async with bench(handler_of(kind, handle)) as table:
        answers = await table.ask("first", "fail", "look", "fail", "look")
        assert answers[0] == ok(0)
        assert answers[2] == answers[4] == ok(BEFORE)
        for outcome, payload in (answers[1], answers[3]):
            assert outcome is Outcome.HANDLER_FAILED
            assert words in payload.decode()
            assert len(payload) <= 4100
        assert table.counters.errors == 2
        assert table.counters.handler_error is not None
        assert words in table.counters.handler_error.words


@KINDS
async def test_memory_that_cannot_be_read_back_does_not_end_the_worker(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "fail":
            raise ValueError("failed")
        return len(memory), {"kept": TwoWords("a", "b")}

    async with bench(handler_of(kind, handle)) as table:
        assert [outcome for outcome, _ in await table.ask("a", "fail", "fail", "b")] == [
            Outcome.OK,
            Outcome.HANDLER_FAILED,
            Outcome.HANDLER_FAILED,
            Outcome.OK,
        ]


class TwoWords(Exception):
    """Pickles, and fails to unpickle, as exceptions with arguments of their own do."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


@KINDS
async def test_failure_is_logged_with_its_traceback_once_and_then_counted(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        raise ValueError(body)

    with capture_logs() as logs:
        async with bench(handler_of(kind, handle)) as table:
            await table.ask(*names(20))
            assert table.counters.errors == 20
    (line,) = logs
    assert (line["event"], line["error"]) == ("handler_failed", "ValueError: q0")
    assert "in handle" in line["exception"]
    assert line["exception"].endswith("ValueError: q0")


async def test_plain_handler_that_returns_a_coroutine_is_told_to_be_async() -> None:
    async def later() -> Any:
        return 1, {}

    async with bench(Handler(handle=lambda body, memory: later(), is_async=False)) as table:
        assert "write it as 'async def'" in await table.failure("q")


# --- results ---


@pytest.mark.parametrize(
    ("result", "encoded"),
    [
        ([{"type": "url", "properties": {"title": "é"}}], '[{"type":"url","properties":{"title":"é"}}]'.encode()),
        (None, b"null"),
        ("text", b'"text"'),
        ('{"a":1}', b'"{\\"a\\":1}"'),
        (b'{"a" : 1.10}', b'{"a" : 1.10}'),
        (bytearray(b" [1] "), b" [1] "),
        (memoryview(b"null"), b"null"),
        (float("nan"), b"null"),
    ],
)
def test_result_is_encoded_once_and_bytes_are_kept_as_they_are(result: Any, encoded: bytes) -> None:
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
async def test_without_memory_as_many_queries_run_at_once_as_configured(kind: str, at_once: bool) -> None:
    most, running, seen = 4, 0, []
    lock, barrier, event = threading.Lock(), threading.Barrier(most), asyncio.Event()

    def enter() -> int:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
            return running

    def leave() -> None:
        nonlocal running
        with lock:
            running -= 1

    def plain(body: str, memory: dict[Any, Any]) -> Any:
        enter()
        barrier.wait(LIMIT_S)
        leave()
        return body, memory

    async def on_loop(body: str, memory: dict[Any, Any]) -> Any:
        if enter() == most:
            event.set()
        await event.wait()
        leave()
        return body, memory

    handler = Handler(handle=plain if kind == "plain" else on_loop, is_async=kind == "async")
    async with bench(handler, memory="none", concurrency=most) as table:
        bodies = names(most * 3)
        if at_once:
            table.submit(*bodies)
        else:
            for body in bodies:
                table.submit(body)
        answers = await table.asker.have(len(bodies))
    assert {outcome for _, outcome, _ in answers} == {Outcome.OK}
    assert max(seen) == most


@KINDS
async def test_no_query_waits_behind_a_slow_one_while_there_is_room(kind: str) -> None:
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
    async with bench(handler, memory="none", concurrency=2) as table:
        table.submit("slow", *names(40))
        answers = await table.asker.have(40)
        assert [ticket for ticket, _, _ in answers] == names(40)
        hold.set()
        release.set()
        assert (await table.asker.have(41))[40][0] == "slow"


# --- cancelled, idle ---


@KINDS
async def test_cancelled_query_is_not_run_and_answered_as_such(kind: str) -> None:
    ran: list[str] = []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        ran.append(body)
        return body, memory

    async with bench(handler_of(kind, handle)) as table:
        jobs = [Job(table.asker, body, body) for body in names(4)]
        jobs[1].cancelled = jobs[3].cancelled = True
        table.dispatcher.submit(jobs)
        answers = await table.asker.have(4)
    assert ran == ["q0", "q2"]
    assert [outcome for _, outcome, _ in answers] == [Outcome.OK, Outcome.CANCELLED, Outcome.OK, Outcome.CANCELLED]
    assert answers[1][2] == b""


async def test_query_cancelled_while_another_blocks_the_thread_is_not_run() -> None:
    started, hold, ran = threading.Event(), threading.Event(), []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        ran.append(body)
        started.set()
        hold.wait(LIMIT_S)
        return body, memory

    async with bench(handler_of("plain", handle)) as table:
        _, second = table.submit("q0", "q1")
        await anyio.to_thread.run_sync(started.wait, LIMIT_S)
        second.cancelled = True
        hold.set()
        answers = await table.asker.have(2)
    assert ran == ["q0"]
    assert answers[1] == ("q1", Outcome.CANCELLED, b"")


@pytest.mark.parametrize("when", ["at once", "soon", "later"])
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_cancellation_that_a_handler_leaves_behind_costs_nobody_else(when: str, concurrency: int) -> None:
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

    async with bench(Handler(handle=handle, is_async=True), "none", concurrency) as table:
        for _ in range(5):
            await table.ask("cancel")
            await asyncio.sleep(0.02 if when == "later" else 0)
            assert await table.ask("x") == [ok("x")]


@KINDS
async def test_idle_waits_until_all_is_answered_for_everyone_who_waits(kind: str) -> None:
    async with bench(handler_of(kind, echo)) as table:
        await table.dispatcher.idle()
        seen = []

        async def wait() -> None:
            await table.dispatcher.idle()
            seen.append(len(table.asker.answers))

        table.submit(*names(BATCH + 10))
        assert table.dispatcher.pending == BATCH + 10
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                tasks.start_soon(wait)
        assert seen == [BATCH + 10] * 2
        assert table.dispatcher.pending == 0


# --- where things run ---


class Life:
    """A handler with a life-cycle that notes the thread of each part."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def note(self, what: str) -> None:
        self.seen.append((what, threading.get_ident()))

    def setup(self) -> None:
        self.note("setup")

    def handle(self, body: str, memory: dict[Any, Any]) -> Any:
        self.note("handle")
        return body, memory

    def close(self) -> None:
        self.note("close")

    async def setup_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.note("setup")

    async def close_later(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.note("close")


@KINDS
@pytest.mark.parametrize("concurrency", [1, 3])
async def test_setup_and_close_are_called_where_handle_runs(kind: str, concurrency: int) -> None:
    life = Life()
    handler = handler_of(kind, life.handle, setup=life.setup, close=life.close)
    async with bench(handler, memory="none", concurrency=concurrency) as table:
        await table.dispatcher.set_up()
        await table.ask("q")
        await table.dispatcher.tear_down()
    assert [what for what, _ in life.seen] == ["setup", "handle", "close"]
    on_loop = [thread == threading.get_ident() for _, thread in life.seen]
    assert on_loop == [kind == "async"] * 3
    if concurrency == 1:
        assert len({thread for _, thread in life.seen}) == 1


@KINDS
async def test_async_setup_and_close_are_awaited_on_the_loop(kind: str) -> None:
    life = Life()
    handler = handler_of(kind, life.handle, setup=life.setup_later, close=life.close_later)
    async with bench(handler) as table:
        await table.dispatcher.set_up()
        await table.dispatcher.tear_down()
    assert life.seen == [("setup", threading.get_ident()), ("close", threading.get_ident())]


@KINDS
@pytest.mark.parametrize("exception", [ValueError("no database"), SystemExit("no database"), Unspeakable()])
async def test_setup_that_fails_says_so_whatever_it_raised(kind: str, exception: BaseException) -> None:
    def fail() -> None:
        raise exception

    async with bench(handler_of(kind, echo, setup=fail, close=fail)) as table:
        words = "" if isinstance(exception, Unspeakable) else ".*no database"
        with pytest.raises(HandlerFault, match=rf"^the handler's setup\(\) failed: {words}"):
            await table.dispatcher.set_up()
        with pytest.raises(HandlerFault, match=rf"^the handler's close\(\) failed: {words}"):
            await table.dispatcher.tear_down()
        assert await table.ask("q") == [ok("q")]


@KINDS
async def test_handler_without_a_life_cycle_is_set_up_by_doing_nothing(kind: str) -> None:
    async with bench(handler_of(kind, echo)) as table:
        await table.dispatcher.set_up()
        await table.dispatcher.tear_down()


async def test_async_handler_that_never_waits_does_not_starve_the_loop() -> None:
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

    async with bench(handler_of("async", busy)) as table, anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        answers = await table.ask(*names(30))
        tasks.cancel_scope.cancel()
    seen = [int(payload) for _, payload in answers]
    assert seen == sorted(seen)
    assert len(set(seen)) >= 25, "the loop ran between the queries"


async def test_answers_of_finished_queries_leave_while_a_slow_one_behind_them_runs() -> None:
    hold = threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "slow":
            hold.wait(LIMIT_S)
        return body, memory

    async with bench(handler_of("plain", handle)) as table:
        table.submit("q0", "q1", "slow", "q3", "slow", "q5")
        try:
            assert [ticket for ticket, _, _ in await table.asker.have(2)] == ["q0", "q1"]
            assert len(table.asker.answers) == 2, "the slow one still runs"
        finally:
            hold.set()
        assert [ticket for ticket, _, _ in await table.asker.have(6)] == ["q0", "q1", "slow", "q3", "slow", "q5"]


async def test_loop_goes_on_while_a_plain_handler_blocks() -> None:
    hold = threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        hold.wait(LIMIT_S)  # ends only because the loop below still runs
        return body, memory

    async with bench(handler_of("plain", handle)) as table:
        table.submit("q0")
        asyncio.get_running_loop().call_later(0.001, hold.set)
        assert len(await table.asker.have(1)) == 1


async def test_handler_that_hangs_is_left_behind_at_the_end() -> None:
    started, hold = threading.Event(), threading.Event()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        started.set()
        hold.wait(LIMIT_S)
        return body, memory

    before = time.monotonic()
    try:
        async with bench(handler_of("plain", handle)) as table:
            table.submit("q0")
            await anyio.to_thread.run_sync(started.wait, LIMIT_S)
        assert time.monotonic() - before < LIMIT_S / 2
        assert table.asker.answers == []
    finally:
        hold.set()


async def test_query_that_waits_when_the_dispatcher_ends_is_no_failure_of_the_handler() -> None:
    started = asyncio.Event()

    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        started.set()
        await anyio.sleep_forever()

    with capture_logs() as logs:
        async with bench(Handler(handle=handle, is_async=True)) as table:
            table.submit("q0")
            await started.wait()
    assert table.asker.answers == []
    assert table.counters.errors == 0
    assert logs == []


# --- each job, exactly once ---

acts = st.sampled_from(["keep", "fail", "exit", "shape", "memory", "encode", "bytes", "cancelled"])


def perform(body: str, memory: dict[Any, Any]) -> Any:
    """Do what the body says: `number:act`."""
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
def test_each_query_is_answered_exactly_once_and_memory_holds_the_kept_ones(kind: str, turns: list[list[str]]) -> None:
    async def main() -> list[tuple[Any, Outcome, bytes]]:
        async with bench(handler_of(kind, perform)) as table:
            number = 0
            for turn in turns:
                jobs = []
                for act in turn:
                    jobs.append(Job(table.asker, number, f"{number}:{act}"))
                    jobs[-1].cancelled = act == "cancelled"
                    number += 1
                table.dispatcher.submit(jobs)
                await asyncio.sleep(0)
            with anyio.fail_after(LIMIT_S):
                await table.dispatcher.idle()
            return table.asker.answers

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


async def test_query_that_waits_for_its_memory_to_be_written_is_never_given_back(tmp_path: Path) -> None:
    gate, hanging, hung = threading.Event(), threading.Event(), anyio.Event()

    class Slow(DiskMemory):
        def flush(self) -> None:
            gate.wait(LIMIT_S)
            super().flush()

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        if body == "hangs":
            hanging.set()
            gate.wait(LIMIT_S)
        return body, memory | {body: True}

    memory = Slow(tmp_path / "m.sqlite")
    memory.open()
    asker = Asker()
    dispatcher = dispatcher_for(handler_of("plain", handle), memory, Counters(), 1, 0.05)
    dispatcher.on_hung = lambda reason: hung.set()
    try:
        async with dispatcher.running():
            dispatcher.submit([Job(asker, body, body) for body in ("done", "hangs", "behind")])
            with anyio.fail_after(LIMIT_S):
                await hung.wait()
            assert hanging.is_set()
            dispatcher.give_back()
            given_back = [ticket for ticket, outcome, _ in asker.answers if outcome is Outcome.RETURNED]
            assert given_back == ["behind"], "another worker must not run what this one has run"
            gate.set()
            await asker.have(3)
    finally:
        memory.close()
    assert {ticket: outcome for ticket, outcome, _ in asker.answers} == {
        "done": Outcome.OK,
        "hangs": Outcome.TIMED_OUT,
        "behind": Outcome.RETURNED,
    }


# --- what the log may have ---


@KINDS
@pytest.mark.parametrize("quotes", [False, True])
async def test_text_of_a_query_that_a_failure_quotes_is_left_out_of_the_log(kind: str, quotes: bool) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        try:
            return int(body), memory
        except ValueError as exc:
            raise RuntimeError(f"no number in {body}") from exc

    with capture_logs() as logs:
        async with bench(handler_of(kind, handle)) as table:
            table.dispatcher.quotes_queries = quotes
            told = await table.failure("4111-1111 \n'")
            assert table.counters.handler_error is not None
            told += table.counters.handler_error.words
    (line,) = logs
    assert ("4111-1111" in told + line["error"] + line["exception"]) is quotes
    assert "int(body)" in line["exception"], "the place is there"
    assert ("RuntimeError: no number in (the query)" in line["exception"]) is not quotes


@pytest.mark.parametrize(
    ("body", "quote", "left"),
    [
        ("plainsecret", "no such _plainsecret_", "no such _(the query)_"),
        ("tok", "no such _tok_, tokens", "no such _(the query)_, tokens"),
        ("4111", "4111, 41112", "(the query), 41112"),
        ("caf\u00e9 noir", json.dumps("caf\u00e9 noir"), '"(the query)"'),
        ("caf\u00e9 noir", repr("caf\u00e9 noir".encode()), "b'(the query)'"),
        ("\u79d8\u5bc6\u3067", "\u8a9e\u79d8\u5bc6\u3067\u3059", "\u8a9e(the query)\u3059"),
        ("two\nlines", repr("two\nlines"), "'(the query)'"),
    ],
)
async def test_quote_is_found_however_it_is_written(body: str, quote: str, left: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        raise ValueError(quote)

    with capture_logs() as logs:
        async with bench(handler_of("plain", handle)) as table:
            assert left in await table.failure(body)
    assert left in logs[0]["error"]


@KINDS
async def test_query_whose_asker_goes_meanwhile_is_left_out_too(kind: str) -> None:
    def handle(body: str, memory: dict[Any, Any]) -> Any:
        job.cancelled, job.body = True, ""  # as its source does
        raise KeyError(body)

    with capture_logs() as logs:
        async with bench(handler_of(kind, handle)) as table:
            job = Job(table.asker, 1, "4111-1111")
            table.dispatcher.submit([job])
            await table.asker.have(1)
    assert logs[0]["error"] == "KeyError: '(the query)'"


class Withdrawn(Job):
    """A job that its source withdraws right after the handler's thread has looked whether it does."""

    @property
    def cancelled(self) -> bool:  # type: ignore[override]
        self.body = ""
        return False

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        pass


async def test_no_query_is_run_without_its_text() -> None:
    got: list[str] = []

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        got.append(body)
        return body, memory

    async with bench(handler_of("plain", handle)) as table:
        table.dispatcher.submit([Withdrawn(table.asker, 1, "a query")])
        await table.asker.have(1)
    assert got == ["a query"]


@KINDS
async def test_withdrawn_queries_are_not_counted_as_the_handlers(kind: str) -> None:
    async with bench(handler_of(kind, echo)) as table:
        jobs = [Job(table.asker, number, "q") for number in range(10)]
        for job in jobs[1:]:
            job.cancelled = True
        table.dispatcher.submit(jobs)
        await table.asker.have(10)
        table.dispatcher.count()
        assert sum(table.counters.durations) == 1


async def test_time_of_a_query_that_was_cancelled_for_its_time_out_is_its_own() -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep_forever()

    counters = Counters()
    dispatcher = dispatcher_for(Handler(handle=handle, is_async=True), NoMemory(), counters, 1, 0.02)
    asker = Asker()
    async with dispatcher.running():
        dispatcher.submit([Job(asker, 1, "q")])
        await asker.have(1)
        await dispatcher.caught_up()
        while not sum(counters.durations):
            await anyio.sleep(0.001)
            dispatcher.count()
    (bucket,) = (at for at, count in enumerate(counters.durations) if count)
    assert 2 ** (bucket - 1) < 0.5e9, "not the second that it has to stop"


async def test_flood_of_time_outs_is_one_line() -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep_forever()

    handler = Handler(handle=handle, is_async=True)
    dispatcher = dispatcher_for(handler, memory_for("none", "w", Path("/nowhere")), Counters(), 20, 0.02)
    asker = Asker()
    with capture_logs() as logs:
        async with dispatcher.running():
            dispatcher.submit([Job(asker, body, body) for body in names(40)])
            answers = await asker.have(40)
    assert {outcome for _, outcome, _ in answers} == {Outcome.TIMED_OUT}
    assert [line["event"] for line in logs] == ["handler_timed_out"]


async def test_query_that_is_there_before_the_handler_is_has_its_whole_time() -> None:
    async def handle(body: str, memory: dict[Any, Any]) -> Any:
        await anyio.sleep(0.02)
        return body, memory

    counters = Counters()
    handler = Handler(handle=handle, is_async=True)
    dispatcher = dispatcher_for(handler, memory_for("ram", "w", Path("/nowhere")), counters, 1, LIMIT_S)
    asker = Asker()
    async with dispatcher.running():
        dispatcher.submit([Job(asker, "x", "x")])
        assert await asker.have(1) == [("x", *ok("x"))]
        dispatcher.count()
    assert sum(counters.durations[:36]) == 1, "it took no more than some seconds"
