"""Processes that are killed and stopped under load: it costs one worker a moment, and no answer that was owed."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import anyio
import psutil
import pytest

from disco import Node
from runner.process import ForkServer
from runner.restarts import RestartPolicy
from runner.router import Router
from runner.supervisor import Supervisor
from shared.config import Agent as AgentConfig
from shared.config import WorkerSpec, parse_handler
from shared.nodes import parse_node
from tests.chaos.load import ECHO, Answer, all_ready, ask_once, http_load, node_load, report
from tests.cluster import Cluster, agent, alive, cluster, until

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("EM_CHAOS_KILLS", "40"))
MANY_RESTARTS = "max_restarts = 1000\n"


class Kill(NamedTuple):
    worker: str
    killed_s: float
    registered_s: float
    ready_s: float


async def kill_and_wait(running: Cluster, node: Node, name: str, worker: str) -> Kill:
    """Kill a worker and wait until its successor is registered, and the runner knows that it is up.

    The one is heard by the node, the other by the runner, each by a way of its own: which is first is not said.
    """
    pid = await running.worker_pid(worker)
    before = node.registry.peer(name)
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: node.registry.peer(name) not in (None, before), f"{worker} is registered again")
    registered_s = time.monotonic()

    async def is_up() -> bool:
        row = await running.row(worker)
        return row["pid"] not in (None, pid) and row["state"] in ("connecting", "registering", "ready", "backoff")

    await until(is_up, f"{worker} is up again")
    return Kill(worker, killed_s, registered_s, time.monotonic())


def concerns(kill: Kill, answer: Answer) -> bool:
    """Whether a worker's death explains a refusal."""
    return (
        answer.headers.get("x-worker") == kill.worker
        and answer.sent_s <= kill.ready_s
        and answer.came_s >= kill.killed_s
    )


async def test_random_workers_killed_under_mixed_load_cost_no_answer_but_honest_refusals(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    nodes, names = [node, other_node], ["a", "b", "c", "d"]
    victims = [(name, index) for name in names for index in (0, 1)]
    agents = [agent(name, [n.url for n in nodes], capabilities=[name]) for name in (*names, "calm")]
    kills: list[Kill] = []
    async with (
        cluster(tmp_path, *agents, handlers=ECHO, supervision=MANY_RESTARTS) as running,
        AsyncExitStack() as stack,
    ):
        await all_ready(running)
        for each in nodes:
            for name in (*names, "calm"):
                await each.wait_for(name)
        calm_pids = [(await running.row(w))["pid"] for w in ("calm_server", "calm_server_2")]
        paths = [f"/agents/{name}/query" for name in names] + [f"/workers/{name}_server_2/query" for name in names]
        mixed = await stack.enter_async_context(http_load(running, *paths, clients=24))
        calm = await stack.enter_async_context(http_load(running, "/agents/calm/query", clients=8))
        by_node = [await stack.enter_async_context(node_load(each, *names)) for each in nodes]
        calm_by_node = [await stack.enter_async_context(node_load(each, "calm", askers=2)) for each in nodes]
        await until(lambda: mixed.right > 100, "there is load")
        up_s = dict.fromkeys(victims, time.monotonic())
        for _ in range(KILLS):
            settled = await until(
                lambda: [each for each in victims if time.monotonic() - up_s[each] > 1.0], "one is up for a second"
            )
            name, index = victim = random.choice(settled)
            kills.append(await kill_and_wait(running, nodes[index], name, f"{name}_server{'_2' * index}"))
            up_s[victim] = time.monotonic()
        before = mixed.right
        await until(lambda: mixed.right > before + 100, "all goes on")
        rows = await running.rows()
        for load in (mixed, calm, *by_node, *calm_by_node):
            load.stop()
    took_ms = sorted((kill.registered_s - kill.killed_s) * 1000 for kill in kills)
    registered = f"registered again: median {statistics.median(took_ms):.0f} ms, longest {took_ms[-1]:.0f} ms"
    report(f"{KILLS} kills", registered, f"HTTP, victims: {mixed}", f"HTTP, survivors: {calm}")
    report(f"{KILLS} kills", *(f"node: {load}" for load in (*by_node, *calm_by_node)))
    mixed.assert_nothing_lost()
    for answer in mixed.refused:
        assert any(concerns(kill, answer) for kill in kills), f"refused without a reason: {answer}"
    calm.assert_nothing_lost()
    assert calm.right == calm.asked > 0, "survivors answer everything"
    for load in by_node:
        load.assert_nothing_lost()
    for load in calm_by_node:
        load.assert_nothing_lost()
        assert load.answered == load.asked > 0, "survivors answer everything"
    assert took_ms[-1] < 1000
    assert sum(row["restarts"] for row in rows.values()) == KILLS
    assert [rows[w]["pid"] for w in ("calm_server", "calm_server_2")] == calm_pids


async def test_stopped_worker_is_replaced_in_time_and_its_queries_are_refused(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    supervision = "liveness_timeout_ms = 1500"
    async with cluster(
        tmp_path, agent("e", [node.url, other_node.url]), handlers=ECHO, supervision=supervision
    ) as running:
        await all_ready(running)
        pid, neighbour = await running.worker_pid("e_server"), await running.worker_pid("e_server_2")
        answers: list[Answer] = []

        async def ask(number: int) -> None:
            answers.append(await ask_once(running, f"x{number}", "/workers/e_server/query"))

        os.kill(pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        async with http_load(running, "/workers/e_server_2/query", clients=4) as load:
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(ask, number)
            refused_s = time.monotonic() - stopped_s
            await until(lambda: not alive(pid), "it is ended")
            row = await running.wait_state("e_server", "ready")
            replaced_s = time.monotonic() - stopped_s
        report(
            "SIGSTOP a worker", f"refused after {refused_s * 1000:.0f} ms, replaced after {replaced_s * 1000:.0f} ms"
        )
        assert all(answer.honest_refusal for answer in answers)
        assert replaced_s < 2.5, "liveness_timeout_ms and a second"
        assert row["pid"] != pid
        load.assert_nothing_lost()
        assert load.right == load.asked
        assert await running.worker_pid("e_server_2") == neighbour
        assert "nothing was heard" in running.events("worker_killed")[0]["why"]


async def test_idle_worker_is_not_taken_for_dead_however_short_the_liveness_time_out(
    tmp_path: Path, node: Node
) -> None:
    supervision = "liveness_timeout_ms = 500"
    async with cluster(tmp_path, agent("e", [node.url]), handlers=ECHO, supervision=supervision) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")

        async def old_enough() -> bool:
            row = await running.row("e_server")
            assert row["pid"] == pid, running.log[-2000:]
            return bool(row["uptime_s"] > 1.7)

        await until(old_enough, "it has been idle for three time-outs")
        assert not running.events("worker_killed")


@pytest.mark.parametrize("stopped_s", [0.7, 3.0])
async def test_runner_that_was_stopped_takes_no_worker_for_dead(stopped_s: float, tmp_path: Path, node: Node) -> None:
    supervision = "liveness_timeout_ms = 1000"
    async with cluster(
        tmp_path, agent("e", [node.url]), agent("f", [node.url]), handlers=ECHO, supervision=supervision
    ) as running:
        await all_ready(running)
        pids = {name: row["pid"] for name, row in (await running.rows()).items()}
        for _ in range(3 if stopped_s < 1 else 1):
            os.kill(running.process.pid, signal.SIGSTOP)
            ends = time.monotonic() + stopped_s
            await until(lambda ends=ends: time.monotonic() > ends, "the runner was away for that long")
            os.kill(running.process.pid, signal.SIGCONT)
            assert await running.results("x", agent="e")
        # Two more looks at the heartbeats: a verdict would have fallen by then.
        since = time.monotonic()
        await until(lambda: time.monotonic() - since > 0.6, "the runner has looked twice")
        assert {name: row["pid"] for name, row in (await running.rows()).items()} == pids
        assert not running.events("worker_killed")
        assert not running.events("worker_restarting")


def fork_server(running: Cluster) -> int:
    for child in psutil.Process(running.process.pid).children():
        if "forkserver" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError("there is no fork server")


async def test_fork_server_and_a_worker_killed_at_once_under_load_are_started_again(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path, agent("e", [node.url, other_node.url]), agent("calm", [node.url]), handlers=ECHO
    ) as running:
        await all_ready(running)
        calm_pid = await running.worker_pid("calm_server")
        async with (
            http_load(running, "/agents/e/query", clients=8) as load,
            http_load(running, "/agents/calm/query", clients=8) as calm,
        ):
            for _ in range(3):
                pid, before = await running.worker_pid("e_server"), node.registry.peer("e")
                began_s = time.monotonic()
                os.kill(fork_server(running), signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
                await until(
                    lambda before=before: node.registry.peer("e") not in (None, before), "it is registered again"
                )
                report(
                    "kill -9 the fork server and a worker",
                    f"registered again after {(time.monotonic() - began_s) * 1000:.0f} ms",
                )
                fork_server(running)
        assert len(running.events("fork_server_restarted")) == 3
        report("kill -9 the fork server and a worker", str(load))
        load.assert_nothing_lost()
        calm.assert_nothing_lost()
        assert calm.right == calm.asked > 0
        assert await running.worker_pid("calm_server") == calm_pid
        assert await running.ready()


async def test_crash_loop_fails_alone_and_stays_quiet(tmp_path: Path, node: Node) -> None:
    handlers = (
        ECHO
        + """
class Broken:
    def setup(self):
        os._exit(3)
    def handle(self, body, memory):
        return None, memory
"""
    )
    async with cluster(
        tmp_path,
        agent("good", [node.url]),
        agent("bad", [node.url], handler="handlers.py:Broken"),
        handlers=handlers,
        supervision="max_restarts = 5",
    ) as running:
        await running.wait_state("good_server", "ready")
        async with http_load(running, "/agents/good/query", clients=4) as load:
            row = await running.wait_state("bad_server", "failed")
        load.assert_nothing_lost()
        assert load.right == load.asked > 0
        assert row["restarts"] == 6
        assert row["pid"] is None
        assert len(running.events("worker_failed")) == 1
        assert (await running.row("good_server"))["restarts"] == 0
        refused = await running.ask("x", agent="bad")
        assert refused.status_code == 503
        lines, busy_s, since = len(running.log.splitlines()), cpu_s(running.process.pid), time.monotonic()
        assert lines < 40, running.log
        await until(lambda: time.monotonic() - since > 2.0, "it has been failed for a while")
        share = (cpu_s(running.process.pid) - busy_s) / (time.monotonic() - since)
        report("crash loop", f"{lines} lines of log; the runner's CPU while failed: {share:.1%}")
        assert len(running.log.splitlines()) == lines, "a failed worker says nothing more"
        assert share < 0.1


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


SLOWLY = """
import time

def handle(body, memory):
    time.sleep(0.002)
    return {"type": "t", "properties": {"body": body}}, memory
"""


@pytest.mark.parametrize("handlers", [ECHO, SLOWLY], ids=["fast", "slow"])
async def test_sigterm_under_load_answers_what_was_sent_before_it_and_leaves_nothing(
    handlers: str, tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path,
        agent("e", [node.url, other_node.url], capabilities=["e"]),
        agent("f", [node.url], capabilities=["f"]),
        handlers=handlers,
        supervision="shutdown_timeout_ms = 3000",
    ) as running:
        await all_ready(running)
        await other_node.wait_for("e")
        async with (
            http_load(running, "/agents/e/query", "/workers/e_server_2/query", "/agents/f/query", pause_s=0) as load,
            node_load(node, "e", "f") as by_node,
            node_load(other_node, "e") as by_other,
        ):
            await until(lambda: load.right > 200 and by_node.answered > 20, "there is load")
            running.note_processes()
            signalled_s = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: running.process.poll() is not None, "the runner has ended", 6.0)
            took_s = time.monotonic() - signalled_s
        report("SIGTERM under load", f"ended after {took_s * 1000:.0f} ms; {load}")
        assert running.process.returncode == 0
        assert took_s < 4.0, "shutdown_timeout_ms and a second"
        assert not load.hung
        assert not load.wrong, load.wrong[0]
        owed = [query for query, sent_s in load.lost if sent_s < signalled_s]
        assert not owed, f"{len(owed)} queries that were sent before the signal had no answer"
        by_node.assert_nothing_lost()
        by_other.assert_nothing_lost()
        await running.gone(1.0)
        assert not (running.state_dir / "ipc").exists()
        assert not (running.state_dir / "runner.json").exists()
        assert "e" not in node.registry
        assert "Traceback" not in running.log


async def test_query_held_for_a_worker_that_is_down_is_refused_when_the_runner_ends(tmp_path: Path, node: Node) -> None:
    handlers = """
import pathlib, time
class Agent:
    def setup(self):
        while pathlib.Path("down").exists():
            time.sleep(0.005)
    def handle(self, body, memory):
        pathlib.Path("down").touch()
        pathlib.Path(body).touch()
        time.sleep(3600)
"""
    async with cluster(
        tmp_path,
        agent("slow", [node.url], handler="handlers.py:Agent", handler_timeout_ms=500),
        handlers=handlers,
        supervision="shutdown_timeout_ms = 500",
    ) as running:
        await all_ready(running)
        answers: dict[str, int] = {}

        async def ask(text: str) -> None:
            answers[text] = (await ask_once(running, text)).status

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first")
            await until((tmp_path / "first").exists, "the handler hangs")
            tasks.start_soon(ask, "behind")
            await until(lambda: "first" in answers, "the time-out")
            await until(lambda: len(running.events("worker_started")) == 2, "a successor is starting")
            assert "behind" not in answers, "held for the successor"
            running.process.send_signal(signal.SIGTERM)
        assert answers == {"first": 504, "behind": 503}
        await until(lambda: running.process.poll() == 0, "the runner has ended")


async def test_runner_killed_under_load_leaves_no_worker_and_starts_again_with_what_was_remembered(
    tmp_path: Path, node: Node
) -> None:
    counting = """
import os
def handle(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "t", "properties": {"body": body, "count": count}}, {"count": count}
"""
    counts: list[int] = []
    options = {"memory": "disk"}
    async with cluster(tmp_path, agent("e", [node.url], **options), handlers=counting) as running:
        await all_ready(running)
        async with http_load(running, clients=8) as load:
            load.watch = lambda answer: counts.append(answer.properties["count"]) if answer.right else None
            await until(lambda: load.right > 50, "there is load")
            running.note_processes()
            running.process.kill()
            killed_s = time.monotonic()
            await running.gone(2.0)
            gone_s = time.monotonic() - killed_s
        assert (running.state_dir / "ipc" / "router.sock").exists(), "nothing was cleared"
    assert not load.wrong
    async with cluster(tmp_path, agent("e", [node.url], **options), handlers=counting) as running:
        await all_ready(running)
        again = (await running.results("again"))["properties"]["count"]
        report(
            "kill -9 the runner",
            f"workers gone after {gone_s * 1000:.0f} ms; answered up to {max(counts)}, next {again}",
        )
        # At most what was in flight was counted without an answer.
        assert max(counts) < again <= max(counts) + 8 + 1
        assert await running.stop() == 0


UNIQUE = """
def handle(body, memory):
    seen = memory.setdefault("seen", {})
    seen[body] = seen.get(body, 0) + 1
    memory["count"] = memory.get("count", 0) + 1
    if body == "dump":
        return {"type": "t", "properties": {"body": body, "seen": seen, "count": memory["count"]}}, memory
    return {"type": "t", "properties": {"body": body, "times": seen[body], "count": memory["count"]}}, memory
"""


async def test_disk_memory_of_killed_workers_never_goes_back_behind_an_answer_and_counts_no_query_twice(
    tmp_path: Path, node: Node
) -> None:
    kills = max(KILLS // 8, 3)
    right: list[Answer] = []
    async with cluster(
        tmp_path, agent("e", [node.url], capabilities=["e"], memory="disk"), handlers=UNIQUE, supervision=MANY_RESTARTS
    ) as running:
        await all_ready(running)
        async with http_load(running, clients=8) as load, node_load(node, "e", askers=2) as by_node:
            load.watch = lambda answer: right.append(answer) if answer.right else None
            for _ in range(kills):
                since, before = time.monotonic(), load.right
                await until(
                    lambda since=since, before=before: time.monotonic() > since + 1 and load.right > before + 30,
                    "it has been up for a second, and answers",
                )
                await kill_and_wait(running, node, "e", "e_server")
        report(f"{kills} kills with disk memory", str(load))
        last = (await running.results("dump"))["properties"]
        report(
            f"{kills} kills with disk memory", f"last count {last['count']}, answered {load.right + by_node.answered}"
        )
    load.assert_nothing_lost()
    by_node.assert_nothing_lost()
    assert all(answer.properties["times"] == 1 for answer in right), "counted twice"
    assert set(last["seen"].values()) == {1}, "counted twice"
    assert all(answer.query in last["seen"] for answer in right), "an answered query was forgotten"
    assert last["count"] == len(last["seen"]) >= load.right + by_node.answered
    # In the order of the answers, a query that was sent after one is counted after it.
    highest, came = 0, sorted(right, key=lambda answer: answer.came_s)
    for answer in sorted(right, key=lambda answer: answer.sent_s):
        while came and came[0].came_s < answer.sent_s:
            highest = max(highest, came.pop(0).properties["count"])
        assert answer.properties["count"] > highest, "lower than an answer before it"


async def test_failed_worker_is_tried_again_after_a_pause(tmp_path: Path, node: Node) -> None:
    (tmp_path / "handlers.py").write_text(
        """
import os, pathlib
class Agent:
    def setup(self):
        if not (pathlib.Path(__file__).parent / "mended").exists():
            os._exit(3)
    def handle(self, body, memory):
        return body, memory
"""
    )
    handler = parse_handler("handlers.py:Agent", tmp_path)
    spec = WorkerSpec(
        name="e_server",
        agent=AgentConfig(name="e", handler=handler, nodes=(parse_node(node.url),)),
        node=parse_node(node.url),
        index=1,
        state_dir=tmp_path,
        log_level="error",
    )
    router, fork_server = Router(tmp_path / "router.sock"), ForkServer()
    fork_server.start()
    supervisor = Supervisor([spec], RestartPolicy(max_restarts=2, retry_s=0.3), fork_server, router, 1.0)
    router.open()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run)
            for restarts in (3, 6):  # the whole intensity, each time
                await until(
                    lambda restarts=restarts: (
                        supervisor.rows[0].state == "failed" and supervisor.rows[0].restarts == restarts
                    ),
                    "it is failed, and tried again",
                )
            (tmp_path / "mended").touch()
            await until(lambda: supervisor.rows[0].state == "ready", "it is tried again, and well")
            await supervisor.drain()
    finally:
        router.close()
    assert "e" not in node.registry
