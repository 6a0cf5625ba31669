"""Restarts of killed processes, and shutdowns that leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import anyio
import httpx
import psutil
import pytest

from disco import Node
from tests.cluster import COMMAND_TIMEOUT_S, COUNTER, ROOT, Cluster, agent, alive, cluster, until

pytestmark = pytest.mark.anyio

HANGS = """
import pathlib, time
def handle(body, memory):
    pathlib.Path("began").touch()
    time.sleep(3600)
"""


async def test_killed_worker_registers_again_while_its_neighbour_answers(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, agent("count", [node.url, other_node.url])) as running:
        await running.wait_ready()
        await running.wait_state("count_server_2", "ready")
        assert (await running.results("a", worker="count_server"))["properties"]["count"] == 1
        victim = await running.worker_pid("count_server_2")
        answered = 0

        async def query_the_neighbour(scope: anyio.CancelScope) -> None:
            nonlocal answered
            while not scope.cancel_called:
                found = await running.results("n", worker="count_server")
                answered += 1
                assert found["properties"]["count"] == answered + 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(query_the_neighbour, tasks.cancel_scope)
            await until(lambda: answered > 5, "the neighbour answers")
            connection = other_node.registry.connection("count")
            os.kill(victim, signal.SIGKILL)
            await other_node.wait_until(
                lambda: other_node.registry.connection("count") not in (None, connection)
            )
            before = answered
            await until(lambda: answered > before + 5, "the neighbour still answers")
            tasks.cancel_scope.cancel()
        row = await running.row("count_server_2")
        assert row["restarts"] == 1
        assert row["incarnation"] == 2
        assert row["pid"] != victim
        assert "SIGKILL" in row["last_error"]
        assert (await running.row("count_server"))["restarts"] == 0


async def test_queries_of_a_dead_worker_are_answered_503_immediately(
    tmp_path: Path, node: Node
) -> None:
    handlers = HANGS
    async with cluster(tmp_path, agent("slow", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        pid = await running.worker_pid("slow_server")
        answers = []

        async def ask() -> None:
            answers.append(await running.ask("x"))

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ask)
            await running.wait_in_flight(20)
            os.kill(pid, signal.SIGKILL)
        assert {answer.status_code for answer in answers} == {503}
        assert all("retry-after" in answer.headers for answer in answers)


async def test_no_worker_outlives_a_killed_runner(tmp_path: Path, node: Node) -> None:
    handlers = """
import re, time

def count(body, memory):
    return None, memory

def in_python(body, memory):
    while True:
        pass

async def on_the_loop(body, memory):
    while True:
        pass

def holding_the_lock(body, memory):
    re.match(r"(a+)+b", "a" * 200)
"""
    names = ["count", "in_python", "on_the_loop", "holding_the_lock"]
    agents = [agent(name, [node.url], handler=f"handlers.py:{name}") for name in names]
    async with cluster(tmp_path, *agents, handlers=handlers) as running:
        await running.wait_ready()
        rows = await running.rows()
        async with anyio.create_task_group() as tasks:
            for name in names[1:]:
                tasks.start_soon(_ask_and_ignore_failures, running, name)
            await until(lambda: _busy(rows[f"{names[-1]}_server"]["pid"]), "the handlers are busy")
            running.process.kill()
            await running.wait_exited()
            tasks.cancel_scope.cancel()
        assert not any(alive(row["pid"]) for row in rows.values())


async def _ask_and_ignore_failures(running: Cluster, name: str) -> None:
    with contextlib.suppress(httpx.TransportError):
        await running.ask("x", agent=name)


def _busy(pid: int) -> bool:
    return psutil.Process(pid).cpu_times().user > 0.3


async def test_killed_runner_can_be_started_again(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        running.process.kill()
        await running.wait_exited()
        assert (tmp_path / "state" / "ipc" / "router.sock").exists()
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        assert await running.stop() == 0


async def test_sigterm_leaves_no_process_and_no_socket(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        assert await running.stop() == 0
        assert running.events("draining")[0]["signal"] == "SIGTERM"
        await running.wait_exited()
        assert not (tmp_path / "state" / "ipc").exists()
        assert not (tmp_path / "state" / "runner.json").exists()
        await node.wait_until(lambda: "count" not in node.registry)
        assert "Traceback" not in running.log


# Its start takes so long that the signal arrives, and the drain begins, before it is complete.
SIGNALLED_AT_ITS_START = """
import asyncio, os, signal
from runner.cli import main
from shared.http.server import HttpServer

start = HttpServer.start

async def start_late(server):
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.3)
    await start(server)

HttpServer.start = start_late
main()
"""


async def test_sigterm_during_the_start_ends_the_runner(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(COUNTER)
    (tmp_path / "em-runner.toml").write_text(agent("count", ["127.0.0.1:9"]))
    command = [sys.executable, "-c", SIGNALLED_AT_ITS_START, "run", "--http", "127.0.0.1:0"]
    ended = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [*command, "--state-dir", "state"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "state" / "ipc").exists()


async def test_drain_answers_the_queries_in_flight(tmp_path: Path, node: Node) -> None:
    handlers = f"""
import pathlib, time
gate = pathlib.Path({str(tmp_path / "gate")!r})
def handle(body, memory):
    while not gate.exists():
        time.sleep(0.005)
    return [{{"type": "t", "properties": {{"title": body}}}}], memory
"""
    async with cluster(tmp_path, agent("slow", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        statuses, found = [], []

        async def ask_http(text: str) -> None:
            statuses.append((await running.ask(text)).status_code)

        async def ask_node(text: str) -> None:
            found.extend(await node.query(text))

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(ask_node, f"n{number}")
            await until(lambda: node.in_flight == 5, "the node has sent its queries")
            for number in range(5):
                tasks.start_soon(ask_http, f"h{number}")
            await running.wait_in_flight(5)
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: running.events("draining"), "the runner drains")
            (tmp_path / "gate").touch()
        assert statuses == [200] * 5
        assert sorted(item["properties"]["title"] for item in found) == [f"n{n}" for n in range(5)]
        await until(lambda: running.process.poll() == 0, "the runner has ended")


async def test_drain_timeout_kills_workers_and_exits_with_status_0(
    tmp_path: Path, node: Node
) -> None:
    handlers = HANGS
    async with cluster(
        tmp_path,
        agent("slow", [node.url]),
        handlers=handlers,
        supervision="shutdown_timeout_ms = 300",
    ) as running:
        await running.wait_ready()
        async with anyio.create_task_group() as tasks:
            answers = []

            async def ask() -> None:
                answers.append(await running.ask("x"))

            tasks.start_soon(ask)
            await until((tmp_path / "began").exists, "the handler has started")
            began = time.monotonic()
            assert await running.stop() == 0
            assert time.monotonic() - began < 5.0, "sooner than with the default timeout"
        assert answers[0].status_code == 503
        await running.wait_exited()
        (timed_out,) = running.events("drain_timed_out")
        assert timed_out["pending"] == 1


async def exit_by_repeated_signals(running: Cluster, number: signal.Signals) -> None:
    """Send a signal so that the runner drains, and further ones until it exits."""
    running.process.send_signal(number)
    await until(lambda: running.events("draining"), "the runner drains")

    def ended() -> bool:
        running.process.send_signal(number)
        return running.process.poll() is not None

    await until(ended, "further signals end the runner")


async def test_second_signal_skips_the_drain(tmp_path: Path, node: Node) -> None:
    handlers = HANGS
    async with cluster(
        tmp_path,
        agent("slow", [node.url]),
        handlers=handlers,
        supervision="shutdown_timeout_ms = 60000",
    ) as running:
        await running.wait_ready()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.ask, "x")
            await until((tmp_path / "began").exists, "the handler has started")
            await exit_by_repeated_signals(running, signal.SIGINT)
            assert running.process.returncode == 0
            assert len(running.events("killing")) >= 1
        await running.wait_exited()


async def test_second_signal_kills_a_worker_that_a_reload_removes(
    tmp_path: Path, node: Node
) -> None:
    agents = [agent("kept", [node.url]), agent("slow", [node.url])]
    async with cluster(
        tmp_path, *agents, handlers=HANGS, supervision="shutdown_timeout_ms = 60000"
    ) as running:
        await running.wait_ready()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(running.ask, "x", agent="slow"))
            await until((tmp_path / "began").exists, "the handler has started")
            config = tmp_path / "em-runner.toml"
            config.write_text(config.read_text().replace(agents[1], ""))
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: _is_removed(running), "the reload has removed the worker")
            await exit_by_repeated_signals(running, signal.SIGTERM)
        await running.wait_exited()


async def _is_removed(running: Cluster) -> bool:
    return "slow_server" not in await running.rows()


async def test_sigterm_to_the_process_group_restarts_nothing(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        running.record_processes()
        os.killpg(running.process.pid, signal.SIGTERM)
        await until(lambda: running.process.poll() is not None, "the runner has ended")
        assert running.process.returncode == 0
        assert len(running.events("worker_started")) == 1
        await running.wait_exited()


@pytest.mark.message_text
async def test_sigterm_to_a_worker_drains_and_restarts_it(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        os.kill(pid, signal.SIGTERM)
        await until(lambda: not alive(pid), "the worker has exited")
        await until(lambda: running.events("worker_restarting"), "its exit is logged")
        restarting = running.events("worker_restarting")[0]
        assert restarting["kind"] == "exited"
        assert "exit status 0" in restarting["reason"]
        row = await running.wait_state("count_server", "ready")
        assert row["pid"] != pid


async def test_last_error_of_a_handler_outlives_its_killed_worker(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import os, signal
def handle(body, memory):
    if body == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("out of stock")
"""
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        assert (await running.ask("fail")).status_code == 500
        assert (await running.ask("die")).status_code == 503

        async def errors() -> dict[str, str] | None:
            last_errors = (await running.row("a_server"))["last_errors"]
            found = {each["source"]: each["error"] for each in last_errors}
            return found if "process" in found else None

        assert "out of stock" in (await until(errors, "the end is recorded"))["handler"]


@pytest.mark.message_text
async def test_crash_loop_fails_only_its_own_worker(tmp_path: Path, node: Node) -> None:
    handlers = """
import os
def crash(body, memory):
    os._exit(3)
class Broken:
    def setup(self):
        os._exit(3)
    def handle(self, body, memory):
        return None, memory
def handle(body, memory):
    return body, memory
"""
    async with cluster(
        tmp_path,
        agent("good", [node.url]),
        agent("bad", [node.url], handler="handlers.py:Broken"),
        handlers=handlers,
        supervision="max_restarts = 3",
    ) as running:
        row = await running.wait_state("bad_server", "failed")
        assert row["restarts"] == 4
        assert "exit status 3" in row["last_error"]
        await running.wait_state("good_server", "ready")
        assert (await running.row("good_server"))["restarts"] == 0
        assert await running.results("x", agent="good") == "x"
        refused = await running.ask("x", agent="bad")
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        answer = await running.http.get("/ready")
        assert answer.status_code == 503
        assert "failed" in answer.json()["agents"]["bad"]["workers"]["bad_server"]


async def test_dead_fork_server_is_restarted(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        server = _fork_server(running.process.pid)
        os.kill(server, signal.SIGKILL)
        await until(lambda: not alive(server), "the fork server is dead")
        assert (await running.results("x"))["properties"]["count"] == 1
        assert (await running.row("count_server"))["pid"] == pid
        os.kill(pid, signal.SIGKILL)
        await until(
            lambda: running.events("worker_restarting"), "the death of the worker is noticed"
        )
        row = await running.wait_state("count_server", "ready")
        assert row["pid"] != pid
        assert row["restarts"] == 1


def _fork_server(runner: int) -> int:
    for child in psutil.Process(runner).children():
        if "forkserver" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError("there is no fork server")


async def test_ps_shows_the_name_of_each_worker(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        title = " ".join(psutil.Process(await running.worker_pid("count_server")).cmdline())
        assert title.strip() == f"em-worker count_server {node.url}"


async def test_second_runner_with_the_same_state_folder_is_refused(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        command = [sys.executable, "-m", "runner", "run", "-c", str(tmp_path / "em-runner.toml")]
        command += ["--http", "127.0.0.1:0", "--state-dir", str(tmp_path / "state")]
        second = await anyio.to_thread.run_sync(
            lambda: subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=COMMAND_TIMEOUT_S
            )
        )
        assert second.returncode == 1
        assert str(running.process.pid) in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert await running.ready()
