"""Processes that are killed or stopped under load.

One worker is unavailable for a moment. Unless the runner itself is killed, each query gets its
result or a refusal.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
import psutil
import pytest

from disco import Node
from runner.routing.router import Router
from runner.supervision.fork_server import ForkServer
from runner.supervision.restarts import RestartPolicy
from runner.supervision.supervisor import Supervisor
from shared.config.load import Agent as AgentConfig
from shared.config.load import WorkerSpec, parse_handler
from shared.config.nodes import parse_node
from shared.config.schema import RunnerOptions, RunnerSection, SupervisionSection
from tests.chaos.load import ECHO, Response, all_ready, ask_once, http_load, node_load, report
from tests.cluster import ACCEPTS_QUERIES, Cluster, agent, alive, cluster, until

pytestmark = pytest.mark.anyio

KILLS = int(os.environ.get("EM_CHAOS_KILLS", "40"))
MANY_RESTARTS = "max_restarts = 1000\n"


class Kill(NamedTuple):
    """A kill of a worker, and when its new process was registered at the node and then up."""

    worker: str
    killed_s: float
    registered_s: float
    up_s: float


async def kill_and_wait(running: Cluster, node: Node, name: str, worker: str) -> Kill:
    """Kill a worker, and wait until its new process is registered and the runner shows it as up.

    The node and the runner learn of the new process independently, in either order.
    """
    pid = await running.worker_pid(worker)
    before = node.registry.connection(name)
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    await until(
        lambda: node.registry.connection(name) not in (None, before), f"{name} is registered"
    )
    registered_s = time.monotonic()

    async def is_up() -> bool:
        row = await running.row(worker)
        return row["pid"] not in (None, pid) and row["state"] in ACCEPTS_QUERIES

    await until(is_up, f"{worker} is up")
    return Kill(worker, killed_s, registered_s, time.monotonic())


def explains(kill: Kill, refusal: Response) -> bool:
    """Return whether a query was refused because of this kill."""
    return (
        refusal.headers.get("x-worker") == kill.worker
        and refusal.sent_s <= kill.up_s
        and refusal.received_s >= kill.killed_s
    )


async def test_killing_workers_under_load_loses_no_query(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    nodes, names = [node, other_node], ["a", "b", "c", "d"]
    victims = [(name, index) for name in names for index in (0, 1)]
    urls = [each.url for each in nodes]
    agents = [agent(name, urls, capabilities=[name]) for name in (*names, "calm")]
    kills: list[Kill] = []
    async with (
        cluster(tmp_path, *agents, handlers=ECHO, supervision=MANY_RESTARTS) as running,
        AsyncExitStack() as stack,
    ):
        await all_ready(running)
        for each in nodes:
            for name in (*names, "calm"):
                await each.wait_for(name)
        calm_workers = ("calm_server", "calm_server_2")
        calm_pids = [await running.worker_pid(worker) for worker in calm_workers]
        paths = [f"/agents/{name}/query" for name in names] + [
            f"/workers/{name}_server_2/query" for name in names
        ]
        mixed = await stack.enter_async_context(http_load(running, *paths, clients=24))
        calm = await stack.enter_async_context(http_load(running, "/agents/calm/query", clients=8))
        by_node = [await stack.enter_async_context(node_load(each, *names)) for each in nodes]
        calm_by_node = [
            await stack.enter_async_context(node_load(each, "calm", clients=2)) for each in nodes
        ]
        await until(lambda: mixed.answered > 100, "queries are answered")
        up_s = dict.fromkeys(victims, time.monotonic())
        for _ in range(KILLS):
            settled = await until(
                lambda: [each for each in victims if time.monotonic() - up_s[each] > 1.0],
                "a worker has been up for a second",
            )
            name, index = victim = random.choice(settled)
            worker = f"{name}_server{'_2' * index}"
            kills.append(await kill_and_wait(running, nodes[index], name, worker))
            up_s[victim] = time.monotonic()
        before = mixed.answered
        await until(lambda: mixed.answered > before + 100, "more queries are answered")
        rows = await running.rows()
        for load in (mixed, calm, *by_node, *calm_by_node):
            load.stop()
    took_ms = sorted((kill.registered_s - kill.killed_s) * 1000 for kill in kills)
    median_ms = statistics.median(took_ms)
    report(
        f"{KILLS} kills",
        f"registered again: median {median_ms:.0f} ms, longest {took_ms[-1]:.0f} ms",
        f"HTTP, killed workers: {mixed}",
        f"HTTP, other workers: {calm}",
        *(f"node: {load}" for load in (*by_node, *calm_by_node)),
    )
    mixed.assert_nothing_lost()
    for refusal in mixed.refused:
        assert any(explains(kill, refusal) for kill in kills), f"no kill explains {refusal}"
    calm.assert_nothing_lost()
    assert calm.answered == calm.asked > 0, "the other workers answer all queries"
    for load in by_node:
        load.assert_nothing_lost()
    for load in calm_by_node:
        load.assert_nothing_lost()
        assert load.answered == load.asked > 0, "the other workers answer all queries"
    assert took_ms[-1] < 10_000
    assert sum(row["restarts"] for row in rows.values()) == KILLS
    assert [rows[worker]["pid"] for worker in calm_workers] == calm_pids


async def test_stopped_worker_is_replaced_and_its_queries_are_refused(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    supervision = "liveness_timeout_ms = 3000"
    async with cluster(
        tmp_path, agent("e", [node.url, other_node.url]), handlers=ECHO, supervision=supervision
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")
        other_pid = await running.worker_pid("e_server_2")
        responses: list[Response] = []

        async def ask(number: int) -> None:
            responses.append(await ask_once(running, f"x{number}", "/workers/e_server/query"))

        os.kill(pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        async with http_load(running, "/workers/e_server_2/query", clients=4) as load:
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(ask, number)
            refused_s = time.monotonic() - stopped_s
            await until(lambda: not alive(pid), "the stopped process has exited")
            row = await running.wait_state("e_server", "ready")
            replaced_s = time.monotonic() - stopped_s
        report(
            "SIGSTOP a worker",
            f"refused after {refused_s * 1000:.0f} ms, replaced after {replaced_s * 1000:.0f} ms",
        )
        assert all(response.is_refusal for response in responses)
        assert replaced_s < 9, "sooner than with the default of liveness_timeout_ms"
        assert row["pid"] != pid
        load.assert_nothing_lost()
        assert load.answered == load.asked
        assert await running.worker_pid("e_server_2") == other_pid
        assert " 3000 " in running.events("worker_killed")[0]["reason"]


async def test_idle_worker_is_not_killed_with_a_short_liveness_timeout(
    tmp_path: Path, node: Node
) -> None:
    supervision = "liveness_timeout_ms = 1500"
    async with cluster(
        tmp_path, agent("e", [node.url]), handlers=ECHO, supervision=supervision
    ) as running:
        await all_ready(running)
        pid = await running.worker_pid("e_server")

        async def old_enough() -> bool:
            row = await running.row("e_server")
            assert row["pid"] == pid, running.log[-2000:]
            return bool(row["uptime_s"] > 3.5)

        await until(old_enough, "it has been idle for two timeouts")
        assert not running.events("worker_killed")


@pytest.mark.parametrize("stopped_s", [1.4, 4.0])
async def test_runner_kills_no_worker_after_it_was_stopped_itself(
    stopped_s: float, tmp_path: Path, node: Node
) -> None:
    supervision = "liveness_timeout_ms = 2000"
    async with cluster(
        tmp_path,
        agent("e", [node.url]),
        agent("f", [node.url]),
        handlers=ECHO,
        supervision=supervision,
    ) as running:
        await all_ready(running)
        pids = {name: row["pid"] for name, row in (await running.rows()).items()}
        for _ in range(3 if stopped_s < 2 else 1):
            os.kill(running.process.pid, signal.SIGSTOP)
            ends = time.monotonic() + stopped_s
            await until(lambda ends=ends: time.monotonic() > ends, f"{stopped_s} s have passed")
            os.kill(running.process.pid, signal.SIGCONT)
            assert await running.results("x", agent="e")
        # In this time the runner checks the heartbeats twice.
        since = time.monotonic()
        await until(lambda: time.monotonic() - since > 1.1, "1.1 s have passed")
        assert {name: row["pid"] for name, row in (await running.rows()).items()} == pids
        assert not running.events("worker_killed")
        assert not running.events("worker_restarting")


def fork_server_pid(running: Cluster) -> int:
    for child in psutil.Process(running.process.pid).children():
        if "forkserver" in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError("no fork server is running")


async def test_fork_server_and_worker_killed_together_are_restarted(
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
                pid, before = await running.worker_pid("e_server"), node.registry.connection("e")
                began_s = time.monotonic()
                os.kill(fork_server_pid(running), signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
                await until(
                    lambda before=before: node.registry.connection("e") not in (None, before),
                    "the worker is registered again",
                )
                report(
                    "kill -9 the fork server and a worker",
                    f"registered again after {(time.monotonic() - began_s) * 1000:.0f} ms",
                )
                assert alive(fork_server_pid(running))
        report("kill -9 the fork server and a worker", str(load))
        load.assert_nothing_lost()
        calm.assert_nothing_lost()
        assert calm.answered == calm.asked > 0
        assert await running.worker_pid("calm_server") == calm_pid
        assert await running.ready()


@asynccontextmanager
async def crash_loop(tmp_path: Path, node: Node) -> AsyncIterator[Cluster]:
    """Run `good`, and `bad` whose worker exits at each start."""
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
        yield running


async def test_worker_in_a_crash_loop_fails_without_affecting_others(
    tmp_path: Path, node: Node
) -> None:
    async with crash_loop(tmp_path, node) as running:
        async with http_load(running, "/agents/good/query", clients=4) as load:
            row = await running.wait_state("bad_server", "failed")
        load.assert_nothing_lost()
        assert load.answered == load.asked > 0
        assert row["restarts"] == 6
        assert row["pid"] is None
        assert len(running.events("worker_failed")) == 1
        assert (await running.row("good_server"))["restarts"] == 0
        refused = await running.ask("x", agent="bad")
        assert refused.status_code == 503


async def test_failed_worker_causes_no_log_lines_and_almost_no_cpu_load(
    tmp_path: Path, node: Node
) -> None:
    async with crash_loop(tmp_path, node) as running:
        await running.wait_state("bad_server", "failed")
        lines = len(running.log.splitlines())
        assert lines < 40, running.log
        used_s, since = cpu_s(running.process.pid), time.monotonic()
        await until(lambda: time.monotonic() - since > 2.0, "2 s have passed")
        share = (cpu_s(running.process.pid) - used_s) / (time.monotonic() - since)
        report("crash loop", f"{lines} lines of log; the runner's CPU while failed: {share:.1%}")
        assert len(running.log.splitlines()) == lines
        assert share < 0.1


def cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


SLOW = """
import time

def handle(body, memory):
    time.sleep(0.002)
    return {"type": "t", "properties": {"body": body}}, memory
"""


@pytest.mark.parametrize("handlers", [ECHO, SLOW], ids=["fast", "slow"])
async def test_sigterm_under_load_answers_earlier_queries_and_leaves_nothing(
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
            http_load(
                running,
                "/agents/e/query",
                "/workers/e_server_2/query",
                "/agents/f/query",
                pause_s=0,
            ) as load,
            node_load(node, "e", "f") as by_node,
            node_load(other_node, "e") as by_other,
        ):
            await until(
                lambda: load.answered > 200 and by_node.answered > 20, "queries are answered"
            )
            running.record_processes()
            signalled_s = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            await until(lambda: running.process.poll() is not None, "the runner has exited")
            took_s = time.monotonic() - signalled_s
        report("SIGTERM under load", f"exited after {took_s * 1000:.0f} ms; {load}")
        assert running.process.returncode == 0
        assert took_s < 10, "soon after shutdown_timeout_ms"
        assert not load.hung
        assert not load.wrong, load.wrong[0]
        lost = [query for query, sent_s in load.lost if sent_s < signalled_s]
        assert not lost, f"{len(lost)} queries sent before the signal got no response"
        by_node.assert_nothing_lost()
        by_other.assert_nothing_lost()
        await running.wait_exited()
        assert not (running.state_dir / "ipc").exists()
        assert not (running.state_dir / "runner.json").exists()
        await node.wait_until(lambda: "e" not in node.registry)
        assert "Traceback" not in running.log


async def test_shutdown_refuses_a_query_held_for_a_starting_worker(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import pathlib, time
class Agent:
    def setup(self):
        while pathlib.Path("block-setup").exists():
            time.sleep(0.005)
    def handle(self, body, memory):
        pathlib.Path("block-setup").touch()
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
        statuses: dict[str, int] = {}

        async def ask(text: str) -> None:
            statuses[text] = (await ask_once(running, text)).status

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first")
            await until((tmp_path / "first").exists, "the handler hangs")
            tasks.start_soon(ask, "held")
            await until(lambda: "first" in statuses, "the first query has timed out")
            await until(
                lambda: len(running.events("worker_started")) == 2, "a new process is starting"
            )
            assert "held" not in statuses, "the query is held for the new process"
            running.process.send_signal(signal.SIGTERM)
        assert statuses == {"first": 504, "held": 503}
        await until(lambda: running.process.poll() == 0, "the runner has exited")


async def test_killed_runner_leaves_no_worker_and_its_next_start_keeps_memories(
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
            load.on_response = lambda response: (
                counts.append(response.properties["count"]) if response.is_correct else None
            )
            await until(lambda: load.answered > 50, "queries are answered")
            running.record_processes()
            running.process.kill()
            killed_s = time.monotonic()
            await running.wait_exited()
            exited_s = time.monotonic() - killed_s
        assert (running.state_dir / "ipc" / "router.sock").exists(), (
            "the runner had no time to remove its files"
        )
    assert not load.wrong
    async with cluster(tmp_path, agent("e", [node.url], **options), handlers=counting) as running:
        await all_ready(running)
        count = (await running.results("next"))["properties"]["count"]
        report(
            "kill -9 the runner",
            f"the workers exited after {exited_s * 1000:.0f} ms",
            f"the highest count in a response was {max(counts)}, the next is {count}",
        )
        # Each of the 8 clients can have had one query that was counted without a response.
        assert max(counts) < count <= max(counts) + 8 + 1
        assert await running.stop() == 0


COUNT_EACH = """
def handle(body, memory):
    seen = memory.setdefault("seen", {})
    seen[body] = seen.get(body, 0) + 1
    memory["count"] = memory.get("count", 0) + 1
    properties = {"body": body, "times": seen[body], "count": memory["count"]}
    if body == "dump":
        properties["seen"] = seen
    return {"type": "t", "properties": properties}, memory
"""


async def test_disk_memory_of_killed_workers_counts_each_answered_query_once(
    tmp_path: Path, node: Node
) -> None:
    kills = max(KILLS // 8, 3)
    correct: list[Response] = []
    async with cluster(
        tmp_path,
        agent("e", [node.url], capabilities=["e"], memory="disk"),
        handlers=COUNT_EACH,
        supervision=MANY_RESTARTS,
    ) as running:
        await all_ready(running)
        async with (
            http_load(running, clients=8) as load,
            node_load(node, "e", clients=2) as by_node,
        ):
            load.on_response = lambda response: (
                correct.append(response) if response.is_correct else None
            )
            for _ in range(kills):
                since, before = time.monotonic(), load.answered
                await until(
                    lambda since=since, before=before: (
                        time.monotonic() > since + 1 and load.answered > before + 30
                    ),
                    "it has answered more than 30 queries in a second or more",
                )
                await kill_and_wait(running, node, "e", "e_server")
        last = (await running.results("dump"))["properties"]
        answered = load.answered + by_node.answered
        report(
            f"{kills} kills with disk memory",
            load,
            f"last count {last['count']}, answered {answered}",
        )
    load.assert_nothing_lost()
    by_node.assert_nothing_lost()
    assert all(each.properties["times"] == 1 for each in correct), "no query was counted twice"
    assert set(last["seen"].values()) == {1}, "no query was counted twice"
    assert all(each.query in last["seen"] for each in correct), "each answered query is remembered"
    assert last["count"] == len(last["seen"]) >= answered
    # If a query is sent after a response has arrived, its count is higher than that response's.
    highest, received = 0, sorted(correct, key=lambda each: each.received_s)
    for response in sorted(correct, key=lambda each: each.sent_s):
        while received and received[0].received_s < response.sent_s:
            highest = max(highest, received.pop(0).properties["count"])
        assert response.properties["count"] > highest, "higher than in all earlier responses"


async def test_failed_worker_is_restarted_after_a_pause(tmp_path: Path, node: Node) -> None:
    (tmp_path / "handlers.py").write_text(
        """
import os, pathlib
class Agent:
    def setup(self):
        if not (pathlib.Path(__file__).parent / "fixed").exists():
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
        runner=RunnerOptions(state_dir=tmp_path, log_level="error"),
    )
    router, fork_server = Router(tmp_path / "router.sock", RunnerSection()), ForkServer()
    fork_server.start()
    supervision = SupervisionSection(max_restarts=2, shutdown_timeout_ms=1000)
    policy = RestartPolicy(supervision=supervision, retry_s=0.3)
    supervisor = Supervisor([spec], policy, fork_server, router)
    router.open()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run)
            for restarts in (3, 6):  # max_restarts and one, each time
                await until(
                    lambda restarts=restarts: (
                        supervisor.rows[0].state == "failed"
                        and supervisor.rows[0].restarts == restarts
                    ),
                    f"it has failed after {restarts} restarts",
                )
            (tmp_path / "fixed").touch()
            await until(lambda: supervisor.rows[0].state == "ready", "it is restarted and ready")
            await supervisor.drain()
    finally:
        router.close()
    await node.wait_until(lambda: "e" not in node.registry)
