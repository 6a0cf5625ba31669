"""Replacements of processes: no query is lost, and no old process or setting remains."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import httpx
import pytest

from disco import Node
from tests.cluster import COUNTER, agent, alive, cluster, until
from tests.integration.test_reload import configure, reload

pytestmark = pytest.mark.anyio


async def test_queries_waiting_at_a_draining_worker_go_to_its_successor(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import time
def handle(body, memory):
    time.sleep(0.03)
    count = memory.get("count", 0) + 1
    return count, {"count": count}
"""
    async with cluster(
        tmp_path,
        agent("slow", [node.url], max_queries=20),
        handlers=handlers,
        supervision="shutdown_timeout_ms = 300",
    ) as running:
        await running.wait_ready()
        answers: list[httpx.Response] = []

        async def client() -> None:
            while not running.events("worker_replaced"):
                answers.append(await running.ask("x"))

        async with anyio.create_task_group() as tasks:
            for _ in range(40):  # work of more than a second, four times the shutdown timeout
                tasks.start_soon(client)
        assert {answer.status_code for answer in answers} == {200}
        assert sorted(answer.json()["results"] for answer in answers) == list(
            range(1, len(answers) + 1)
        )


async def test_worker_that_dies_during_its_replacement_restarts_with_the_new_configuration(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import pathlib, time
class New:
    def setup(self):
        pathlib.Path("new").open("a").write("x")
        while not pathlib.Path("go").exists():
            time.sleep(0.005)
    def handle(self, body, memory):
        return "new", memory
def old(body, memory):
    return "old", memory
"""
    async with cluster(
        tmp_path, agent("a", [node.url], handler="handlers.py:old"), handlers=handlers
    ) as running:
        await running.wait_ready()
        pid = await running.worker_pid("a_server")
        configure(tmp_path, agent("a", [node.url], handler="handlers.py:New"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(reload, running)
            await until((tmp_path / "new").exists, "the replacement starts")
            os.kill(pid, signal.SIGKILL)
            await until(
                lambda: running.events("worker_restarting"),
                "the death of the old process is noticed",
            )
            (tmp_path / "go").touch()

        async def changed() -> bool:
            answer = await running.ask("x")
            return answer.status_code == 200 and answer.json()["results"] == "new"

        await until(changed, "the new handler answers")
        again = await reload(running)
        assert "unchanged: 1" in again.stdout
        assert await running.results("x") == "new"


async def test_sigterm_does_not_wait_for_the_imports_of_a_reload(
    tmp_path: Path, node: Node
) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(3600)\n" + COUNTER
    )
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        configure(
            tmp_path,
            agent("count", [node.url]),
            agent("late", [node.url], handler="slow.py:handle"),
        )
        running.process.send_signal(signal.SIGHUP)
        await until((tmp_path / "importing").exists, "the reload is importing")
        assert await running.stop(timeout_s=30.0) == 0  # sooner than the probe's timeout
        await running.wait_exited()


async def test_processes_forked_by_a_handler_end_with_its_worker(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import os, time
def handle(body, memory):
    pid = os.fork()
    if pid == 0:
        time.sleep(3600)
        os._exit(0)
    return pid, memory
"""
    async with cluster(tmp_path, agent("forks", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        first = await running.results("x")
        assert alive(first)
        connection = node.registry.connection("forks")
        os.kill(await running.worker_pid("forks_server"), signal.SIGKILL)
        await until(lambda: not alive(first), "the child has exited, too")
        await node.wait_until(lambda: node.registry.connection("forks") not in (None, connection))
        await running.wait_ready()
        second = await running.results("x")
        running.process.kill()
        await until(lambda: not alive(second), "the child of the next worker exits with the runner")


@pytest.mark.message_text
async def test_reload_cannot_change_the_state_folder(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url], memory="disk")) as running:
        await running.wait_ready()
        assert (await running.results("x"))["properties"]["count"] == 1
        (tmp_path / "token").write_text("secret")
        for _ in range(2):
            configure(
                tmp_path,
                agent("count", [node.url], memory="disk"),
                runner='http_token_file = "token"',
            )
            done = await reload(running)
            assert "unchanged: 1" in done.stdout
            assert "only a restart changes: runner.http_token" in done.stdout
        assert (await running.results("x"))["properties"]["count"] == 2


async def test_pings_are_answered_while_a_query_delays_the_handover(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import asyncio, pathlib
async def handle(body, memory):
    if body == "long":
        pathlib.Path("began").touch()
        while not pathlib.Path("gate").exists():
            await asyncio.sleep(0.005)
    return [{"type": "t", "properties": {"body": body}}], memory
"""
    several = agent("a", [node.url], memory="none", concurrency=4)
    async with cluster(tmp_path, several, handlers=handlers) as running:
        await running.wait_ready()
        pid = await running.worker_pid("a_server")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.results, "long")
            await until((tmp_path / "began").exists, "the handler has started")
            configure(
                tmp_path, agent("a", [node.url], memory="none", concurrency=4, capabilities=["new"])
            )
            os.kill(running.process.pid, signal.SIGHUP)
            await until(lambda: running.events("worker_replaced"), "the successor is on standby")
            await running.wait_state("a_server", "draining")
            for number in range(5):
                assert await node.query(f"{number}") == [
                    {"type": "t", "properties": {"body": f"{number}"}}
                ]
            assert (await running.row("a_server"))["pid"] == pid
            (tmp_path / "gate").touch()
        await running.wait_ready()
        assert await running.worker_pid("a_server") != pid
        assert await node.query("x") == [{"type": "t", "properties": {"body": "x"}}]


async def test_shorter_timeout_of_a_reload_applies_to_running_queries(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import pathlib, time
def handle(body, memory):
    pathlib.Path("began").touch()
    time.sleep(3600)
"""
    slow, short = agent("slow", [node.url]), "shutdown_timeout_ms = 100"
    async with cluster(tmp_path, slow, handlers=handlers, supervision=short) as running:
        await running.wait_ready()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await running.ask("x"))

        with anyio.fail_after(25):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await until((tmp_path / "began").exists, "the handler has started")
                configure(tmp_path, slow, runner="query_timeout_ms = 200", supervision=short)
                await reload(running)
                tasks.start_soon(ask)
        assert [answer.status_code for answer in answers] == [504, 504]


REQUEST = (
    b'POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 13\r\n\r\n{"query":"x"}'
)


async def test_many_waiting_queries_use_no_cpu_in_the_runner(tmp_path: Path, node: Node) -> None:
    import psutil

    handlers = "import asyncio\nasync def handle(body, memory):\n    await asyncio.sleep(3600)\n"
    slow, short = agent("slow", [node.url]), "shutdown_timeout_ms = 100"
    async with cluster(tmp_path, slow, handlers=handlers, supervision=short) as running:
        await running.wait_ready()
        address = (str(running.http.base_url.host), running.http.base_url.port)
        async with AsyncExitStack() as stack:
            for _ in range(300):
                client = await stack.enter_async_context(await anyio.connect_tcp(*address))
                await client.send(REQUEST)
            await running.wait_in_flight(300)
            runner = psutil.Process(running.process.pid)
            before, began = sum(runner.cpu_times()[:2]), time.monotonic()
            await until(lambda: time.monotonic() - began > 2.0, "the CPU time was measured")
            assert sum(runner.cpu_times()[:2]) - before < 0.3


async def test_closed_terminal_reloads_the_runner_and_stops_nothing(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        pid = await running.worker_pid("count_server")
        os.killpg(running.process.pid, signal.SIGHUP)
        await until(lambda: running.events("reloaded"), "the runner has reloaded")
        assert await running.worker_pid("count_server") == pid
        assert (await running.row("count_server"))["restarts"] == 0
