"""Handlers that hang, crash, fork, close the worker's files or use too much memory.

Each affects only its own worker.
"""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import psutil
import pytest

from disco import Node
from tests.chaos.load import HttpLoad, Response, all_ready, ask_all, ask_once, http_load, report
from tests.cluster import agent, alive, cluster, until

pytestmark = pytest.mark.anyio

HANGING = """
import asyncio, os, pathlib, time

def results(body, memory):
    memory["count"] = memory.get("count", 0) + 1
    properties = {"body": body, "pid": os.getpid(), "count": memory["count"]}
    return {"type": "t", "properties": properties}, memory

def busy(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        while True:
            pass
    return results(body, memory)

def sleeping(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        time.sleep(3600)
    return results(body, memory)

async def waiting(body, memory):
    found = results(body, memory)
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        await asyncio.sleep(3600)
    return found

async def blocking(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        while True:
            pass
    return results(body, memory)

def calm(body, memory):
    return results(body, memory)
"""


async def p99_ms_of(load: HttpLoad, count: int) -> float:
    """Return the 99th percentile of the time that the next `count` responses take."""
    load.took_s.clear()
    await until(lambda: len(load.took_s) >= count, f"there are {count} responses")
    return load.percentile_ms(99)


@pytest.mark.parametrize("kind", ["busy", "sleeping"])
async def test_hanging_sync_handler_loses_only_its_own_query(
    kind: str, tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent(
            "bad",
            [node.url],
            handler=f"handlers.py:{kind}",
            capabilities=["bad"],
            handler_timeout_ms=700,
        ),
        agent("calm", [node.url], handler="handlers.py:calm", capabilities=["calm"]),
        handlers=HANGING,
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        calm_pid = await running.worker_pid("calm_server")
        responses: list[Response] = []

        async def hang(query: str) -> None:
            responses.append(await ask_once(running, query, "/agents/bad/query"))

        async with http_load(running, "/agents/calm/query", clients=4, pause_s=0.002) as calm:
            alone_ms = await p99_ms_of(calm, 300)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hang, "hang-http")
                await until((tmp_path / "hang-http").exists, "the handler hangs")
                calm.took_s.clear()
                queries = [f"queued-{number}" for number in range(80)]
                queued = await ask_all(running, queries, "/agents/bad/query")
            beside_ms = calm.percentile_ms(99)
        took_s = responses[0].received_s - responses[0].sent_s
        last_s = max(response.received_s for response in queued) - responses[0].received_s
        report(
            f"handler {kind}",
            f"504 after {took_s * 1000:.0f} ms",
            f"the last of 80 queued queries {last_s * 1000:.0f} ms later",
            f"the other agent's p99: {alone_ms:.1f} ms before, {beside_ms:.1f} ms during the hang",
        )
        assert responses[0].status == 504
        assert 0.7 <= took_s < 10
        statuses = [response.status for response in queued]
        assert all(response.is_correct for response in queued), statuses
        pids = {response.properties["pid"] for response in queued}
        assert pid not in pids, "the new process answers the queued queries"
        counts = sorted(response.properties["count"] for response in queued)
        assert counts == list(range(1, 81)), "each queued query was handled once"
        calm.assert_nothing_lost()
        assert calm.answered == calm.asked
        await until(lambda: not alive(pid), "the process has exited")
        rows = await running.rows()
        assert rows["bad_server"]["restarts"] == 1
        assert " 700 " in rows["bad_server"]["last_error"]
        assert (rows["calm_server"]["pid"], rows["calm_server"]["restarts"]) == (calm_pid, 0)


async def test_hanging_query_of_a_node_ends_without_a_result_at_the_timeout(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent(
            "bad",
            [node.url, other_node.url],
            handler="handlers.py:sleeping",
            handler_timeout_ms=500,
        ),
        handlers=HANGING,
    ) as running:
        await all_ready(running)
        pids = [await running.worker_pid(worker) for worker in ("bad_server", "bad_server_2")]
        took_s: list[float] = []

        async def ask_node(query: str) -> None:
            began_s = time.monotonic()
            assert await node.query(query) == []
            took_s.append(time.monotonic() - began_s)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_node, "hang-node")
            await until((tmp_path / "hang-node").exists, "the handler hangs")
            tasks.start_soon(ask_node, "queued")
            # These queries are for the agent, so its other worker gets them.
            queries = [f"http-{number}" for number in range(5)]
            others = await ask_all(running, queries, "/agents/bad/query")
        report("no result for the node", f"after {[round(s * 1000) for s in took_s]} ms")
        assert max(took_s) < 10
        assert all(response.is_correct for response in others)
        assert {response.properties["pid"] for response in others} == {pids[1]}
        await running.wait_state("bad_server", "ready")
        assert await running.worker_pid("bad_server_2") == pids[1]


async def test_slow_async_handler_is_cancelled_and_its_worker_keeps_running(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("a", [node.url], handler="handlers.py:waiting", handler_timeout_ms=300),
        handlers=HANGING,
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("a_server")
        assert (await running.results("one"))["properties"]["count"] == 1
        responses = await ask_all(running, ["hang-a"], "/agent/query")
        assert responses[0].status == 504
        assert responses[0].received_s - responses[0].sent_s < 10
        assert await node.query("hang-b") == []
        assert (await running.results("two"))["properties"]["count"] == 2, "the memory is unchanged"
        row = await running.row("a_server")
        assert (row["pid"], row["restarts"]) == (pid, 0)


async def test_worker_is_killed_when_its_async_handler_blocks_the_event_loop(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url], handler="handlers.py:blocking", capabilities=["bad"]),
        agent("calm", [node.url], handler="handlers.py:calm", capabilities=["calm"]),
        handlers=HANGING,
        supervision="liveness_timeout_ms = 3000",
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        calm_pid = await running.worker_pid("calm_server")
        async with http_load(running, "/agents/calm/query", clients=4) as calm:
            queries = ["hang-1", "queued-1", "queued-2"]
            responses = await ask_all(running, queries, "/agents/bad/query")
            await running.wait_state("bad_server", "ready")
        calm.assert_nothing_lost()
        assert calm.answered == calm.asked
        assert all(response.is_refusal or response.is_correct for response in responses)
        assert any(response.is_refusal for response in responses if response.query == "hang-1")
        assert max(response.received_s - response.sent_s for response in responses) < 9
        assert await running.worker_pid("bad_server") != pid
        assert await running.worker_pid("calm_server") == calm_pid


CRASHING = """
import ctypes, os, pathlib, time

def handle(body, memory):
    memory["count"] = memory.get("count", 0) + 1
    if body == "segv":
        ctypes.string_at(0)
    if body == "exit":
        os._exit(7)
    if body == "abort":
        os.abort()
    if body == "SystemExit":
        raise SystemExit(3)
    if body == "fds":
        os.closerange(3, 1000)
    if body == "fork":
        child = os.fork()
        if child == 0:
            while not pathlib.Path("go").exists():
                time.sleep(0.005)
            os._exit(0)
        pathlib.Path("child").write_text(str(child))
    return {"type": "t", "properties": {"body": body, "count": memory["count"]}}, memory
"""


@pytest.mark.parametrize("crash", ["segv", "exit", "abort", "fds"])
async def test_handler_that_ends_its_process_causes_only_one_restart(
    crash: str, tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url, other_node.url], capabilities=["bad"]),
        agent("calm", [node.url], capabilities=["calm"]),
        handlers=CRASHING,
        supervision="liveness_timeout_ms = 4000",
    ) as running:
        await all_ready(running)
        before = await running.rows()
        async with http_load(
            running, "/agents/calm/query", "/workers/bad_server_2/query", clients=8
        ) as load:
            began_s = time.monotonic()
            responses = await ask_all(running, [crash], "/workers/bad_server/query")
            await until(lambda: running.events("worker_restarting"), "the worker has exited")
            await running.wait_state("bad_server", "ready")
            took_s = time.monotonic() - began_s
        report(
            f"handler {crash}",
            f"ready again after {took_s * 1000:.0f} ms, {responses[0].status}",
            load,
        )
        assert responses[0].is_refusal or (crash == "fds" and responses[0].is_correct)
        load.assert_nothing_lost()
        assert load.answered == load.asked
        after = await running.rows()
        assert after["bad_server"]["restarts"] == 1
        for name in ("bad_server_2", "calm_server"):
            assert (after[name]["pid"], after[name]["connection_failures"]) == (
                before[name]["pid"],
                0,
            )


async def test_handler_that_raises_system_exit_loses_one_query(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("bad", [node.url]), handlers=CRASHING) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        assert (await running.ask("SystemExit")).status_code == 500
        assert await node.query("SystemExit") == []
        assert (await running.results("x"))["properties"]["count"] == 1, "the memory is unchanged"
        assert await running.worker_pid("bad_server") == pid


async def test_forking_handler_gives_one_response_and_its_worker_keeps_running(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("bad", [node.url]), handlers=CRASHING) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        async with http_load(running, clients=4) as load:
            responses = await ask_all(running, ["fork"], "/agent/query")
            child = int((tmp_path / "child").read_text())
            assert alive(child), "the child still runs"
            results = await node.query("during")
            assert [item["properties"]["body"] for item in results] == ["during"]
            (tmp_path / "go").touch()
            await until(lambda: not alive(child), "the child has exited")
        assert responses[0].is_correct
        load.assert_nothing_lost()
        assert load.answered == load.asked
        row = await running.row("bad_server")
        assert (row["pid"], row["restarts"], row["connection_failures"]) == (pid, 0, 0)


async def test_worker_over_its_memory_limit_is_replaced_without_losing_a_query(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
kept = []

def handle(body, memory):
    kept.append(b"x" * (1 << 20))
    memory["count"] = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"body": body, "count": memory["count"]}}, memory
"""
    async with cluster(
        tmp_path,
        agent("bad", [node.url], capabilities=["bad"], max_rss_mb=150),
        agent("calm", [node.url], handler="examples.echo:handle"),
        handlers=handlers,
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        calm_pid = await running.worker_pid("calm_server")
        highest = 0

        def replaced() -> bool:
            nonlocal highest
            if alive(pid):
                highest = max(highest, psutil.Process(pid).memory_info().rss)
            return not alive(pid)

        async with http_load(running, "/agents/bad/query", clients=4, pause_s=0.02) as load:
            await until(replaced, "the process over the limit has exited")
            before = load.answered
            await until(lambda: load.answered > before + 20, "the new process answers")
        report("max_rss_mb = 150", f"replaced at {highest >> 20} MB", load)
        load.assert_nothing_lost()
        assert load.answered == load.asked, "no query was refused"
        last = (await running.results("last", agent="bad"))["properties"]["count"]
        assert last == load.answered + 1, "the memory was handed over"
        rows = await running.rows()
        assert rows["bad_server"]["restarts"] == 0
        assert "max_rss_mb" in running.events("worker_replaced")[0]["reason"]
        assert rows["calm_server"]["pid"] == calm_pid
