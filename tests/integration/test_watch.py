"""`em-runner run --reload`: a saved handler replaces only its own workers."""

from __future__ import annotations

import contextlib
import itertools
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
    "raises": (
        "VERSION = 'x'\nVERSION += 1\n" + HANDLER,
        "TypeError: can only concatenate",
        "line 2",
    ),
    "attribute": (
        "VERSION = 'x'\ndef other(body, memory): pass\n",
        "has no 'handle'; it has other",
        "",
    ),
    "empty": ("", "has no 'handle'", ""),
}


def handler(version: object) -> str:
    return f"VERSION = {version!r}\n{HANDLER}"


def waiting(version: int) -> str:
    """Return a handler that waits until the file exists that a query names."""
    return f"""VERSION = {version}
import pathlib, time
def handle(body, memory):
    if body.startswith("/"):
        pathlib.Path(body + ".begun").touch()
        while not pathlib.Path(body).exists():
            time.sleep(0.005)
    properties = {{"version": VERSION, "begun": pathlib.Path(body).name}}
    return {{"type": "t", "properties": properties}}, memory
"""


def hanging_setup(begun: Path) -> str:
    """Return a handler whose setup creates a file and then hangs."""
    return f"""
import pathlib, time
class A:
    def setup(self):
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(1000)
    def handle(self, body, memory):
        return body, memory
handle = A
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
    """Return whether a process watches files."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(fd.readlink()))
    return "anon_inode:inotify" in found


SAVES = [write, rename, in_pieces]


@asynccontextmanager
async def watched(folder: Path, *agents: str, **options: Any) -> AsyncIterator[Cluster]:
    async with cluster(folder, *agents, options=("--reload",), **options) as running:
        await until(lambda: running.events("watching"), "the runner watches files")
        await running.wait_ready()
        yield running


async def wait_for_version(running: Cluster, version: object, **named: str) -> None:
    async def answered() -> bool:
        return (await running.results("x", **named))["properties"]["version"] == version

    await until(answered, f"version {version} answers\n{running.log[-3000:]}")


async def settled(running: Cluster, number: int) -> None:
    """Wait until this many handlers were reloaded, and their workers are ready."""
    await until(
        lambda: len(running.events("handler_reloaded")) >= number,
        f"{number} handlers are reloaded\n{running.log}",
    )
    await running.wait_ready()


@pytest.mark.parametrize("save", SAVES)
async def test_saved_handler_replaces_only_its_own_workers(
    save: Callable[[Path, str], None], tmp_path: Path, node: Node, other_node: Node
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.py", handler("one"))
    agents = (
        agent("a", [node.url, other_node.url], handler="a/a.py:handle"),
        agent("b", [node.url], handler="b/b.py:handle", memory="disk"),
    )
    async with watched(tmp_path, *agents) as running:
        for name in ("a", "a", "b"):
            await running.results("x", agent=name)
        before = await running.rows()
        save(tmp_path / "a" / "a.py", handler("two"))
        await settled(running, 1)
        found = await running.results("x", agent="a")
        assert found["properties"] == {"version": "two", "count": 3}, "its memory was handed over"
        after = await running.rows()
        for name in ("a_server", "a_server_2"):
            assert after[name]["pid"] != before[name]["pid"]
            assert after[name]["restarts"] == 0, "a replacement does not count as a restart"
        assert after["b_server"]["pid"] == before["b_server"]["pid"]
        assert (await running.results("x", agent="b"))["properties"] == {
            "version": "one",
            "count": 2,
        }
        save(tmp_path / "b" / "b.py", handler("two"))
        await settled(running, 2)
        assert (await running.results("x", agent="b"))["properties"] == {
            "version": "two",
            "count": 3,
        }
        assert len(running.events("worker_replaced")) == 3
        assert running.events("handler_reloaded")[0]["workers"] == ["a_server", "a_server_2"]
        assert not running.events("worker_restarting")
        assert await running.stop(signal.SIGINT) == 0
        await running.wait_exited()
        assert "Traceback" not in running.log


@pytest.mark.message_text
@pytest.mark.parametrize("how", BROKEN)
async def test_error_for_a_broken_handler_is_one_line_with_its_location(
    how: str, tmp_path: Path, node: Node
) -> None:
    text, error, line = BROKEN[how]
    file = tmp_path / "handlers.py"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(file, text)
        await until(lambda: running.events("handler_not_reloaded"), "the error is logged")
        (logged,) = running.events("handler_not_reloaded")
        assert error in logged["reason"]
        assert line in logged["reason"]
        assert str(file) in logged["reason"]
        assert running.log.count(error) == 1


@pytest.mark.parametrize("how", BROKEN)
async def test_broken_handler_is_logged_once_and_leaves_the_old_worker_running(
    how: str, tmp_path: Path, node: Node
) -> None:
    text, _, _ = BROKEN[how]
    file = tmp_path / "handlers.py"
    agents = [agent(name, [node.url]) for name in ("a", "b")]
    async with watched(tmp_path, *agents, handlers=handler("one")) as running:
        before = await running.rows()
        write(file, text)
        await until(lambda: running.events("handler_not_reloaded"), "the error is logged")
        assert (await running.results("x", agent="a"))["properties"] == {
            "version": "one",
            "count": 1,
        }
        (logged,) = running.events("handler_not_reloaded")
        assert logged["file"] == str(file)
        assert logged["agents"] == ["a", "b"]
        assert {row["pid"] for row in (await running.rows()).values()} == {
            row["pid"] for row in before.values()
        }
        write(file, handler("two"))
        await settled(running, 1)
        assert (await running.results("x", agent="a"))["properties"] == {
            "version": "two",
            "count": 2,
        }
        assert len(running.events("worker_replaced")) == 2
        assert not running.events("worker_restarting")


async def test_failed_setup_of_a_saved_handler_leaves_the_old_worker_running(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    broken = "class Broken:\n    def setup(self):\n        raise OSError('closed')\n"
    broken += "    def handle(self, body, memory):\n"
    async with watched(
        tmp_path, agent("a", [node.url, other_node.url]), handlers=handler("one")
    ) as running:
        await running.wait_state("a_server_2", "ready")
        pid = await running.worker_pid("a_server")
        write(tmp_path / "handlers.py", f"{broken}        return body, memory\nhandle = Broken\n")
        await until(lambda: running.events("handler_not_reloaded"), "the error is logged")
        (logged,) = running.events("handler_not_reloaded")
        assert logged["workers"] == ["a_server", "a_server_2"]
        assert "OSError: closed" in logged["reason"]
        assert not running.events("replacement_failed")
        assert not running.events("worker_fault")
        assert await running.worker_pid("a_server") == pid
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")


async def test_hanging_setup_does_not_delay_a_later_save(tmp_path: Path, node: Node) -> None:
    begun = tmp_path / "begun"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "handlers.py", hanging_setup(begun))
        await until(begun.exists, "the setup of the successor has started")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")
        assert not running.events("handler_not_reloaded"), (
            "a failure of outdated code is not logged"
        )


async def test_hanging_import_does_not_delay_a_later_save(tmp_path: Path, node: Node) -> None:
    begun = tmp_path / "begun"
    hangs = f"import pathlib, time\npathlib.Path({str(begun)!r}).touch()\ntime.sleep(1000)\n"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "handlers.py", hangs)
        await until(begun.exists, "the import has started")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "handlers.py", handler("two"))
        await wait_for_version(running, "two")
        assert not running.events("handler_not_reloaded"), (
            "a failure of outdated code is not logged"
        )


async def test_hanging_setup_of_a_new_configuration_does_not_delay_a_save(
    tmp_path: Path, node: Node
) -> None:
    begun = tmp_path / "begun"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "d.py", hanging_setup(begun))
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text().replace("handlers.py:handle", "d.py:handle"))
        await until(begun.exists, "the setup of the successor has started")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "d.py", handler("two"))
        await wait_for_version(running, "two")
        await until(lambda: running.events("reloaded"), "the configuration is applied")


async def test_rejected_configuration_is_applied_after_its_handler_is_fixed(
    tmp_path: Path, node: Node
) -> None:
    fails = "class A:\n    def setup(self):\n        raise OSError('closed')\n"
    fails += "    def handle(self, body, memory):\n"
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler("one")) as running:
        write(tmp_path / "d.py", fails + "        return body, memory\nhandle = A\n")
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text().replace("handlers.py:handle", "d.py:handle"))
        await until(lambda: running.events("reload_incomplete"), "the new handler fails")
        assert (await running.results("x"))["properties"]["version"] == "one"
        write(tmp_path / "d.py", handler("two"))
        await wait_for_version(running, "two")


async def test_memory_is_handed_over_although_close_is_cancelled(
    tmp_path: Path, node: Node
) -> None:
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
        assert not running.events("worker_fault")


async def test_rapid_saves_cause_one_replacement(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(0)) as running:
        saved_s = []
        for number in range(1, 13):
            write(tmp_path / "handlers.py", handler(number))
            saved_s.append(time.monotonic())
            await anyio.sleep(0.03)
        await wait_for_version(running, 12)
        # On a slow machine there may be a pause between two saves, which are then two changes.
        pauses = [later - earlier > 0.1 for earlier, later in itertools.pairwise(saved_s)]
        assert len(running.events("worker_replaced")) <= 2 + sum(pauses)


async def test_change_in_a_shared_folder_replaces_the_workers_of_all_its_handlers(
    tmp_path: Path, node: Node
) -> None:
    package = tmp_path / "agents"
    package.mkdir()
    write(
        package / "__init__.py",
        "import sys\n"
        "assert 'runner.supervision.supervisor' not in sys.modules, 'not in the runner'\n",
    )
    write(package / "echo.py", "from .words import VERSION\n" + HANDLER)
    write(package / "words.py", "VERSION = 1\n")
    echo = agent("echo", [node.url], handler="agents.echo:handle")
    async with watched(
        tmp_path, echo, agent("other", [node.url]), handlers=handler("one")
    ) as running:
        other = await running.worker_pid("other_server")
        write(package / "words.py", "VERSION = 2\n")
        await settled(running, 2)
        await wait_for_version(running, 2, agent="echo")
        assert await running.worker_pid("other_server") != other
        write(package / "words.py", "from .more import VERSION\n")
        await until(lambda: running.events("handler_not_reloaded"), "the module `more` is missing")
        write(package / "more.py", "VERSION = 3\n")
        await wait_for_version(running, 3, agent="echo")


async def test_burst_of_saves_causes_one_replacement(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(0)) as running:
        began_s = time.monotonic()
        for version in range(1, 31):
            SAVES[version % 3](tmp_path / "handlers.py", handler(version))
        took_s = time.monotonic() - began_s
        await wait_for_version(running, 30)
        await settled(running, 1)
        # On a slow machine the burst takes longer, and may cause several replacements.
        assert len(running.events("worker_replaced")) <= 1 + took_s // 0.1


async def test_saves_of_equal_size_within_a_second_are_noticed(tmp_path: Path, node: Node) -> None:
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


async def test_save_during_a_replacement_loses_neither_itself_nor_queries(
    tmp_path: Path, node: Node
) -> None:
    file, go = tmp_path / "handlers.py", tmp_path / "go"
    async with watched(tmp_path, agent("a", [node.url]), handlers=waiting(1)) as running:
        answers: list[Any] = []

        async def ask(body: str) -> None:
            answers.append((await running.results(body))["properties"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, str(go))
            await until((tmp_path / "go.begun").exists, "the handler has the query")
            write(file, waiting(2))
            await until(lambda: running.events("worker_replaced"), "the replacement has started")
            tasks.start_soon(ask, "x")  # held during the hand-over
            write(file, waiting(3))
            write(go, "")
        await wait_for_version(running, 3)
        assert {"version": 1, "begun": "go"} in answers
        assert len(answers) == 2


async def test_save_during_a_reload_does_not_restore_the_old_configuration(
    tmp_path: Path, node: Node
) -> None:
    file, config, go = tmp_path / "handlers.py", tmp_path / "em-runner.toml", tmp_path / "go"
    async with watched(tmp_path, agent("a", [node.url]), handlers=waiting(1)) as running:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.results, str(go))
            await until((tmp_path / "go.begun").exists, "the handler has the query")
            rename(config, config.read_text() + 'capabilities = ["new"]\n')
            await until(lambda: running.events("worker_replaced"), "the replacement has started")
            write(file, waiting(2))
            await until(lambda: running.events("handler_changed"), "the change is noticed")
            write(go, "")
        await wait_for_version(running, 2)
        await settled(running, 1)
        await until(
            lambda: [each.capabilities for each in node.registry.agents()] == [("new",)],
            "the new capabilities are registered",
        )
        await running.wait_ready()
        assert [each.capabilities for each in node.registry.agents()] == [("new",)]


async def test_saved_configuration_is_applied_and_its_handlers_are_watched(
    tmp_path: Path, node: Node
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.py", handler("one"))
    one, two = (agent(name, [node.url], handler=f"{name}/{name}.py:handle") for name in ("a", "b"))
    async with watched(tmp_path, one) as running:
        before = await running.row("a_server")
        file = tmp_path / "em-runner.toml"
        rename(file, file.read_text() + two)
        await until(lambda: running.events("reloaded"), "the configuration is applied")
        await running.wait_state("b_server", "ready")
        write(tmp_path / "b" / "b.py", handler("two"))
        await wait_for_version(running, "two", agent="b")
        assert (await running.row("a_server"))["pid"] == before["pid"]
        write(tmp_path / "a" / "a.py", handler("two"))
        await wait_for_version(running, "two", agent="a")
        rename(file, "nonsense")
        await until(lambda: running.events("reload_refused"), "the reload is refused")
        assert await running.ready()


async def test_failed_worker_starts_immediately_when_its_handler_is_fixed(
    tmp_path: Path, node: Node
) -> None:
    file = tmp_path / "handlers.py"
    supervision = "max_restarts = 1"
    async with watched(
        tmp_path, agent("a", [node.url]), handlers=handler(1), supervision=supervision
    ) as running:
        write(file, "raise ValueError('broken')")
        await until(lambda: running.events("handler_not_reloaded"), "the error is logged")
        os.kill(await running.worker_pid("a_server"), signal.SIGKILL)
        failed = await running.wait_state("a_server", "failed")
        write(file, handler(2))
        # Without the change a failed worker would start after 60 s.
        await running.wait_state("a_server", "ready")
        await wait_for_version(running, 2)
        assert (await running.row("a_server"))["restarts"] == failed["restarts"]


async def test_nothing_is_watched_without_the_option(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handler(1)) as running:
        await running.wait_ready()
        assert not watches(running.process.pid)
        assert not running.events("watching")


async def test_only_the_runner_watches_files(tmp_path: Path, node: Node) -> None:
    async with watched(tmp_path, agent("a", [node.url]), handlers=handler(1)) as running:
        await until(lambda: watches(running.process.pid), "the runner watches files")
        assert not watches(await running.worker_pid("a_server"))
