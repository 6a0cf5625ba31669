"""`em-runner run --reload`: a handler that is saved replaces its own workers, and no other."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from disco import Node
from tests.cluster import Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio

HANDLER = """
def handle(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"version": VERSION, "count": count}}, {"count": count}
"""
BROKEN = {
    "syntax": ("VERSION = 'x'\ndef (", "SyntaxError: invalid syntax", "line 2"),
    "raises": ("VERSION = 'x'\nVERSION += 1\n" + HANDLER, "TypeError: can only concatenate", "line 2"),
    "attribute": ("VERSION = 'x'\ndef other(body, memory): pass\n", "has no 'handle'; it has other", ""),
    "empty": ("", "has no 'handle'", ""),
}


def handler(version: object) -> str:
    return f"VERSION = {version!r}\n{HANDLER}"


def waiting(version: int) -> str:
    """A handler whose query may be a file's name, which is waited for."""
    return f"""VERSION = {version}
import pathlib, time
def handle(body, memory):
    if body.startswith("/"):
        pathlib.Path(body + ".begun").touch()
        while not pathlib.Path(body).exists():
            time.sleep(0.005)
    return {{"type": "t", "properties": {{"version": VERSION, "begun": pathlib.Path(body).name}}}}, memory
"""


def write(file: Path, text: str) -> None:
    file.write_text(text)


def rename(file: Path, text: str) -> None:
    other = file.with_name(f".{file.name}.swp")
    other.write_text(text)
    other.replace(file)


def in_pieces(file: Path, text: str) -> None:
    with file.open("w") as stream:
        for line in text.splitlines(keepends=True):
            stream.write(line)
            stream.flush()


def watches(pid: int) -> bool:
    """Whether a process has the kernel tell it of changes."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(fd.readlink()))
    return "anon_inode:inotify" in found


SAVES = [write, rename, in_pieces]


@asynccontextmanager
async def watched(folder: Path, *agents: str, **options: Any) -> AsyncIterator[Cluster]:
    async with cluster(folder, *agents, options=("--reload",), **options) as running:
        await until(lambda: running.events("watching"), "it watches")
        await running.wait_ready()
        yield running


async def wait_for_version(running: Cluster, version: object, **named: str) -> None:
    async def answered() -> bool:
        return (await running.results("x", **named))["properties"]["version"] == version

    await until(answered, f"version {version} answers\n{running.log[-3000:]}")


async def settled(running: Cluster, number: int) -> None:
    """Wait until so many handlers were reloaded, and their workers are ready."""
    await until(lambda: len(running.events("handler_reloaded")) >= number, f"{number} are reloaded\n{running.log}")
    await running.wait_ready()


@pytest.mark.parametrize("save", SAVES)
async def test_saved_handler_replaces_its_own_workers_and_no_other(
    save: Callable[[Path, str], None], tmp_path: Path, node: Node, other_node: Node
) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.py", handler("one"))
    agents = (
        agent("a", [node.url, other_node.url], handler="a.py:handle"),
        agent("b", [node.url], handler="b.py:handle", memory="disk"),
    )
    async with watched(tmp_path, *agents) as running:
        for name in ("a", "a", "b"):
            await running.results("x", agent=name)
        before = await running.rows()
        save(tmp_path / "a.py", handler("two"))
        await settled(running, 1)
        found = await running.results("x", agent="a")
        assert found["properties"] == {"version": "two", "count": 3}, "its memory was handed over"
        after = await running.rows()
        for name in ("a_server", "a_server_2"):
            assert after[name]["pid"] != before[name]["pid"]
            assert after[name]["restarts"] == 0, "a replacement is no restart"
        assert after["b_server"]["pid"] == before["b_server"]["pid"]
        assert (await running.results("x", agent="b"))["properties"] == {"version": "one", "count": 2}
        save(tmp_path / "b.py", handler("two"))
        await settled(running, 2)
        assert (await running.results("x", agent="b"))["properties"] == {"version": "two", "count": 3}
        assert len(running.events("worker_replaced")) == 3
        assert running.events("handler_reloaded")[0]["workers"] == ["a_server", "a_server_2"]
        assert not running.events("worker_restarting")
        assert await running.stop(signal.SIGINT) == 0
        await running.gone()
        assert "Traceback" not in running.log


@pytest.mark.parametrize("how", BROKEN)
async def test_broken_file_leaves_the_old_worker_at_work_and_is_told_in_one_line_until_it_is_mended(
    how: str, tmp_path: Path, node: Node
) -> None:
    text, error, line = BROKEN[how]
    file = tmp_path / "handlers.py"
    agents = [agent(name, [node.url]) for name in ("a", "b")]
    async with watched(tmp_path, *agents, handlers=handler("one")) as running:
        before = await running.rows()
        write(file, text)
        await until(lambda: running.events("handler_not_reloaded"), "it is told")
        assert (await running.results("x", agent="a"))["properties"] == {"version": "one", "count": 1}
        (told,) = running.events("handler_not_reloaded")
        assert told["file"] == str(file)
        assert told["agents"] == ["a", "b"]
        assert error in told["error"]
        assert line in told["error"]
        assert str(file) in told["error"]
        assert [line for line in running.log.splitlines() if error in line] != []
        assert len([line for line in running.log.splitlines() if error in line]) == 1, running.log
        assert {row["pid"] for row in (await running.rows()).values()} == {row["pid"] for row in before.values()}
        write(file, handler("two"))
        await settled(running, 1)
        assert (await running.results("x", agent="a"))["properties"] == {"version": "two", "count": 2}
        assert len(running.events("worker_replaced")) == 2
        assert not running.events("worker_restarting")


async def test_handler_whose_setup_fails_leaves_the_old_worker_at_work(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    broken = (
        "class Broken:\n    def setup(self):\n        raise OSError('closed')\n    def handle(self, body, memory):\n"
    )
    async with watched(tmp_path, agent("a", [node.url, other_node.url]), handlers=handler("one")) as running:
        await running.wait_state("a_server_2", "ready")
        pid = await running.worker_pid("a_server")
        write(tmp_path / "handlers.py", f"{broken}        return body, memory\nhandle = Broken\n")
        await until(lambda: running.events("handler_not_reloaded"), "it is told")
        (told,) = running.events("handler_not_reloaded")
        assert told["workers"] == ["a_server", "a_server_2"]
        assert told["error"] == "the handler's setup() failed: OSError: closed"
        assert not running.events("replacement_failed")
        assert not running.events("worker_crashed"), "a handler that fails is no fault of a worker's"
        assert await running.worker_pid("a_server") == pid
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")


async def test_setup_that_hangs_holds_up_no_later_save(tmp_path: Path, node: Node) -> None:
    hangs = (
        "import time\nclass A:\n    def setup(self):\n        time.sleep(1000)\n    def handle(self, body, memory):\n"
    )
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "handlers.py", hangs + "        return body, memory\nhandle = A\n")
        await until(lambda: len(running.events("worker_started")) == 2, "a successor is being started")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")
        assert not running.events("handler_not_reloaded"), "it was out of date"


async def test_import_that_hangs_holds_up_no_later_save(tmp_path: Path, node: Node) -> None:
    begun = tmp_path / "begun"
    hangs = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(1000)\n"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "handlers.py", hangs)
        await until(begun.exists, "it is being imported")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")
        assert not running.events("handler_not_reloaded"), "it was out of date"


async def test_setup_that_hangs_in_a_new_configuration_holds_up_no_later_save(tmp_path: Path, node: Node) -> None:
    hangs = (
        "import time\nclass A:\n    def setup(self):\n        time.sleep(1000)\n    def handle(self, body, memory):\n"
    )
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "d.py", hangs + "        return body, memory\nhandle = A\n")
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text().replace("handlers.py:handle", "d.py:handle"))
        await until(lambda: len(running.events("worker_started")) == 2, "a successor is being started")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "d.py", handler("two"))
        await wait_for_version(running, "two")
        await until(lambda: running.events("reloaded"), "the configuration is applied")


async def test_configuration_that_a_broken_handler_kept_from_being_applied_is_once_it_is_mended(
    tmp_path: Path, node: Node
) -> None:
    fails = "class A:\n    def setup(self):\n        raise OSError('closed')\n    def handle(self, body, memory):\n"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "d.py", fails + "        return body, memory\nhandle = A\n")
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text().replace("handlers.py:handle", "d.py:handle"))
        await until(lambda: running.events("reload_incomplete"), "its handler does not come up")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "d.py", handler("two"))
        await wait_for_version(running, "two")


async def test_memory_is_handed_over_although_a_close_ends_in_a_cancellation(tmp_path: Path, node: Node) -> None:
    text = """
import asyncio
class A:
    async def setup(self):
        self.task = asyncio.create_task(asyncio.sleep(3600))
    async def close(self):
        self.task.cancel()
        await self.task
    async def handle(self, body, memory):
        count = memory.get("count", 0) + 1
        return {"type": "t", "properties": {"version": 1, "count": count}}, {"count": count}
handle = A
"""
    async with watched(tmp_path, agent("a", [node.url]), handlers=text) as running:
        await running.results("x")
        write(tmp_path / "handlers.py", text.replace('"version": 1', '"version": 2'))
        await settled(running, 1)
        assert (await running.results("x"))["properties"] == {"version": 2, "count": 2}
        assert running.events("close_failed")
        assert not running.events("worker_crashed")


async def test_many_saves_in_a_moment_replace_once(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(0)) as running:
        for number in range(1, 13):
            write(tmp_path / "handlers.py", handler(number))
            await anyio.sleep(0.03)
        await wait_for_version(running, 12)
        # A machine that is held up for longer than a moment between two saves may take them for two.
        assert len(running.events("worker_replaced")) <= 2


async def test_handler_named_as_a_module_is_watched_with_the_modules_beside_it_that_it_imports(
    tmp_path: Path, node: Node
) -> None:
    package = tmp_path / "agents"
    package.mkdir()
    write(package / "__init__.py", "import sys\nassert 'runner.supervisor' not in sys.modules, 'not in the runner'\n")
    write(package / "echo.py", "from .words import VERSION\n" + HANDLER)
    write(package / "words.py", "from numbers_of import VERSION\n")
    write(tmp_path / "numbers_of.py", "VERSION = 1\n")
    write(package / "unused.py", "")
    echo = agent("echo", [node.url], handler="agents.echo:handle")
    async with watched(tmp_path, echo, agent("other", [node.url]), handlers=handler("one")) as running:
        other = await running.worker_pid("other_server")
        write(package / "unused.py", "# changed")
        write(package / "echo.py", "from .words import VERSION\nVERSION += 1\n" + HANDLER)
        await settled(running, 1)
        await wait_for_version(running, 2, agent="echo")
        write(tmp_path / "numbers_of.py", "VERSION = 2\n")
        await settled(running, 2)
        await wait_for_version(running, 3, agent="echo")
        write(package / "words.py", "from .more import VERSION\n")
        await until(lambda: running.events("handler_not_reloaded"), "there is no such module yet")
        write(package / "more.py", "VERSION = 9\n")
        await settled(running, 3)
        await wait_for_version(running, 10, agent="echo")
        assert await running.worker_pid("other_server") == other


async def test_burst_of_saves_is_one_replacement(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(0)) as running:
        began_s = time.monotonic()
        for version in range(1, 31):
            SAVES[version % 3](tmp_path / "handlers.py", handler(version))
        took_s = time.monotonic() - began_s
        await wait_for_version(running, 30)
        await settled(running, 1)
        # One, but where the machine held this test up for longer than an editor's burst takes.
        assert len(running.events("worker_replaced")) <= 1 + took_s // 0.1


async def test_saves_within_a_second_and_of_one_size_are_told_apart(tmp_path: Path, node: Node) -> None:
    file = tmp_path / "handlers.py"
    write(file, handler("1"))
    second_ns = file.stat().st_mtime_ns // 10**9 * 10**9
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("1")) as running:
        for number in range(2, 5):
            rename(file, handler(str(number)))
            os.utime(file, ns=(second_ns, second_ns + number))
            await wait_for_version(running, str(number))
            await running.wait_ready()
        assert not (tmp_path / "__pycache__").exists()


async def test_save_during_a_replacement_is_not_lost_and_no_query_is(tmp_path: Path, node: Node) -> None:
    file, go = tmp_path / "handlers.py", tmp_path / "go"
    async with watched(tmp_path, agent("a", [node.url]), handlers=waiting(1)) as running:
        answers: list[Any] = []

        async def ask(body: str) -> None:
            answers.append((await running.results(body))["properties"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, str(go))
            await until((tmp_path / "go.begun").exists, "the handler has it")
            write(file, waiting(2))
            await until(lambda: running.events("worker_replaced"), "the old one is asked to leave")
            tasks.start_soon(ask, "x")  # held while one hands over to the other
            write(file, waiting(3))
            write(go, "")
        await wait_for_version(running, 3)
        assert {"version": 1, "begun": "go"} in answers
        assert len(answers) == 2


async def test_save_while_a_configuration_is_applied_does_not_bring_the_former_one_back(
    tmp_path: Path, node: Node
) -> None:
    file, config, go = tmp_path / "handlers.py", tmp_path / "em-runner.toml", tmp_path / "go"
    async with watched(tmp_path, agent("a", [node.url]), handlers=waiting(1)) as running:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.results, str(go))
            await until((tmp_path / "go.begun").exists, "the handler has it")
            rename(config, config.read_text() + 'capabilities = ["new"]\n')
            await until(lambda: running.events("worker_replaced"), "the old one is asked to leave")
            write(file, waiting(2))
            await until(lambda: running.events("handler_changed"), "it is seen")
            write(go, "")
        await wait_for_version(running, 2)
        await settled(running, 1)
        await until(lambda: [each.capabilities for each in node.registry.agents()] == [("new",)], "it is registered")
        await running.wait_ready()
        assert [each.capabilities for each in node.registry.agents()] == [("new",)]


async def test_configuration_that_is_saved_is_applied_and_its_handlers_are_watched(tmp_path: Path, node: Node) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.py", handler("one"))
    one, two = (agent(name, [node.url], handler=f"{name}.py:handle") for name in ("a", "b"))
    async with watched(tmp_path, one) as running:
        before = await running.row("a_server")
        file = tmp_path / "em-runner.toml"
        rename(file, file.read_text() + two)
        await until(lambda: running.events("reloaded"), "it is applied")
        await running.wait_state("b_server", "ready")
        write(tmp_path / "b.py", handler("two"))
        await wait_for_version(running, "two", agent="b")
        assert (await running.row("a_server"))["pid"] == before["pid"]
        write(tmp_path / "a.py", handler("two"))
        await wait_for_version(running, "two", agent="a")
        rename(file, "nonsense")
        await until(lambda: running.events("reload_refused"), "it is refused")
        assert await running.ready()


async def test_worker_that_failed_is_started_at_once_when_its_handler_is_mended(tmp_path: Path, node: Node) -> None:
    file = tmp_path / "handlers.py"
    supervision = "max_restarts = 1"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(1), supervision=supervision) as running:
        write(file, "raise ValueError('broken')")
        await until(lambda: running.events("handler_not_reloaded"), "it is told")
        os.kill(await running.worker_pid("a_server"), signal.SIGKILL)
        failed = await running.wait_state("a_server", "failed")
        write(file, handler(2))
        await running.wait_state("a_server", "ready")  # well before the 60 s that a failed one waits
        await wait_for_version(running, 2)
        assert (await running.row("a_server"))["restarts"] == failed["restarts"]


async def test_without_the_option_nothing_is_watched(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handler(1)) as running:
        await running.wait_ready()
        assert not watches(running.process.pid)
        assert not running.events("watching")


async def test_runner_alone_watches(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(1)) as running:
        await until(lambda: watches(running.process.pid), "it has asked the kernel")
        assert not watches(await running.worker_pid("a_server"))
