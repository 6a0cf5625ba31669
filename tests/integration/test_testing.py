"""`em_runner.testing`: errors for handlers that hang, fail or return an invalid result."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

from em_runner.testing import HandlerFault, QueryFailed, RunAgent, running
from tests.cluster import COMMAND_TIMEOUT_S, ROOT, TIMEOUT_S, until


def echo(body: str, memory: dict[Any, Any]) -> Any:
    if body == "fail":
        raise ValueError("as requested")
    return [{"type": "echo", "properties": {"title": body}}], {"asked": memory.get("asked", 0) + 1}


@pytest.mark.message_text
def test_each_query_to_a_hanging_handler_fails(
    run_agent: RunAgent,
) -> None:
    def hang(body: str, memory: dict[Any, Any]) -> Any:
        time.sleep(60)

    agent = run_agent(hang, timeout_s=0.2)
    for _ in range(3):
        began_s = time.monotonic()
        with pytest.raises(QueryFailed, match="took longer than 200 ms"):
            agent.ask("x")
        assert time.monotonic() - began_s < 30


@pytest.mark.message_text
def test_too_large_answer_is_a_failure_and_the_next_query_works(
    run_agent: RunAgent,
) -> None:
    def large(body: str, memory: dict[Any, Any]) -> Any:
        return [{"type": "large", "properties": {"text": "x" * int(body)}}], memory

    agent = run_agent(large)
    with pytest.raises(QueryFailed, match=r"did not reach the node.*too large"):
        agent.ask("18000000")
    assert agent.ask("3") == [{"type": "large", "properties": {"text": "xxx"}}]


def test_empty_list_is_a_valid_answer(run_agent: RunAgent) -> None:
    assert run_agent(lambda body, memory: ([], memory)).ask("x") == []


def test_each_thread_gets_the_answer_to_its_own_query(run_agent: RunAgent) -> None:
    agent = run_agent(echo)

    def ask(number: int) -> bool:
        text = "fail" if number % 5 == 0 else str(number)
        try:
            return bool(agent.ask(text)[0]["properties"]["title"] == text)
        except QueryFailed:
            return text == "fail"

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(40)))


def test_handler_may_be_an_object(run_agent: RunAgent) -> None:
    class Agent:
        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return echo(body, memory)

    assert run_agent(Agent()).ask("x") == run_agent(Agent).ask("x")


@pytest.mark.message_text
def test_memory_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 'rum', expected one of"):
        with running(echo, memory="rum"):  # type: ignore[arg-type]
            pass


def test_query_after_the_end_is_an_error() -> None:
    with running(echo) as agent:
        agent.ask("x")
    with pytest.raises(RuntimeError, match="not running"):
        agent.ask("x")


class CloseIsCancelled:
    async def setup(self) -> None:
        self.task = asyncio.create_task(asyncio.sleep(3600))

    async def handle(self, body: str, memory: dict[Any, Any]) -> Any:
        return [], memory

    async def close(self) -> None:
        self.task.cancel()
        await self.task


class CloseFails:
    def handle(self, body: str, memory: dict[Any, Any]) -> Any:
        return [], memory

    def close(self) -> None:
        raise ValueError("no way out")


class CloseHangs(CloseFails):
    def close(self) -> None:
        time.sleep(100)


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("handler", "timeout_s", "error"),
    [
        (CloseIsCancelled, 30, "close.. failed: CancelledError"),
        (CloseFails, 30, "close.. failed: ValueError: no way out"),
        (CloseHangs, 0.2, "close.. has not ended after 0.2 s"),
    ],
)
def test_close_that_fails_or_hangs_fails_the_test(
    handler: type, timeout_s: float, error: str
) -> None:
    with pytest.raises(HandlerFault, match=error):
        with running(handler, timeout_s=timeout_s):
            pass


def test_failure_of_a_test_is_raised_unchanged_after_close() -> None:
    closed = threading.Event()

    class Closes(CloseFails):
        def close(self) -> None:
            closed.set()

    with pytest.raises(AssertionError, match="two is not one"), running(Closes):
        raise AssertionError("two is not one")
    assert closed.is_set()


# --- memory ---


def appends(body: str, memory: dict[Any, Any]) -> Any:
    memory.setdefault("seen", []).append(body)
    if body == "fail":
        raise ValueError("as requested")
    return [], memory


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_memory_is_a_copy_for_the_test(kind: Any, run_agent: RunAgent) -> None:
    agent = run_agent(appends, memory=kind)
    agent.ask("one")
    before = agent.memory
    agent.memory["seen"].append("by the test")
    agent.ask("two")
    assert before == {"seen": ["one"]}
    assert agent.memory == {"seen": ["one", "two"]}


def test_memory_is_read_after_a_running_query(run_agent: RunAgent) -> None:
    changed, go = threading.Event(), threading.Event()

    def changes(body: str, memory: dict[Any, Any]) -> Any:
        memory["count"] = memory.get("count", 0) + 1
        changed.set()
        go.wait(20)
        return [], memory

    agent = run_agent(changes, timeout_s=30)
    with ThreadPoolExecutor(2) as threads:
        threads.submit(agent.ask, "x")
        assert changed.wait(20)
        memory = threads.submit(lambda: agent.memory)
        go.set()
        assert memory.result() == {"count": 1}


def test_agents_with_memory_on_disk_do_not_share_it(run_agent: RunAgent, tmp_path: Path) -> None:
    one, other = run_agent(appends, memory="disk"), run_agent(appends, memory="disk")
    one.ask("one")
    assert (one.memory, other.memory) == ({"seen": ["one"]}, {})
    given = run_agent(appends, memory="disk", state_dir=tmp_path / "given")
    given.ask("x")
    assert list((tmp_path / "given").rglob("*.sqlite"))


# --- results ---


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("result", "error"),
    [
        ("hi", "the result is a str, which nodes drop: they expect a list of embryos"),
        (None, "the result is None, which nodes drop"),
        (b'"hi"', "the result is a str, which nodes drop"),
        ([{"properties": {}}], "embryo 0 is not an object with a 'type'"),
        ([{"type": 1}], "embryo 0 is not an object with a 'type' that is a string"),
        ([{"type": "x"}, 3], "embryo 1 is not an object with a 'type'"),
        ({"title": "x"}, "embryo 0 is not an object with a 'type'"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_result_that_nodes_drop_is_a_failure(
    kind: str, result: Any, error: str, run_agent: RunAgent
) -> None:
    async def returns(body: str, memory: dict[Any, Any]) -> Any:
        return result, memory

    agent = run_agent(returns if kind == "async" else lambda body, memory: (result, memory))
    with pytest.raises(QueryFailed, match=error):
        agent.ask("x")


def test_single_embryo_is_a_valid_result(run_agent: RunAgent) -> None:
    assert run_agent(lambda body, memory: ({"type": "x"}, memory)).ask("x") == [{"type": "x"}]
    assert run_agent(lambda body, memory: (b'[{"type": "x"}]', memory)).ask("x") == [{"type": "x"}]


@pytest.mark.message_text
def test_query_that_cannot_be_sent_fails_and_the_next_one_is_answered(run_agent: RunAgent) -> None:
    agent = run_agent(echo)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        agent.ask("\ud800")
    with pytest.raises(
        QueryFailed, match="the query of 18000000 characters was not answered; is it too large"
    ):
        agent.ask("x" * 18_000_000)
    assert agent.ask("x")[0]["properties"] == {"title": "x"}


# --- Ctrl-C ---


WAITS = """
import asyncio, pathlib, time
def sleeps(body, memory):
    pathlib.Path("begun").touch()
    time.sleep(100)
async def waits(body, memory):
    pathlib.Path("begun").touch()
    await asyncio.sleep(100)
"""


ASKS = "def test_it(run_agent):\n    run_agent('agents.py:{handler}', timeout_s=90).ask('x')\n"
ASKS_ASYNC = """
import asyncio
def test_it(run_agent):
    agent = run_agent('agents.py:{handler}', timeout_s=90)
    asyncio.run(agent.ask_async('x'))
"""


@pytest.mark.parametrize(
    ("asks", "handler"),
    [(ASKS, "sleeps"), (ASKS, "waits"), (ASKS_ASYNC, "waits")],
    ids=["plain", "async", "async-in-async"],
)
def test_ctrl_c_ends_a_test_with_a_hanging_handler(asks: str, handler: str, tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(WAITS)
    (tmp_path / "test_it.py").write_text(asks.format(handler=handler))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for((tmp_path / "begun").exists)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT_S)  # sooner than the handler's 90 s
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in output
    assert process.returncode == 2, output


def wait_for(reached: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


# --- in a test with an event loop ---


@pytest.mark.anyio
async def test_handler_can_query_a_server_in_the_test(run_agent: RunAgent) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    async def forwards(body: str, memory: dict[Any, Any]) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{body}\n".encode())
            return [{"type": (await reader.readline()).decode().strip()}], memory
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await run_agent(forwards).ask_async("fish") == [{"type": "FISH"}]


@pytest.mark.anyio
async def test_query_after_a_cancelled_one_gets_its_own_answer(run_agent: RunAgent) -> None:
    began, cancelled = threading.Event(), threading.Event()

    async def waits_if_asked(body: str, memory: dict[Any, Any]) -> Any:
        began.set()
        while body == "wait" and not cancelled.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        return [{"type": body}], memory

    agent = run_agent(waits_if_asked, timeout_s=30)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(agent.ask_async, "wait")
        await until(began.is_set, "the handler has started")
        tasks.cancel_scope.cancel()
    cancelled.set()
    assert await agent.ask_async("next") == [{"type": "next"}]


# --- imports ---


def project(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def pytest_in(folder: Path, *arguments: str) -> str:
    """Run pytest in a folder. Return its output, with its exit status at the end."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    return f"{ran.stdout}{ran.stderr}\nstatus {ran.returncode}"


class Interrupted(Exception):
    pass


def test_interrupted_setup_leaves_no_agent() -> None:
    class Slow:
        began = threading.Event()
        interrupted = threading.Event()

        def setup(self) -> None:
            self.began.set()
            self.interrupted.wait(20)
            time.sleep(0.3)  # it still runs when the main thread raises

        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return [], memory

    def interrupt(*_: object) -> None:
        raise Interrupted

    def interrupt_the_setup() -> None:
        Slow.began.wait(20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
        Slow.interrupted.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    threads = set(threading.enumerate())
    try:
        threading.Thread(target=interrupt_the_setup).start()
        with pytest.raises(Interrupted), running(Slow):
            raise AssertionError("the setup was not interrupted")
    finally:
        signal.signal(signal.SIGUSR1, before)
    for thread in set(threading.enumerate()) - threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("named", ["'agent:handle'", "agent.handle"])
def test_mock_of_a_test_applies_to_the_handler(named: str, tmp_path: Path) -> None:
    project(
        tmp_path,
        helper="def find(): return 'helper'\n",
        agent="import helper\n"
        "def fetch(): return 'agent'\n"
        "def handle(body, memory): return [{'type': fetch() + helper.find()}], memory\n",
        test_agent="import agent, helper\n"
        "def test_mocked(run_agent, monkeypatch):\n"
        "    monkeypatch.setattr(agent, 'fetch', lambda: 'mocked')\n"
        "    monkeypatch.setattr(helper, 'find', lambda: '!')\n"
        f"    assert run_agent({named}).ask('x') == [{{'type': 'mocked!'}}]\n"
        "def test_not_mocked(run_agent):\n"
        f"    assert run_agent({named}).ask('x') == [{{'type': 'agenthelper'}}]\n"
        "def test_by_name(run_agent, monkeypatch):\n"
        "    monkeypatch.setattr('agent.fetch', lambda: 'mocked')\n"
        f"    assert run_agent({named}).ask('x') == [{{'type': 'mockedhelper'}}]\n",
    )
    output = pytest_in(tmp_path)
    assert "3 passed" in output, output


# --- projects that do not use it ---


@pytest.mark.parametrize("taken", ["worker", "shared/__init__", "disco"])
def test_projects_package_named_like_ours_still_works(taken: str, tmp_path: Path) -> None:
    name = taken.partition("/")[0]
    project(
        tmp_path,
        **{taken: "WORD = 'theirs'\n"},
        test_theirs=f"import {name}\ndef test_it():\n    assert {name}.WORD == 'theirs'\n",
    )
    output = pytest_in(tmp_path)
    assert "1 passed" in output, output


def test_plugin_is_shipped_and_imports_nothing_else_when_it_is_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (plugin,) = project["project"]["entry-points"]["pytest11"].values()
    package = plugin.partition(".")[0]
    assert package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    loads = f"import {plugin}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run(
        [sys.executable, "-c", loads],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert package in ran.stdout.split()
    assert not {"runner", "worker", "shared", "disco"} & set(ran.stdout.split())
