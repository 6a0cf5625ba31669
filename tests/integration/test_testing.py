"""`worker.testing`: what a user's own test is told when a handler hangs, fails, or answers what no node takes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
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

from shared.errors import ConfigError
from tests.cluster import ROOT
from worker.pytest_plugin import RunAgent
from worker.results import HandlerFault
from worker.testing import HandlerFailed, running


def echo(body: str, memory: dict[Any, Any]) -> Any:
    if body == "fail":
        raise ValueError("as it was told")
    return [{"type": "echo", "properties": {"title": body}}], {"asked": memory.get("asked", 0) + 1}


def test_handler_that_hangs_fails_each_query_and_is_never_an_empty_answer(run_agent: RunAgent) -> None:
    def hang(body: str, memory: dict[Any, Any]) -> Any:
        time.sleep(60)

    agent = run_agent(hang, timeout_s=0.2)
    for _ in range(3):
        began_s = time.monotonic()
        with pytest.raises(HandlerFailed, match="took longer than 200 ms"):
            agent.ask("x")
        assert time.monotonic() - began_s < 5


def test_answer_that_no_node_takes_is_a_failure_and_the_next_one_is_had(run_agent: RunAgent) -> None:
    def large(body: str, memory: dict[Any, Any]) -> Any:
        return [{"type": "large", "properties": {"text": "x" * int(body)}}], memory

    agent = run_agent(large)
    with pytest.raises(HandlerFailed, match=r"did not reach the node.*too large"):
        agent.ask("18000000")
    assert agent.ask("3") == [{"type": "large", "properties": {"text": "xxx"}}]


def test_empty_answer_is_an_answer(run_agent: RunAgent) -> None:
    assert run_agent(lambda body, memory: ([], memory)).ask("x") == []


def test_threads_are_each_told_of_their_own_query(run_agent: RunAgent) -> None:
    agent = run_agent(echo)

    def ask(number: int) -> bool:
        text = "fail" if number % 5 == 0 else str(number)
        try:
            return bool(agent.ask(text)[0]["properties"]["title"] == text)
        except HandlerFailed:
            return text == "fail"

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(40)))


def test_object_is_a_handler(run_agent: RunAgent) -> None:
    class Agent:
        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return echo(body, memory)

    assert run_agent(Agent()).ask("x") == run_agent(Agent).ask("x")


def test_memory_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 'rum', expected one of"):
        with running(echo, memory="rum"):  # type: ignore[arg-type]
            pass


def test_asking_after_the_end_is_told() -> None:
    with running(echo) as agent:
        agent.ask("x")
    with pytest.raises(RuntimeError, match="the agent under test runs no more"):
        agent.ask("x")


SWALLOWS = """
import asyncio, time
async def swallow(body="", memory=None):
    while True:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            pass
class Handle:
    async def handle(self, body, memory):
        await swallow()
class Close:
    async def handle(self, body, memory):
        return [], memory
    async def close(self):
        await swallow()
class SetUp(Close):
    async def setup(self):
        await swallow()
async def blocks(body, memory):
    time.sleep(1.6)
    return [{"type": "late"}], memory
async def computes(body, memory):
    ends_s = time.monotonic() + 6  # not for ever: it goes on in this process
    while time.monotonic() < ends_s:
        pass
class CloseIsCancelled(Close):
    async def setup(self):
        self.task = asyncio.create_task(asyncio.sleep(3600))
    async def close(self):
        self.task.cancel()
        await self.task
class CloseFails(Close):
    async def close(self):
        raise ValueError("no way out")
class CloseHangs:
    def handle(self, body, memory):
        return [], memory
    def close(self):
        time.sleep(100)
"""


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("Handle", "took longer than 200 ms|goes on when it is cancelled"),
        ("Close", "close.*goes on when it is cancelled"),
        ("SetUp", "setup.*goes on when it is cancelled"),
        ("blocks", "keeps the event loop"),
        ("computes", "keeps the event loop"),
        ("CloseIsCancelled", "close.. failed: CancelledError"),
        ("CloseFails", "close.. failed: ValueError: no way out"),
        ("CloseHangs", "close.. has not ended after 0.2 s"),
    ],
)
def test_handler_that_does_not_let_go_fails_its_test_and_holds_up_nothing(
    handler: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.testing._PATIENCE_S", 1.0)
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    began_s = time.monotonic()
    with pytest.raises((HandlerFailed, HandlerFault), match=says):
        with running(f"swallows.py:{handler}", folder=tmp_path, timeout_s=0.2, setup_timeout_s=0.2) as agent:
            agent.ask("x")
    assert time.monotonic() - began_s < 15


def test_test_that_fails_fails_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    with pytest.raises(AssertionError, match="of its own"):
        with running("swallows.py:CloseIsCancelled", folder=tmp_path):
            raise AssertionError("of its own")


def test_class_that_wants_arguments_cannot_be_loaded() -> None:
    class Agent:
        def __init__(self, url: str) -> None:
            raise AssertionError

        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return body, memory

    with pytest.raises(ConfigError, match="cannot be made"):
        with running(Agent):
            pass


# --- its memory ---


def appends(body: str, memory: dict[Any, Any]) -> Any:
    memory.setdefault("seen", []).append(body)
    if body == "fail":
        raise ValueError("as it was told")
    return [], memory


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_memory_is_the_tests_own(kind: Any, run_agent: RunAgent) -> None:
    agent = run_agent(appends, memory=kind)
    agent.ask("one")
    before = agent.memory
    agent.memory["seen"].append("by the test")
    agent.ask("two")
    assert before == {"seen": ["one"]}
    assert agent.memory == {"seen": ["one", "two"]}


def test_memory_that_is_looked_at_in_the_midst_of_a_query_is_brought_back_all_the_same(run_agent: RunAgent) -> None:
    changed, go = threading.Event(), threading.Event()

    def changes(body: str, memory: dict[Any, Any]) -> Any:
        memory["count"] = memory.get("count", 0) + 1
        if body == "fail":
            changed.set()
            go.wait(20)
            raise ValueError("as it was told")
        return [], memory

    agent = run_agent(changes, timeout_s=30)
    agent.ask("x")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(agent.ask, "fail")
        assert changed.wait(20)
        assert agent.memory == {"count": 1}
        go.set()
        with pytest.raises(HandlerFailed, match="as it was told"):
            asked.result()
    assert agent.memory == {"count": 1}


def test_agents_with_a_memory_on_disk_have_each_their_own(run_agent: RunAgent, tmp_path: Path) -> None:
    one, other = run_agent(appends, memory="disk"), run_agent(appends, memory="disk")
    one.ask("one")
    assert (one.memory, other.memory) == ({"seen": ["one"]}, {})
    given = run_agent(appends, memory="disk", state_dir=tmp_path / "given")
    given.ask("x")
    assert list((tmp_path / "given").rglob("*.sqlite"))


# --- what it answers ---


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ("hi", "the result is a str, which nodes drop: they expect a list of embryos"),
        (None, "the result is a NoneType, which nodes drop"),
        (b'"hi"', "the result is a str, which nodes drop"),
        ([{"properties": {}}], "embryo 0 has no 'type'"),
        ([{"type": "x"}, 3], "embryo 1 has no 'type'"),
        ({"title": "x"}, "embryo 0 has no 'type'"),
    ],
)
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_result_that_a_node_makes_nothing_of_fails(kind: str, result: Any, says: str, run_agent: RunAgent) -> None:
    async def answers(body: str, memory: dict[Any, Any]) -> Any:
        return result, memory

    agent = run_agent(answers if kind == "async" else lambda body, memory: (result, memory))
    with pytest.raises(HandlerFailed, match=says):
        agent.ask("x")


def test_result_that_is_one_embryo_is_an_answer(run_agent: RunAgent) -> None:
    assert run_agent(lambda body, memory: ({"type": "x"}, memory)).ask("x") == [{"type": "x"}]
    assert run_agent(lambda body, memory: (b'[{"type": "x"}]', memory)).ask("x") == [{"type": "x"}]


def test_query_that_cannot_be_sent_is_told_and_the_next_one_is_answered(run_agent: RunAgent) -> None:
    agent = run_agent(echo)
    with pytest.raises(ValueError, match="the query is no text that can be sent"):
        agent.ask("\ud800")
    with pytest.raises(TypeError, match="ask\\(\\) takes a text, found a bytes"):
        agent.ask(b"x")  # type: ignore[arg-type]
    with pytest.raises(HandlerFailed, match="the query, of 18000000 characters, did not reach the handler; is it too"):
        agent.ask("x" * 18_000_000)
    assert agent.ask("x")[0]["properties"] == {"title": "x"}


# --- a handler that hangs ---


async def blocks(body: str, memory: dict[Any, Any]) -> Any:
    threading.Event().wait(20)


async def swallows(body: str, memory: dict[Any, Any]) -> Any:
    ends_s = time.monotonic() + 30
    while time.monotonic() < ends_s:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)


@pytest.mark.parametrize("handler", [blocks, swallows])
def test_handler_that_is_known_to_hang_costs_the_end_of_the_test_no_time_and_no_other_failure(handler: Any) -> None:
    began_s = time.monotonic()
    with running(handler, timeout_s=0.2) as agent:
        with pytest.raises(HandlerFailed, match=r"the event loop|goes on|longer than 200 ms"):
            agent.ask("x")
        with pytest.raises(HandlerFailed, match=r"took longer|keeps the event loop"):
            agent.ask("x")
    assert time.monotonic() - began_s < 12, "of the 20 s that each waits for one that may still end"


WAITS = """
import asyncio, pathlib, time
def sleeps(body, memory):
    pathlib.Path("begun").touch()
    time.sleep(100)
async def waits(body, memory):
    pathlib.Path("begun").touch()
    await asyncio.sleep(100)
async def blocks(body, memory):
    sleeps(body, memory)
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
    [(ASKS, "sleeps"), (ASKS, "blocks"), (ASKS_ASYNC, "waits"), (ASKS_ASYNC, "blocks")],
    ids=["plain-sleeps", "plain-blocks", "async-waits", "async-blocks"],
)
def test_ctrl_c_ends_a_test_whose_handler_does_not(asks: str, handler: str, tmp_path: Path) -> None:
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
        told, _ = process.communicate(timeout=30)  # not the 90 s and more that it may take
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in told
    assert process.returncode == 2, told


def wait_for(reached: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < ends_s
        time.sleep(0.01)


# --- beside an event loop ---


@pytest.mark.anyio
async def test_server_of_the_tests_own_answers_the_handler_meanwhile(run_agent: RunAgent) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        writer.close()

    async def asks(body: str, memory: dict[Any, Any]) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"{body}\n".encode())
            return [{"type": (await reader.readline()).decode().strip()}], memory
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await run_agent(asks).ask_async("fish") == [{"type": "FISH"}]
        with pytest.raises(HandlerFailed, match=r"ask\(\) has held up the event loop of the test.*ask_async"):
            run_agent(asks, timeout_s=0.3).ask("fish")
        late = run_agent(swallows_nothing, timeout_s=0.1)
        with pytest.raises(HandlerFailed) as told:
            await late.ask_async("x")
        assert "ask_async" not in str(told.value), "it is not at fault there"


@pytest.mark.anyio
async def test_query_that_is_not_waited_for_is_the_last_one(run_agent: RunAgent) -> None:
    agent = run_agent(swallows_nothing, timeout_s=60)
    with anyio.move_on_after(0.1) as limit:
        await agent.ask_async("x")
    assert limit.cancelled_caught
    with pytest.raises(RuntimeError, match="the query before was not waited for"):
        await agent.ask_async("x")


async def swallows_nothing(body: str, memory: dict[Any, Any]) -> Any:
    await asyncio.sleep(30)


# --- whose modules ---


def project(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def pytest_in(folder: Path, *arguments: str) -> str:
    """Run pytest there and return what it says, its exit status last."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return f"{ran.stdout}{ran.stderr}\nstatus {ran.returncode}"


AGENT = """
import helper
def handle(body, memory):
    import later
    return [{'type': helper.WORD + later.WORD}], memory
"""


@pytest.mark.parametrize(
    ("named", "mode"),
    [
        ("agent.py:handle", "prepend"),
        ("agent:handle", "prepend"),
        ("agent:handle", "append"),
        ("agent:handle", "importlib"),
    ],
)
def test_agents_side_by_side_have_each_the_modules_of_their_own_folder(named: str, mode: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        test = f"def test_{name}(run_agent):\n    assert run_agent({named!r}).ask('x') == [{{'type': '{name * 2}'}}]\n"
        word = f"WORD = {name!r}\n"
        project(tmp_path / name, agent=AGENT, helper=word, later=word, **{f"test_{name}": test})
    assert "2 passed" in (told := pytest_in(tmp_path, f"--import-mode={mode}")), told


def test_agents_of_two_folders_at_once_have_each_what_they_import_at_first(run_agent: RunAgent, tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = "import helper\ndef handle(body, memory): return [{'type': helper.WORD}], memory\n"
        project(tmp_path / name, agent=text, helper=f"WORD = {name!r}\n")
    one, other = (run_agent("agent:handle", folder=tmp_path / name) for name in ("a", "b"))
    assert one.ask("x") + other.ask("x") == [{"type": "a"}, {"type": "b"}]


def test_module_of_a_subfolder_is_not_the_folders_own(tmp_path: Path) -> None:
    handler = "import helper\ndef handle(body, memory): return [{'type': helper.WORD}], memory\n"
    project(
        tmp_path / "sub", helper="WORD = 'sub'\n", test_a="import helper\ndef test_a(): assert helper.WORD == 'sub'\n"
    )
    test = "def test_it(run_agent):\n    assert run_agent('main.py:handle').ask('x') == [{'type': 'root'}]\n"
    project(tmp_path, helper="WORD = 'root'\n", main=handler, test_it=test)
    assert "2 passed" in (told := pytest_in(tmp_path, "sub/test_a.py", "test_it.py")), told


class Interrupted(Exception):
    pass


def test_agent_whose_setup_is_interrupted_does_not_stay() -> None:
    class Slow:
        began, closed = threading.Event(), threading.Event()

        def setup(self) -> None:
            self.began.set()
            time.sleep(0.3)

        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return [], memory

        def close(self) -> None:
            self.closed.set()

    def interrupt(*_: object) -> None:
        raise Interrupted

    def when_it_has_begun() -> None:
        Slow.began.wait(20)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    threads = set(threading.enumerate())
    try:
        threading.Thread(target=when_it_has_begun).start()
        with pytest.raises(Interrupted), running(Slow):
            raise AssertionError("it was interrupted before that")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert Slow.closed.wait(20)
    for thread in set(threading.enumerate()) - threads:
        thread.join(20)
        assert not thread.is_alive()


def test_folders_may_be_texts(tmp_path: Path) -> None:
    with running(echo, memory="disk", folder=str(tmp_path), state_dir=str(tmp_path / "state")) as agent:  # type: ignore[arg-type]
        agent.ask("x")
    assert list((tmp_path / "state" / "memory").glob("*.sqlite"))


def test_tests_that_run_are_not_set_aside(run_agent: RunAgent, tmp_path: Path) -> None:
    project(tmp_path / "tests", __init__="", agent="def handle(body, memory): return [], memory\n")
    project(tmp_path, agent="def handle(body, memory): return [], memory\n", conftest="")
    tests = sys.modules["tests"]
    assert run_agent("agent:handle", folder=tmp_path).ask("x") == []
    assert sys.modules["tests"] is tests


def test_modules_and_path_are_afterwards_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        project(tmp_path / name, agent_b=AGENT, helper=f"WORD = {name!r}\n", later=f"WORD = {name!r}\n")
    monkeypatch.syspath_prepend(tmp_path / "a")
    helper = importlib.import_module("helper")
    path, modules = list(sys.path), set(sys.modules)
    try:
        with running("agent_b:handle", folder=tmp_path / "b") as agent:
            assert agent.ask("x") == [{"type": "bb"}]
            assert sys.modules["helper"] is not helper
        assert sys.modules["helper"] is helper, "the test has imported it"
        assert sys.path == path
        assert not [name for name in set(sys.modules) - modules if name in ("agent_b", "later")]
        with running("agent_b.py:handle", folder=tmp_path / "a") as agent:
            assert agent.ask("x") == [{"type": "aa"}]
            assert sys.modules["helper"] is helper
        assert sys.path == path
        assert not [name for name in set(sys.modules) - modules if "agent_b" in name]
    finally:
        del sys.modules["helper"]


@pytest.mark.parametrize("named", ["agent.py:handle", "agent:handle"])
def test_what_a_test_replaces_is_replaced_for_the_handler(named: str, tmp_path: Path) -> None:
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
        f"    assert run_agent({named!r}).ask('x') == [{{'type': 'mocked!'}}]\n"
        "def test_as_it_was(run_agent):\n"
        f"    assert run_agent({named!r}).ask('x') == [{{'type': 'agenthelper'}}]\n"
        "def test_by_name(run_agent, monkeypatch):\n"
        "    monkeypatch.setattr('agent.fetch', lambda: 'mocked')\n"
        f"    assert run_agent({named!r}).ask('x') == [{{'type': 'mockedhelper'}}]\n",
    )
    assert "3 passed" in (told := pytest_in(tmp_path)), told


# --- in projects that have nothing to do with it ---


@pytest.mark.parametrize("taken", ["worker", "shared/__init__", "disco"])
def test_project_with_a_package_of_our_names_is_left_alone_and_told_when_it_wants_the_fixture(
    taken: str, tmp_path: Path
) -> None:
    name = taken.partition("/")[0]
    project(
        tmp_path,
        **{taken: "WORD = 'theirs'\n"},
        test_theirs=f"import {name}\ndef test_it():\n    assert {name}.WORD == 'theirs'\n",
    )
    assert "1 passed" in (told := pytest_in(tmp_path, "test_theirs.py")), told
    project(tmp_path, test_ours="def test_it(run_agent):\n    pass\n")
    told = pytest_in(tmp_path)
    assert "1 passed, 1 error" in told
    file = tmp_path / f"{taken}.py"
    assert f"run_agent needs em-runner's own package {name!r}, but Python finds {file} by that name" in told
    assert "Traceback" not in told


def test_plugin_is_shipped_and_imports_nothing_of_ours_when_it_is_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (plugin,) = project["project"]["entry-points"]["pytest11"].values()
    assert f"{plugin}.py" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    loads = f"import {plugin}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", loads], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert plugin in ran.stdout.split()
    assert not {"runner", "worker", "shared", "disco"} & set(ran.stdout.split())
