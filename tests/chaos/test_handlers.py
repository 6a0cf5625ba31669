"""Handlers that hang, crash, fork, close what is not theirs and eat memory: one worker pays, nobody else."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import psutil
import pytest

from disco import Node
from tests.chaos.load import Answer, HttpLoad, all_ready, ask_all, ask_once, http_load, report
from tests.cluster import agent, alive, cluster, until

pytestmark = pytest.mark.anyio

HANGING = """
import asyncio, os, pathlib, time

def found(body, memory):
    memory["count"] = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"body": body, "pid": os.getpid(), "count": memory["count"]}}, memory

def busy(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        while True:
            pass
    return found(body, memory)

def asleep(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        time.sleep(3600)
    return found(body, memory)

async def waiting(body, memory):
    answer = found(body, memory)
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        await asyncio.sleep(3600)
    return answer

async def blocking(body, memory):
    if body.startswith("hang"):
        pathlib.Path(body).touch()
        while True:
            pass
    return found(body, memory)

def calm(body, memory):
    return found(body, memory)
"""


async def p99_ms_of(load: HttpLoad, answers: int) -> float:
    """Return the p99 of the next so many answers."""
    load.took_s.clear()
    await until(lambda: len(load.took_s) >= answers, "the neighbour answers")
    return load.percentile_ms(99)


@pytest.mark.parametrize("kind", ["busy", "asleep"])
async def test_plain_handler_that_hangs_costs_its_query_and_nothing_that_waited_behind_it(
    kind: str, tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url], handler=f"handlers.py:{kind}", capabilities=["bad"], handler_timeout_ms=700),
        agent("calm", [node.url], handler="handlers.py:calm", capabilities=["calm"]),
        handlers=HANGING,
    ) as running:
        await all_ready(running)
        pid, calm_pid = await running.worker_pid("bad_server"), await running.worker_pid("calm_server")
        answers: list[Answer] = []

        async def hang(query: str) -> None:
            answers.append(await ask_once(running, query, "/agents/bad/query"))

        async with http_load(running, "/agents/calm/query", clients=4, pause_s=0.002) as calm:
            alone_ms = await p99_ms_of(calm, 300)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hang, "hang-http")
                await until((tmp_path / "hang-http").exists, "the handler hangs")
                calm.took_s.clear()
                behind = await ask_all(running, [f"behind-{n}" for n in range(80)], "/agents/bad/query")
            beside_ms = calm.percentile_ms(99)
        took_s = answers[0].came_s - answers[0].sent_s
        last_s = max(answer.came_s for answer in behind) - answers[0].came_s
        report(
            f"handler {kind}",
            f"504 after {took_s * 1000:.0f} ms, the last of 80 behind it {last_s * 1000:.0f} ms later",
            f"p99 of the neighbour {alone_ms:.1f} ms alone, {beside_ms:.1f} ms beside it: x {beside_ms / alone_ms:.2f}",
        )
        assert answers[0].status == 504
        assert 0.7 <= took_s < 1.7
        assert all(answer.right for answer in behind), [answer.status for answer in behind]
        assert not any(answer.properties["pid"] == pid for answer in behind), "by the successor"
        assert sorted(answer.properties["count"] for answer in behind) == list(range(1, 81)), "each was run once"
        calm.assert_nothing_lost()
        assert calm.right == calm.asked
        await until(lambda: not alive(pid), "the process has ended")
        rows = await running.rows()
        assert rows["bad_server"]["restarts"] == 1
        assert "longer than 700 ms" in rows["bad_server"]["last_error"]
        assert (rows["calm_server"]["pid"], rows["calm_server"]["restarts"]) == (calm_pid, 0)


async def test_query_of_a_node_that_hangs_is_null_to_it_at_the_time_out(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url, other_node.url], handler="handlers.py:asleep", handler_timeout_ms=500),
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
            tasks.start_soon(ask_node, "behind")
            # Not bound to a worker: the agent's next one may have what this one has not begun.
            elsewhere = await ask_all(running, [f"http-{n}" for n in range(5)], "/agents/bad/query")
        report("null to the node", f"after {[round(s * 1000) for s in took_s]} ms")
        assert max(took_s) < 1.5
        assert all(answer.right for answer in elsewhere)
        assert {answer.properties["pid"] for answer in elsewhere} == {pids[1]}
        await running.wait_state("bad_server", "ready")
        assert await running.worker_pid("bad_server_2") == pids[1]


async def test_async_handler_that_takes_too_long_is_cancelled_and_its_worker_stays(tmp_path: Path, node: Node) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url], handler="handlers.py:waiting", handler_timeout_ms=300), handlers=HANGING
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("a_server")
        assert (await running.results("one"))["properties"]["count"] == 1
        answers = await ask_all(running, ["hang-a"], "/agent/query")
        assert answers[0].status == 504
        assert answers[0].came_s - answers[0].sent_s < 1.3
        assert await node.query("hang-b") == []
        assert (await running.results("two"))["properties"]["count"] == 2, "the memory is as it was"
        row = await running.row("a_server")
        assert (row["pid"], row["restarts"]) == (pid, 0)


async def test_async_handler_that_blocks_its_loop_is_ended_for_its_silence(tmp_path: Path, node: Node) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url], handler="handlers.py:blocking", capabilities=["bad"]),
        agent("calm", [node.url], handler="handlers.py:calm", capabilities=["calm"]),
        handlers=HANGING,
        supervision="liveness_timeout_ms = 1000",
    ) as running:
        await all_ready(running)
        pid, calm_pid = await running.worker_pid("bad_server"), await running.worker_pid("calm_server")
        async with http_load(running, "/agents/calm/query", clients=4) as calm:
            answers = await ask_all(running, ["hang-1", "behind-1", "behind-2"], "/agents/bad/query")
            await running.wait_state("bad_server", "ready")
        calm.assert_nothing_lost()
        assert calm.right == calm.asked
        assert all(answer.honest_refusal or answer.right for answer in answers)
        assert any(answer.honest_refusal for answer in answers if answer.query == "hang-1")
        assert max(answer.came_s - answer.sent_s for answer in answers) < 2.5
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
            time.sleep(0.5)
            os._exit(0)
        pathlib.Path("child").write_text(str(child))
    return {"type": "t", "properties": {"body": body, "count": memory["count"]}}, memory
"""


@pytest.mark.parametrize("crash", ["segv", "exit", "abort", "fds"])
async def test_handler_that_ends_its_process_costs_one_restart_and_nothing_else(
    crash: str, tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("bad", [node.url, other_node.url], capabilities=["bad"]),
        agent("calm", [node.url], capabilities=["calm"]),
        handlers=CRASHING,
        supervision="liveness_timeout_ms = 1500",
    ) as running:
        await all_ready(running)
        before = await running.rows()
        async with http_load(running, "/agents/calm/query", "/workers/bad_server_2/query", clients=8) as load:
            began_s = time.monotonic()
            answers = await ask_all(running, [crash], "/workers/bad_server/query")
            await until(lambda: running.events("worker_restarting"), "it has died")
            await running.wait_state("bad_server", "ready")
            took_s = time.monotonic() - began_s
        report(f"handler {crash}", f"ready again after {took_s * 1000:.0f} ms, {answers[0].status}", load)
        assert answers[0].honest_refusal or (crash == "fds" and answers[0].right)
        load.assert_nothing_lost()
        assert load.right == load.asked
        after = await running.rows()
        assert after["bad_server"]["restarts"] == 1
        for name in ("bad_server_2", "calm_server"):
            assert (after[name]["pid"], after[name]["reconnects"]) == (before[name]["pid"], 0)


async def test_handler_that_raises_system_exit_costs_one_query(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("bad", [node.url]), handlers=CRASHING) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        assert (await running.ask("SystemExit")).status_code == 500
        assert await node.query("SystemExit") == []
        assert (await running.results("x"))["properties"]["count"] == 1, "the memory is as it was"
        assert await running.worker_pid("bad_server") == pid


async def test_handler_that_forks_is_answered_once_and_its_worker_goes_on(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("bad", [node.url]), handlers=CRASHING) as running:
        await all_ready(running)
        pid = await running.worker_pid("bad_server")
        async with http_load(running, clients=4) as load:
            answers = await ask_all(running, ["fork"], "/agent/query")
            child = int((tmp_path / "child").read_text())
            assert alive(child), "it runs on for a while"
            assert [item["properties"]["body"] for item in await node.query("meanwhile")] == ["meanwhile"]
            await until(lambda: not alive(child), "the child has ended")
        assert answers[0].right
        load.assert_nothing_lost()
        assert load.right == load.asked
        row = await running.row("bad_server")
        assert (row["pid"], row["restarts"], row["reconnects"]) == (pid, 0, 0)


async def test_handler_that_eats_memory_is_recycled_without_a_query_lost(tmp_path: Path, node: Node) -> None:
    handlers = """
hoard = []

def handle(body, memory):
    hoard.append(b"x" * (1 << 20))
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
        pid, calm_pid = await running.worker_pid("bad_server"), await running.worker_pid("calm_server")
        highest = 0

        def replaced() -> bool:
            nonlocal highest
            if alive(pid):
                highest = max(highest, psutil.Process(pid).memory_info().rss)
            return not alive(pid)

        async with http_load(running, "/agents/bad/query", clients=4, pause_s=0.02) as load:
            await until(replaced, "the one that has eaten too much has left")
            before = load.right
            await until(lambda: load.right > before + 20, "its successor answers")
        report("max_rss_mb = 150", f"left at {highest >> 20} MB", load)
        load.assert_nothing_lost()
        assert load.right == load.asked, "no query was refused"
        last = (await running.results("last", agent="bad"))["properties"]["count"]
        assert last == load.right + 1, "what was remembered went along"
        rows = await running.rows()
        assert rows["bad_server"]["restarts"] == 0
        assert "max_rss_mb" in running.events("worker_replaced")[0]["why"]
        assert rows["calm_server"]["pid"] == calm_pid
