"""Files that are corrupt, foreign or not writable, and too few file descriptors.

The runner reports each and continues, or refuses to start with one clear line.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from disco import Node
from runner.state_dir import read_address
from shared.http.server import Address, HttpServer
from tests.chaos.load import ECHO, Client, all_ready, ask_once, http_load, report
from tests.cluster import COMMAND_TIMEOUT_S, COUNTER, ROOT, Cluster, agent, alive, cluster, until
from worker.memory._disk import DiskMemory

pytestmark = pytest.mark.anyio


def create_memory(path: Path) -> None:
    """Create a memory file of several pages."""
    memory = DiskMemory(path)
    memory.open()
    memory.checkout()
    memory.commit({"count": 41, "text": "x" * 20_000})
    memory.flush()
    memory.close()


def corrupt(path: Path) -> None:
    create_memory(path)
    data = bytearray(path.read_bytes())
    data[4096:12_288] = os.urandom(8192)
    path.write_bytes(data)


def truncated(path: Path) -> None:
    create_memory(path)
    path.write_bytes(path.read_bytes()[:6000])


def foreign(path: Path) -> None:
    database = sqlite3.connect(path)
    with database:
        database.execute("CREATE TABLE memory (data BLOB)")
        database.execute("INSERT INTO memory VALUES ('of another program')")
    database.close()


def not_a_database(path: Path) -> None:
    path.write_bytes(b"my shopping list\n" * 500)


def memory_file(agent: str, node: Node, folder: Path) -> Path:
    return folder / "state" / "memory" / f"{agent}@127.0.0.1_{node.port}.sqlite"


@pytest.mark.parametrize("write_file", [corrupt, truncated, foreign, not_a_database])
async def test_invalid_memory_file_is_moved_aside_unchanged(
    write_file: Callable[[Path], None], tmp_path: Path, node: Node
) -> None:
    file = memory_file("e", node, tmp_path)
    file.parent.mkdir(parents=True, mode=0o700)
    file.parent.parent.chmod(0o700)
    write_file(file)
    before = file.read_bytes()
    async with cluster(tmp_path, agent("e", [node.url], memory="disk")) as running:
        await all_ready(running)
        assert (await running.results("x"))["properties"]["count"] == 1, "the new memory is empty"
        (event,) = running.events("memory_moved_aside")
        assert event["level"] == "error"
        assert event["file"] == str(file)
        assert event["reason"]
        assert event["hint"]
        (aside,) = file.parent.glob("*.aside-*[0-9]")
        assert event["to"] == str(aside)
        assert aside.read_bytes() == before, "the file is unchanged"
        assert not running.events("worker_restarting")


async def test_worker_whose_memory_cannot_be_opened_fails_and_others_run(
    tmp_path: Path, node: Node
) -> None:
    file = memory_file("e", node, tmp_path)
    file.mkdir(parents=True)
    async with cluster(
        tmp_path,
        agent("e", [node.url], memory="disk"),
        agent("calm", [node.url]),
        supervision="max_restarts = 3",
    ) as running:
        await running.wait_state("calm_server", "ready")
        row = await running.wait_state("e_server", "failed")
        assert str(file) in row["last_error"]
        assert (await running.results("x", agent="calm"))["properties"]["count"] == 1
        response = await running.http.get("/ready")
        assert response.status_code == 503
        assert str(file) in response.json()["agents"]["e"]["workers"]["e_server"]


@pytest.mark.parametrize("place", ["/proc/em-runner", "{tmp}/a-file", "{tmp}/a-file/below"])
async def test_unusable_state_folder_is_reported_in_one_line(place: str, tmp_path: Path) -> None:
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
            timeout=COMMAND_TIMEOUT_S,
        )
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f" {state} " in done.stderr
    assert "--state-dir" in done.stderr


FULL = """
import os, resource

def handle(body, memory):
    if body == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    if body == "free":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    memory["count"] = memory.get("count", 0) + 1
    count = memory["count"]
    if body.startswith("big"):
        memory["big"] = "x" * 1_000_000
    return {"type": "t", "properties": {"body": body, "count": count, "pid": os.getpid()}}, memory
"""


async def count_of(running: Cluster, query: str) -> int:
    results = await running.results(query, agent="e")
    return int(results["properties"]["count"])


async def test_full_disk_loses_only_the_query_that_needs_space(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("e", [node.url], memory="disk"),
        agent("calm", [other_node.url]),
        handlers=FULL,
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        assert [await count_of(running, query) for query in ("one", "full")] == [1, 2]
        async with http_load(running, "/agents/calm/query", clients=4) as calm:
            for number in range(3):
                failed = await running.ask(f"big-{number}", agent="e")
                assert failed.status_code == 500
                assert failed.json() == {"error": "handler_failed", "code": "handler_failed"}
            assert await node.query("big-node") == []
            found = (await running.results("small", agent="e"))["properties"]
        expected = {"body": "small", "count": 3, "pid": pid}
        assert found == expected, "the memory is unchanged since its last write"
        calm.assert_nothing_lost()
        assert calm.answered == calm.asked
        event = running.events("memory_not_written")[0]
        assert str(memory_file("e", node, tmp_path)) in event["error"]


async def test_memory_is_written_again_once_the_disk_has_space(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("e", [node.url], memory="disk"), handlers=FULL) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        assert await count_of(running, "full") == 1
        assert (await running.ask("big", agent="e")).status_code == 500
        assert [await count_of(running, query) for query in ("free", "big-again")] == [2, 3]
        assert await running.worker_pid("e_server") == pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid), "the worker has exited")
        await until(lambda: running.events("worker_restarting"), "its restart is logged")
        await running.wait_state("e_server", "ready")
        assert await count_of(running, "after") == 4


async def test_runner_without_free_descriptors_survives_and_restarts_its_worker_later(
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
        pid = await running.worker_pid("e_server")
        calm_pid = await running.worker_pid("calm_server")
        url = running.http.base_url
        client = Client(url.host, url.port or 80)
        assert (await client.ask("before", "/agents/calm/query")).is_correct
        limits = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        used = len(os.listdir(f"/proc/{running.process.pid}/fd"))
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (used + 8, limits[1]))
        connections = []
        try:
            for _ in range(60):
                connections.append(await asyncio.open_connection(url.host, url.port or 80))
            os.kill(pid, signal.SIGKILL)
            await until(lambda: running.events("worker_restarting"), "its restart is logged")
            await until(
                lambda: any(
                    f"[Errno {errno.EMFILE}]" in event["reason"]
                    for event in running.events("worker_restarting")
                ),
                f"the failed start is logged\n{running.log[-3000:]}",
            )
            for number in range(20):
                assert (await client.ask(f"during-{number}", "/agents/calm/query")).is_correct
            refused = await client.ask("x", "/agents/e/query")
            assert refused.is_refusal
        finally:
            for _, writer in connections:
                writer.close()
            resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, limits)
        client.close()
        await running.wait_state("e_server", "ready")
        assert (await ask_once(running, "after", "/agents/e/query")).is_correct
        assert await running.worker_pid("calm_server") == calm_pid
        assert running.process.poll() is None
        restarts = len(running.events("worker_restarting"))
        report("no free descriptors", f"{restarts} restarts until descriptors were free")


async def run_with_limit(limit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `em-runner run` with a `ulimit`, and terminate it once it has started."""
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
            "it has started or exited",
        )
        process.terminate()
        await until(lambda: process.poll() is not None, "it has exited")
    finally:
        process.kill()
        _, errors = process.communicate()
    return subprocess.CompletedProcess([], process.returncode, "", errors)


@pytest.mark.parametrize("limit", [12, 20, 24, 28, 67])
async def test_start_with_too_few_descriptors_is_refused_in_one_line(
    limit: int, tmp_path: Path, node: Node
) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("e", [node.url]))
    done = await run_with_limit(f"-n {limit}", tmp_path)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert f" {limit} " in done.stderr


async def test_start_raises_a_soft_limit_that_is_too_low(tmp_path: Path, node: Node) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("e", [node.url]))
    done = await run_with_limit("-Sn 24", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


async def test_processes_of_the_fork_server_inherit_the_raised_limit(
    tmp_path: Path, node: Node
) -> None:
    limit = tmp_path / "limit"
    report = f"print(*getrlimit(RLIMIT_NOFILE), file=open({str(limit)!r}, 'w'))"
    (tmp_path / "handlers.py").write_text(f"from resource import *\n{report}\n{ECHO}")
    (tmp_path / "em-runner.toml").write_text(agent("e", [node.url]))
    done = await run_with_limit("-Sn 80", tmp_path)
    assert done.returncode == 0, done.stderr
    soft, _ = limit.read_text().split()
    assert int(soft) > 80


@asynccontextmanager
async def limited(
    folder: Path, node: Node, soft: int, hard: int
) -> AsyncIterator[tuple[Cluster, Callable[[str], None]]]:
    """Run the agent `e` with these limits of descriptors; yield a function that reloads a text."""
    async with cluster(folder, agent("e", [node.url]), handlers=ECHO) as running:
        await all_ready(running)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (soft, hard))

        def reload(config: str) -> None:
            (folder / "em-runner.toml").write_text(config)
            os.kill(running.process.pid, signal.SIGHUP)

        yield running, reload


def agents(count: int, node: Node) -> str:
    return "\n".join(agent(f"agent_{number}", [node.url]) for number in range(count))


async def test_reload_is_refused_if_the_hard_limit_of_descriptors_is_too_low(
    tmp_path: Path, node: Node
) -> None:
    # A runner needs 64 descriptors, and 4 for each worker.
    async with limited(tmp_path, node, 80, 80) as (running, reload):
        before = (tmp_path / "em-runner.toml").read_text()
        reload(before + agents(6, node))
        await until(lambda: running.events("reload_refused"), "the reload is refused")
        (refused,) = running.events("reload_refused")
        # The limit, the number of workers, and the descriptors that they need.
        assert re.findall(r"\d+", refused["reason"]) == ["80", "7", "92"]
        assert list(await running.rows()) == ["e_server"]


async def test_reload_counts_removed_workers_while_new_ones_start(
    tmp_path: Path, node: Node
) -> None:
    async with limited(tmp_path, node, 80, 80) as (running, reload):
        before = (tmp_path / "em-runner.toml").read_text()
        reload(before.replace(agent("e", [node.url]), agents(4, node)))
        await until(lambda: running.events("reload_refused"), "the reload is refused")
        (refused,) = running.events("reload_refused")
        assert re.findall(r"\d+", refused["reason"]) == ["80", "5", "84"]
        assert list(await running.rows()) == ["e_server"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise another process's hard limit")
async def test_reload_raises_the_soft_limit_of_descriptors(tmp_path: Path, node: Node) -> None:
    async with limited(tmp_path, node, 80, 5000) as (running, reload):
        reload((tmp_path / "em-runner.toml").read_text() + agents(6, node))
        await until(lambda: running.events("reloaded"), "the reload is done")
        soft, _ = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        assert soft >= 92 + 4096
        await all_ready(running)
        assert len(await running.rows()) == 7


@pytest.fixture
def server() -> Iterator[HttpServer]:
    listener = Address.resolve("127.0.0.1", 0, hint="").listen()
    yield HttpServer(lambda *_: None, listener)  # type: ignore[arg-type]
    listener.close()


def test_descriptors_reserved_for_workers_are_not_for_clients(server: HttpServer) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.reserve(soft - 20)
    assert server.admitted_connections == 20


def test_some_clients_are_admitted_even_if_all_descriptors_are_reserved(
    server: HttpServer,
) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server.reserve(soft + 20)
    assert server.admitted_connections > 0
