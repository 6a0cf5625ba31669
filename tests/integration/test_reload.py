"""SIGHUP and `em-runner reload`: only workers whose configuration changed are replaced."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest

from disco import Node
from tests.cluster import COMMAND_TIMEOUT_S, COUNTER, ROOT, Cluster, agent, alive, cluster, until

pytestmark = pytest.mark.anyio


async def reload(running: Cluster) -> Any:
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", "reload", "--state-dir", str(running.state_dir)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    )


def reload_clients(running: Cluster) -> list[object]:
    """Return the connections to the runner's reload socket, also those in its backlog."""
    path = str(running.state_dir / "ipc" / "reload.sock")
    sockets = psutil.net_connections("unix")  # of all processes: no one has those in the backlog
    return [each for each in sockets if each.laddr == path][1:]  # without the listener


def configure(folder: Path, *agents: str, runner: str = "", supervision: str = "") -> None:
    (folder / "em-runner.toml").write_text(
        f"[runner]\n{runner}\n"
        "[connection]\nreconnect_interval_ms = 100\n"
        f"[supervision]\n{supervision}\n" + "\n".join(agents)
    )


async def test_reload_starts_stops_and_replaces_only_what_changed(
    tmp_path: Path, node: Node
) -> None:
    kept, changed, gone = (agent(name, [node.url]) for name in ("kept", "changed", "gone"))
    async with cluster(tmp_path, kept, changed, gone) as running:
        await running.wait_ready()
        assert (await running.results("x", agent="changed"))["properties"]["count"] == 1
        before = await running.rows()
        sockets = {each.name: each.connected_at for each in node.registry.agents()}

        configure(
            tmp_path,
            kept,
            agent("changed", [node.url], capabilities=["new"]),
            agent("added", [node.url]),
        )
        done = await reload(running)
        assert done.returncode == 0, done.stderr
        assert "added: added_server" in done.stdout
        assert "removed: gone_server" in done.stdout
        assert "replaced: changed_server" in done.stdout
        assert "unchanged: 1" in done.stdout

        await running.wait_ready()
        await running.wait_state("changed_server", "ready")
        after = await running.rows()
        assert list(after) == ["kept_server", "changed_server", "added_server"]
        assert after["kept_server"]["pid"] == before["kept_server"]["pid"]
        assert after["kept_server"]["connection_failures"] == 0
        assert after["changed_server"]["pid"] != before["changed_server"]["pid"]
        assert after["changed_server"]["restarts"] == 0, "a replacement does not count as a restart"
        await until(lambda: not alive(before["gone_server"]["pid"]), "the removed worker is gone")
        listed = {each.name: each for each in node.registry.agents()}
        assert set(listed) == {"kept", "changed", "added"}
        assert listed["changed"].capabilities == ("new",)
        assert listed["kept"].connected_at == sockets["kept"]
        assert (await running.results("x", agent="changed"))["properties"]["count"] == 2, (
            "ram memory is handed over"
        )
        assert (await running.ask("x", agent="gone")).status_code == 404
        assert not running.events("worker_restarting")


@pytest.mark.message_text
async def test_invalid_file_changes_nothing_and_is_reported(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        for text, error in (
            ("[[agent]]\nname = 1\n", "agent[0].name"),
            (agent("count", [node.url], handler="handlers.py:nothing"), "nothing"),
            ("nonsense", "is not TOML"),
        ):
            (tmp_path / "em-runner.toml").write_text(text)
            refused = await reload(running)
            assert refused.returncode == 78
            assert error in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
        assert await running.worker_pid("count_server") == pid
        assert await running.ready()


@pytest.mark.message_text
async def test_replacement_with_a_failing_setup_leaves_the_old_worker_running(
    tmp_path: Path, node: Node
) -> None:
    handlers = (
        COUNTER
        + """
class Broken:
    def setup(self):
        raise OSError("the database is closed")
    def handle(self, body, memory):
        return body, memory
"""
    )
    async with cluster(tmp_path, agent("count", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        configure(tmp_path, agent("count", [node.url], handler="handlers.py:Broken"))
        incomplete = await reload(running)
        assert incomplete.returncode == 1, "the rest of the file is applied"
        assert "NOT replaced" in incomplete.stderr
        assert running.events("reload_incomplete")
        (failed,) = running.events("replacement_failed")
        assert failed["node"] == node.url
        assert await running.worker_pid("count_server") == pid
        assert (await running.results("x"))["properties"]["count"] == 1
        assert "the database is closed" in running.log


async def test_adding_or_removing_a_node_leaves_other_workers_unchanged(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        configure(tmp_path, agent("count", [node.url, other_node.url]))
        assert (await reload(running)).stdout.strip() == "added: count_server_2; unchanged: 1"
        await running.wait_state("count_server_2", "ready")
        configure(tmp_path, agent("count", [node.url]))
        assert (await reload(running)).stdout.strip() == "removed: count_server_2; unchanged: 1"
        assert await running.worker_pid("count_server") == pid


async def test_each_of_two_concurrent_reloads_gets_its_own_outcome(
    tmp_path: Path, node: Node
) -> None:
    handlers = (
        COUNTER
        + """
import pathlib, time
class Slow:
    def setup(self):
        while not pathlib.Path("gate").exists():
            time.sleep(0.01)
    def handle(self, body, memory):
        return body, memory
"""
    )
    async with cluster(tmp_path, agent("count", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        outcomes: dict[str, subprocess.CompletedProcess[str]] = {}

        async def ask(name: str) -> None:
            outcomes[name] = await reload(running)

        async with anyio.create_task_group() as tasks:
            configure(tmp_path, agent("count", [node.url], handler="handlers.py:Slow"))
            tasks.start_soon(ask, "first")
            await until(
                lambda: len(running.events("worker_started")) == 2, "the first reload has started"
            )
            configure(tmp_path, agent("count", [node.url], handler="nosuch.py:handle"))
            tasks.start_soon(ask, "second")
            await until(lambda: len(reload_clients(running)) == 2, "both commands have connected")
            (tmp_path / "gate").touch()
        assert (outcomes["first"].returncode, outcomes["second"].returncode) == (0, 78)
        assert "nosuch.py" in outcomes["second"].stderr


@pytest.mark.message_text
async def test_reload_command_reports_the_death_of_the_runner_immediately(
    tmp_path: Path, node: Node
) -> None:
    handlers = (
        COUNTER
        + """
import time
class Slow:
    def setup(self):
        time.sleep(1000)
    def handle(self, body, memory):
        return body, memory
"""
    )
    async with cluster(tmp_path, agent("count", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        running.record_processes()
        configure(tmp_path, agent("count", [node.url], handler="handlers.py:Slow"))
        outcomes: list[subprocess.CompletedProcess[str]] = []

        async def ask() -> None:
            outcomes.append(await reload(running))

        with anyio.fail_after(40):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await until(
                    lambda: len(running.events("worker_started")) == 2, "the reload has started"
                )
                running.process.kill()
        assert outcomes[0].returncode == 1
        assert "exited before the reload was done" in outcomes[0].stderr


@pytest.mark.message_text
async def test_reload_names_settings_that_need_a_restart(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        (tmp_path / "token").write_text("secret")
        (tmp_path / "token").chmod(0o600)
        configure(
            tmp_path,
            agent("count", [node.url]),
            runner='http_token_file = "token"\nmax_in_flight = 7',
        )
        done = await reload(running)
        assert done.returncode == 0
        assert "only a restart changes: runner.http_token" in done.stdout
        assert await running.ready()


@pytest.mark.parametrize("memory", ["ram", "disk"])
async def test_worker_that_reaches_its_limit_is_replaced_without_losing_a_query(
    memory: str, tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path, agent("count", [node.url], memory=memory, max_queries=200)
    ) as running:
        await running.wait_ready()
        first = await running.worker_pid("count_server")
        counts = []

        async def replaced() -> bool:
            counts.append((await running.results("x"))["properties"]["count"])
            return len(counts) % 50 == 0 and await running.worker_pid("count_server") != first

        await until(replaced, "the worker is replaced")
        assert counts == list(range(1, len(counts) + 1)), "every query was answered and counted"
        assert "max_queries" in running.events("worker_replaced")[0]["reason"]
        assert (await running.row("count_server"))["restarts"] == 0


SLOW_TO_IMPORT = """
import pathlib, time
while pathlib.Path("slow").exists():
    time.sleep(0.01)

def handle(body, memory):
    return body, memory
"""


async def test_successor_of_a_removed_worker_leaks_nothing(tmp_path: Path, node: Node) -> None:
    kept, short = agent("kept", [node.url]), agent("short", [node.url], max_queries=1)
    slow = tmp_path / "slow"
    async with cluster(tmp_path, kept, handlers=SLOW_TO_IMPORT) as running:
        await running.wait_ready()
        runner = psutil.Process(running.process.pid)
        most: float = math.inf
        for _ in range(4):
            configure(tmp_path, kept, short)
            assert (await reload(running)).returncode == 0
            await running.wait_state("short_server", "ready")
            slow.touch()
            await running.results("x", agent="short")
            await until(
                lambda: running.events("worker_started")[-1]["incarnation"] == 2,
                "the successor starts",
            )
            configure(tmp_path, kept)
            assert (await reload(running)).returncode == 0
            slow.unlink()
            await until(
                lambda: len(runner.children(recursive=True)) <= 3, "its processes have exited"
            )
            await running.ready()  # opens a connection if httpx has closed the idle one
            # Files of what has just ended are closed a moment later.
            await until(
                lambda most=most: runner.num_fds() <= most, "no more files are open than before"
            )
            most = min(most, runner.num_fds())


async def test_failed_worker_starts_immediately_when_its_configuration_is_fixed(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import os
class Broken:
    def setup(self):
        os._exit(3)
    def handle(self, body, memory):
        return body, memory
def valid(body, memory):
    return body, memory
"""
    broken = agent("a", [node.url], handler="handlers.py:Broken")
    async with cluster(
        tmp_path, broken, handlers=handlers, supervision="max_restarts = 1"
    ) as running:
        await running.wait_state("a_server", "failed")
        configure(
            tmp_path,
            agent("a", [node.url], handler="handlers.py:valid"),
            supervision="max_restarts = 1",
        )
        assert (await reload(running)).returncode == 0
        # Without the reload a failed worker would start after 60 s.
        await running.wait_state("a_server", "ready")
