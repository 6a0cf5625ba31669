"""SIGHUP under load: what changed is replaced without a query lost, what did not is not touched."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import anyio
import pytest

from disco import Node
from runner.state_dir import read_reload
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


async def reloaded(running: Cluster) -> None:
    """Send SIGHUP and wait until that reload is done."""
    asked_s = time.monotonic()
    running.process.send_signal(signal.SIGHUP)
    outcome = await until(lambda: read_reload(running.state_dir, asked_s), "the reload is done")
    assert outcome.done, outcome.message


@pytest.mark.parametrize("memory", ["ram", "disk"])
async def test_fifty_reloads_under_load_lose_no_query_and_leave_alone_what_did_not_change(
    memory: str, tmp_path: Path, node: Node
) -> None:
    kept = agent("kept", [node.url], capabilities=["kept"])
    versions = [agent("changed", [node.url], capabilities=[name], memory=memory) for name in ("one", "two")]
    async with cluster(tmp_path, kept, versions[0], handlers=COUNTING) as running:
        await all_ready(running)
        await node.wait_for("changed")
        before = await running.row("kept_server")
        (connected_at,) = (each.connected_at for each in node.registry.agents() if each.name == "kept")
        peer = node.registry.peer("kept")
        async with (
            http_load(running, "/agents/kept/query", clients=8) as at_kept,
            http_load(running, "/agents/changed/query", clients=8) as at_changed,
            node_load(node, "kept", askers=2) as by_node,
        ):
            for number in range(1, RELOADS + 1):
                # Every second one changes nothing.
                configure(tmp_path, kept, versions[number // 2 % 2])
                await reloaded(running)
        report(f"{RELOADS} reloads, memory {memory}", f"kept: {at_kept}", f"changed: {at_changed}", f"node: {by_node}")
        for load in (at_kept, at_changed):
            load.assert_nothing_lost()
            assert load.right == load.asked, "queries are held while a worker is replaced, not refused"
        by_node.assert_nothing_lost()
        assert by_node.answered == by_node.asked
        after = await running.row("kept_server")
        assert (after["pid"], after["reconnects"], after["restarts"]) == (before["pid"], 0, 0)
        assert node.registry.peer("kept") is peer
        assert [each.connected_at for each in node.registry.agents() if each.name == "kept"] == [connected_at]
        assert len(running.events("worker_replaced")) == RELOADS // 2
        last = (await running.results("last", agent="changed"))["properties"]["count"]
        assert last == at_changed.right + 1, "each query was counted once, through every hand-over"
        assert not running.events("worker_restarting")


async def test_ram_memory_that_cannot_be_pickled_is_not_handed_over_and_the_agent_goes_on(
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
            await reloaded(running)
            await running.wait_state("e_server", "ready")
        load.assert_nothing_lost()
        assert load.right == load.asked
        row = await running.row("e_server")
        assert row["pid"] != pid
        assert row["restarts"] == 0
        (said,) = running.events("memory_not_handed_over")
        assert "cannot be handed over" in said["error"]
        assert said["worker"] == "e_server"


async def test_query_that_hangs_in_the_hand_over_costs_itself_alone(tmp_path: Path, node: Node) -> None:
    handlers = """
import os, pathlib, time
def handle(body, memory):
    if body == "long":
        pathlib.Path("long").touch()
        time.sleep(3600)
    return {"type": "t", "properties": {"body": body, "pid": os.getpid()}}, memory
"""
    async with cluster(tmp_path, agent("e", [node.url], handler_timeout_ms=1500), handlers=handlers) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        statuses: list[int] = []

        async def ask_long() -> None:
            statuses.append((await ask_all(running, ["long"], "/agent/query"))[0].status)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_long)
            await until((tmp_path / "long").exists, "a query is in flight")
            configure(tmp_path, agent("e", [node.url], handler_timeout_ms=1500, capabilities=["new"]))
            running.process.send_signal(signal.SIGHUP)
            await until(lambda: running.events("worker_replaced"), "the hand-over has begun")
            held = await ask_all(running, [f"held-{n}" for n in range(20)], "/agent/query")
        assert statuses == [504], "what has begun may take its own time, and no more"
        assert all(answer.right for answer in held)
        assert not any(answer.properties["pid"] == pid for answer in held)
        await running.wait_state("e_server", "ready")
        assert (await running.row("e_server"))["restarts"] == 0
