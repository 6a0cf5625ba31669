"""Files that are corrupt, not ours or cannot be written, and descriptors that run out: said clearly, survived."""

from __future__ import annotations

import asyncio
import os
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from disco import Node
from runner import descriptors
from runner.state_dir import read_address
from shared.http_connection import HttpLimits
from shared.http_server import HttpServer, listen, resolve
from tests.chaos.load import ECHO, Client, all_ready, ask_once, http_load, report
from tests.cluster import COUNTER, ROOT, agent, alive, cluster, until
from worker.disk_memory import DiskMemory

pytestmark = pytest.mark.anyio


def filled(path: Path) -> None:
    """Make a memory with something in it, several pages long."""
    memory = DiskMemory(path)
    memory.open()
    memory.checkout()
    memory.commit({"count": 41, "more": "x" * 20_000})
    memory.flush()
    memory.close()


def corrupt(path: Path) -> None:
    filled(path)
    data = bytearray(path.read_bytes())
    data[4096:12_288] = os.urandom(8192)
    path.write_bytes(data)


def truncated(path: Path) -> None:
    filled(path)
    path.write_bytes(path.read_bytes()[:6000])


def foreign(path: Path) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute("CREATE TABLE memory (data BLOB)")
        database.execute("INSERT INTO memory VALUES ('somebody else''s')")
    database.close()


def no_database(path: Path) -> None:
    path.write_bytes(b"my shopping list\n" * 500)


def file_of(agent: str, node: Node, folder: Path) -> Path:
    return folder / "state" / "memory" / f"{agent}@127.0.0.1_{node.port}.sqlite"


@pytest.mark.parametrize("spoil", [corrupt, truncated, foreign, no_database])
async def test_file_that_cannot_be_the_memory_is_moved_aside_and_kept(
    spoil: Callable[[Path], None], tmp_path: Path, node: Node
) -> None:
    file = file_of("e", node, tmp_path)
    file.parent.mkdir(parents=True, mode=0o700)
    file.parent.parent.chmod(0o700)
    spoil(file)
    before = file.read_bytes()
    async with cluster(tmp_path, agent("e", [node.url], memory="disk")) as running:
        await all_ready(running)
        assert (await running.results("x"))["properties"]["count"] == 1, "it starts empty"
        (said,) = running.events("memory_moved_aside")
        assert said["level"] == "error"
        assert said["file"] == str(file)
        assert said["why"]
        assert "empty memory" in said["do"]
        (aside,) = file.parent.glob("*.aside-*[0-9]")
        assert said["to"] == str(aside)
        assert aside.read_bytes() == before, "nothing was changed in it"
        assert not running.events("worker_restarting")


async def test_memory_that_cannot_be_opened_is_said_and_tried_again(tmp_path: Path, node: Node) -> None:
    file = file_of("e", node, tmp_path)
    file.mkdir(parents=True)
    async with cluster(
        tmp_path, agent("e", [node.url], memory="disk"), agent("calm", [node.url]), supervision="max_restarts = 3"
    ) as running:
        await running.wait_state("calm_server", "ready")
        row = await running.wait_state("e_server", "failed")
        assert str(file) in row["last_error"]
        assert "cannot be opened" in row["last_error"]
        assert (await running.results("x", agent="calm"))["properties"]["count"] == 1
        answer = await running.http.get("/ready")
        assert answer.status_code == 503
        assert "cannot be opened" in answer.json()["agents"]["e"]["workers"]["e_server"]


@pytest.mark.parametrize("place", ["/proc/em-runner", "{tmp}/a-file", "{tmp}/a-file/below"])
async def test_state_folder_that_cannot_be_used_is_one_clear_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("not a folder")
    (tmp_path / "handlers.py").write_text(COUNTER)
    (tmp_path / "em-runner.toml").write_text(agent("e", ["ws://127.0.0.1:1"]))
    state = place.format(tmp=tmp_path)
    command = [sys.executable, "-m", "runner", "run", "-c", str(tmp_path / "em-runner.toml")]
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [*command, "--http", "127.0.0.1:0", "--state-dir", state],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=20,
        )
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"the state folder {state} cannot be used" in done.stderr
    assert "--state-dir" in done.stderr


FULL = """
import os, resource

def handle(body, memory):
    if body == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    if body == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    memory["count"] = memory.get("count", 0) + 1
    count = memory["count"]
    if body.startswith("big"):
        memory["big"] = "x" * 1_000_000
    return {"type": "t", "properties": {"body": body, "count": count, "pid": os.getpid()}}, memory
"""


async def test_disk_that_is_full_costs_the_query_and_its_memory_and_nothing_else(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path, agent("e", [node.url], memory="disk"), agent("calm", [other_node.url]), handlers=FULL
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        counts = [(await running.results(body, agent="e"))["properties"]["count"] for body in ("one", "full")]
        assert counts == [1, 2]
        async with http_load(running, "/agents/calm/query", clients=4) as calm:
            for number in range(3):
                failed = await running.ask(f"big-{number}", agent="e")
                assert failed.status_code == 500
                assert failed.json() == {"error": "handler_failed"}
            assert await node.query("big-node") == []
            found = (await running.results("small", agent="e"))["properties"]
        assert found == {"body": "small", "count": 3, "pid": pid}, "the memory is as it was last written"
        calm.assert_nothing_lost()
        assert calm.right == calm.asked
        assert "cannot be written" in running.events("memory_not_written")[0]["error"]
        assert (await running.results("room", agent="e"))["properties"]["count"] == 4
        assert (await running.results("big-again", agent="e"))["properties"]["count"] == 5, "there is room again"
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid), "it is dead")
        await until(lambda: running.events("worker_restarting"), "its death is seen")
        await running.wait_state("e_server", "ready")
        assert (await running.results("after", agent="e"))["properties"]["count"] == 6


async def test_runner_without_a_descriptor_left_goes_on_and_starts_its_worker_once_it_has_some(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("e", [node.url]),
        agent("calm", [node.url]),
        handlers=ECHO,
        supervision="max_restarts = 100",
    ) as running:
        await all_ready(running)
        pid, calm_pid = await running.worker_pid("e_server"), await running.worker_pid("calm_server")
        url = running.http.base_url
        kept = Client(url.host, url.port or 80)
        assert (await kept.ask("before", "/agents/calm/query")).right
        had = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{running.process.pid}/fd"))
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (used + 8, had[1]))
        crowd = []
        try:
            for _ in range(60):
                crowd.append(await asyncio.open_connection(url.host, url.port or 80))
            os.kill(pid, signal.SIGKILL)
            await until(lambda: running.events("worker_restarting"), "its death is seen")
            await until(
                lambda: any("no process" in event["why"] for event in running.events("worker_restarting")),
                f"that it cannot be started is said\n{running.log[-3000:]}",
            )
            for number in range(20):
                assert (await kept.ask(f"meanwhile-{number}", "/agents/calm/query")).right
            refused = await kept.ask("x", "/agents/e/query")
            assert refused.honest_refusal
        finally:
            for _, writer in crowd:
                writer.close()
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, had)
        kept.close()
        await running.wait_state("e_server", "ready")
        assert (await ask_once(running, "after", "/agents/e/query")).right
        assert await running.worker_pid("calm_server") == calm_pid
        assert running.process.poll() is None
        report("no descriptor left", f"{len(running.events('worker_restarting'))} restarts until there were some again")


async def run_with_limit(limit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `em-runner run` under a `ulimit` until it ends; it is told to after it has started."""
    arguments = "-m runner run -c em-runner.toml --http 127.0.0.1:0 --state-dir s"
    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        ["bash", "-c", f"ulimit {limit}; exec {shlex.quote(sys.executable)} {arguments}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await until(
            lambda: process.poll() is not None or read_address(folder / "s") is not None,
            "it has started, or said why not",
        )
        process.terminate()
        await until(lambda: process.poll() is not None, "it has ended")
    finally:
        process.kill()
        _, said = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, "", said)


@pytest.mark.parametrize("limit", [12, 20, 24, 28, 67])
async def test_start_with_too_few_descriptors_is_refused_in_one_line(limit: int, tmp_path: Path, node: Node) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("e", [node.url]))
    done = await run_with_limit(f"-n {limit}", tmp_path)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f"only {limit} files may be open" in done.stderr


async def test_start_raises_a_soft_limit_that_is_too_low(tmp_path: Path, node: Node) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("e", [node.url]))
    done = await run_with_limit("-Sn 24", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


async def test_reload_makes_room_for_more_workers_or_is_refused(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("e", [node.url]), handlers=ECHO) as running:
        await all_ready(running)
        pid, config = running.process.pid, tmp_path / "em-runner.toml"
        before, more = config.read_text(), "\n".join(agent(f"more_{number}", [node.url]) for number in range(6))
        # 64 of its own, 4 for each of seven workers.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (80, 80))
        config.write_text(before + more)
        os.kill(pid, signal.SIGHUP)
        await until(lambda: running.events("reload_refused"), "it is refused")
        (refused,) = running.events("reload_refused")
        assert "nothing was changed: only 80 files may be open at once, and 7 workers need 92" in refused["what"]
        # Those that are taken out are there while those that are new start.
        renamed = "\n".join(agent(f"other_{number}", [node.url]) for number in range(4))
        config.write_text(before.replace(agent("e", [node.url]), renamed))
        os.kill(pid, signal.SIGHUP)
        await until(lambda: len(running.events("reload_refused")) == 2, "it is refused too")
        assert "5 workers need 84" in running.events("reload_refused")[1]["what"]
        assert list(await running.rows()) == ["e_server"]
    if os.geteuid() == 0:  # nobody else may raise a hard limit again
        async with cluster(tmp_path, agent("e", [node.url]), handlers=ECHO) as running:
            await all_ready(running)
            pid = running.process.pid
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (80, 5000))
            config.write_text(before + more)
            os.kill(pid, signal.SIGHUP)
            await until(lambda: running.events("reloaded"), "it is done")
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] >= 92 + 4096
            await all_ready(running)
            assert len(await running.rows()) == 7


def test_clients_never_have_the_descriptors_of_workers() -> None:
    listener = listen(resolve("127.0.0.1", 0, hint=""), hint="")
    server = HttpServer(lambda *_: None, listener)  # type: ignore[arg-type]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.reserve(soft - 20)
    assert server.max_connections == 20
    server.reserve(soft + 20)
    assert server.max_connections > 0, "somebody can ask how it is"
    assert HttpLimits().max_connections == descriptors.OF_CLIENTS, "the one is made room for, the other is allowed"
    listener.close()
