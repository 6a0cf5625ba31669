"""Reloads under load: changed workers are replaced without losing a query, others are kept."""

from __future__ import annotations

import signal
from pathlib import Path

import anyio
import pytest

from disco import Node
from tests.chaos.load import all_ready, ask_all, http_load, node_load, report
from tests.cluster import Cluster, agent, cluster, until
from tests.integration.test_reload import configure

pytestmark = pytest.mark.anyio

RELOADS = 50

COUNTING = """
def handle(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"body": body, "count": count}}, {"count": count}
"""


async def reload(running: Cluster) -> None:
    """Send SIGHUP, and wait until the reload is done."""
    before = len(running.events("reloaded"))
    running.process.send_signal(signal.SIGHUP)
    await until(lambda: len(running.events("reloaded")) > before, "the reload is done")


@pytest.mark.parametrize("memory", ["ram", "disk"])
async def test_fifty_reloads_lose_no_query_and_keep_unchanged_workers(
    memory: str, tmp_path: Path, node: Node
) -> None:
    kept = agent("kept", [node.url], capabilities=["kept"])
    versions = [
        agent("changed", [node.url], capabilities=[name], memory=memory) for name in ("one", "two")
    ]
    async with cluster(tmp_path, kept, versions[0], handlers=COUNTING) as running:
        await all_ready(running)
        await node.wait_for("changed")
        before = await running.row("kept_server")
        (connected_at,) = (
            each.connected_at for each in node.registry.agents() if each.name == "kept"
        )
        connection = node.registry.connection("kept")
        async with (
            http_load(running, "/agents/kept/query", clients=8) as at_kept,
            http_load(running, "/agents/changed/query", clients=8) as at_changed,
            node_load(node, "kept", clients=2) as by_node,
        ):
            for number in range(1, RELOADS + 1):
                # Every second reload changes nothing.
                configure(tmp_path, kept, versions[number // 2 % 2])
                await reload(running)
        report(
            f"{RELOADS} reloads, memory {memory}",
            f"kept: {at_kept}",
            f"changed: {at_changed}",
            f"node: {by_node}",
        )
        for load in (at_kept, at_changed):
            load.assert_nothing_lost()
            assert load.answered == load.asked, "a worker that is replaced holds its queries"
        by_node.assert_nothing_lost()
        assert by_node.answered == by_node.asked
        after = await running.row("kept_server")
        assert (after["pid"], after["connection_failures"], after["restarts"]) == (
            before["pid"],
            0,
            0,
        )
        assert node.registry.connection("kept") is connection
        agents = node.registry.agents()
        assert [each.connected_at for each in agents if each.name == "kept"] == [connected_at]
        assert len(running.events("worker_replaced")) == RELOADS // 2
        last = (await running.results("last", agent="changed"))["properties"]["count"]
        assert last == at_changed.answered + 1, "each query was counted once"
        assert not running.events("worker_restarting")


async def test_memory_that_cannot_be_pickled_does_not_stop_a_reload(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import threading
def handle(body, memory):
    memory.setdefault("lock", threading.Lock())
    memory["count"] = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"body": body, "count": memory["count"]}}, memory
"""
    async with cluster(tmp_path, agent("e", [node.url]), handlers=handlers) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        assert [(await running.results("x"))["properties"]["count"] for _ in range(2)] == [1, 2]
        configure(tmp_path, agent("e", [node.url], capabilities=["new"]))
        async with http_load(running, clients=4) as load:
            await reload(running)
            await running.wait_state("e_server", "ready")
        load.assert_nothing_lost()
        assert load.answered == load.asked
        row = await running.row("e_server")
        assert row["pid"] != pid
        assert row["restarts"] == 0
        (event,) = running.events("memory_not_handed_over")
        assert "_thread.lock" in event["reason"]
        assert event["worker"] == "e_server"


async def test_query_that_hangs_during_a_handover_loses_only_itself(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import os, pathlib, time
def handle(body, memory):
    if body == "long":
        pathlib.Path("long").touch()
        time.sleep(3600)
    return {"type": "t", "properties": {"body": body, "pid": os.getpid()}}, memory
"""
    async with cluster(
        tmp_path, agent("e", [node.url], handler_timeout_ms=1500), handlers=handlers
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        statuses: list[int] = []

        async def ask_long() -> None:
            statuses.append((await ask_all(running, ["long"], "/agent/query"))[0].status)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_long)
            await until((tmp_path / "long").exists, "a query is in flight")
            configure(
                tmp_path, agent("e", [node.url], handler_timeout_ms=1500, capabilities=["new"])
            )
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: running.events("worker_replaced"), "the handover has started")
            queries = [f"held-{number}" for number in range(20)]
            held = await ask_all(running, queries, "/agent/query")
        assert statuses == [504], "the running query has its whole timeout"
        assert all(response.is_correct for response in held)
        assert not any(response.properties["pid"] == pid for response in held)
        await running.wait_state("e_server", "ready")
        assert (await running.row("e_server"))["restarts"] == 0
