"""The soak test: a small cluster under load whose workers are killed and whose connections are cut.

    scripts/soak.sh MINUTES          python -m tests.chaos.soak --seconds 30 --seed 7

Prints a table at the end. The exit status is 1 if a query was lost or answered wrongly, or if a
resource grew past its bound. Each query has one of these results:

- answered: the response has the text of this query. A counter counts each answered query once.
- refused: over HTTP, a complete 503 with `Retry-After`. At a node, no result at once, because no
  agent was registered or its worker or its connection ended during the query.
- lost: no response. Over HTTP, the connection ended or the query hangs. At a node, no result before
  its timeout.
- wrong: all else. Examples are the response to another query, another status, no result from a
  worker that still runs, and a count that was given before or is lower than an earlier one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import psutil
import uvloop

from disco import Node, NodeSettings, serve
from shared.logs import logger as logs
from tests.chaos.load import HttpLoad, Response, http_load
from tests.chaos.proxy import Proxy, proxied
from tests.cluster import Cluster, agent, cluster, until

HANDLERS = """
def echo(body, memory):
    return {"type": "echo", "properties": {"body": body}}, memory

async def aecho(body, memory):
    return {"type": "echo", "properties": {"body": body}}, memory

def count(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "count", "properties": {"body": body, "count": count}}, {"count": count}
"""
AGENTS = ("echo", "aecho", "counter")
QUERY_TIMEOUT_S = 20.0
HTTP_CLIENTS = 12
NODE_CLIENTS = 3
"""For each agent at each node."""

MIB = 1024 * 1024
RUNNER_GROWTH_BYTES = 12 * MIB
WORKER_GROWTH_BYTES = 12 * MIB
FD_GROWTH = 8


class Resources(NamedTuple):
    """The memory and the file descriptors of the runner, and of the worker that uses most."""

    runner_rss: int
    runner_fds: int
    worker_rss: int
    worker_fds: int

    @classmethod
    async def measure(cls, running: Cluster) -> Resources:
        await running.wait_ready()
        rows = await until(lambda: _all_ready(running), "all workers are ready")
        runner = psutil.Process(running.process.pid)
        workers = [psutil.Process(row["pid"]) for row in rows]
        return cls(
            runner.memory_info().rss,
            runner.num_fds(),
            max(worker.memory_info().rss for worker in workers),
            max(worker.num_fds() for worker in workers),
        )


async def _all_ready(running: Cluster) -> list[dict[str, Any]]:
    rows = list((await running.rows()).values())
    return rows if all(row["state"] == "ready" for row in rows) else []


class Counts:
    """Checks the counts of a counter with disk memory.

    No count occurs twice. If a query is sent after a response has arrived, its count is higher than
    the count of that response.

    Attributes:
        violations: descriptions of the counts that break these rules.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._seen: dict[str, set[int]] = {}
        self._highest: dict[str, list[tuple[float, int]]] = {}

    def check(self, worker: str, count: int, sent_s: float, received_s: float) -> None:
        """Check a worker's next response. Responses are checked in the order of their arrival."""
        seen = self._seen.setdefault(worker, set())
        if count in seen:
            self.violations.append(f"{worker} gave {count} twice")
        seen.add(count)
        # Each item has a time, and the highest count that had arrived by then.
        highest = self._highest.setdefault(worker, [])
        for at_s, earlier in reversed(highest):
            if at_s < sent_s:
                if earlier >= count:
                    self.violations.append(f"{worker} gave {count} after {earlier}")
                break
        highest.append((received_s, max(count, highest[-1][1] if highest else 0)))
        del highest[:-1000]


class NodeLoad:
    """Queries through one node, and their results.

    Attributes:
        asked, answered, lost, refused, wrong: how many queries had each result, or their texts.
        stopping: whether the clients stop after their next query.
    """

    def __init__(self, node: Node, worker_suffix: str, counts: Counts) -> None:
        self.asked = self.answered = self.lost = 0
        self.refused: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.stopping = False
        self._node = node
        self._suffix = worker_suffix
        self._counts = counts

    async def run(self, name: str, prefix: str) -> None:
        for number in itertools.count():
            if self.stopping:
                return
            await self._ask(name, f"{prefix}-{number}")
            await anyio.sleep(0.01)

    async def _ask(self, name: str, query: str) -> None:
        self.asked += 1
        connection = self._node.registry.connection(name)
        if connection is None:  # without an agent for a capability, the node asks all its agents
            self.refused["no agent registered"] += 1
            return
        sent_s = time.monotonic()
        found = await self._node.query(query, [name])
        received_s = time.monotonic()
        if not found:
            if received_s - sent_s >= QUERY_TIMEOUT_S:
                self.lost += 1
            elif self._node.registry.connection(name) is not connection:
                self.refused["worker or connection ended"] += 1
            else:
                self.wrong.append(f"{name} gave no result for {query}")
        elif len(found) == 1 and found[0]["properties"]["body"] == query:
            self.answered += 1
            if name == "counter":
                count = found[0]["properties"]["count"]
                worker = f"counter_server{self._suffix}"
                self._counts.check(worker, count, sent_s, received_s)
        else:
            self.wrong.append(f"{query}: {found}")


class Chaos:
    """Kills workers and breaks connections, one at a time, at random.

    Attributes:
        done: how often it did each of these.
        stopping: whether it stops.
    """

    def __init__(self, running: Cluster, proxies: list[Proxy], choose: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self.stopping = False
        self._running = running
        self._proxies = proxies
        self._choose = choose

    async def run(self) -> None:
        actions = (
            self._kill_worker,
            self._kill_worker,
            self._close_connections,
            self._reset_connections,
            self._reset_in_mid_frame,
            self._stall,
        )
        while not self.stopping:
            await anyio.sleep(self._choose.uniform(0.2, 1.0))
            if self.stopping:
                return
            await self._choose.choice(actions)()

    async def _kill_worker(self) -> None:
        rows = list((await self._running.rows()).values())
        if (pid := self._choose.choice(rows)["pid"]) is not None:
            self._running.record_processes()
            try:
                os.kill(pid, signal.SIGKILL)
                self.done["workers killed"] += 1
            except ProcessLookupError:
                pass

    async def _close_connections(self) -> None:
        self._choose.choice(self._proxies).close_connections()
        self.done["connections closed"] += 1

    async def _reset_connections(self) -> None:
        self._choose.choice(self._proxies).reset_connections()
        self.done["connections reset"] += 1

    async def _reset_in_mid_frame(self) -> None:
        to_client_bytes = self._choose.randrange(1, 2000)
        self._choose.choice(self._proxies).reset_after(to_client_bytes)
        self.done["connections reset in mid-frame"] += 1

    async def _stall(self) -> None:
        proxy = self._choose.choice(self._proxies)
        proxy.stall(0.8, 0.2)
        await anyio.sleep(0.6)
        await proxy.restore()
        self.done["connections stalled"] += 1


async def soak(seconds: float, seed: int, folder: Path) -> int:
    """Run the soak test, and return the exit status."""
    counts, choose = Counts(), random.Random(seed)
    settings = NodeSettings(port=0, query_timeout_ms=int(QUERY_TIMEOUT_S * 1000))
    async with (
        serve(settings) as one,
        serve(settings) as two,
        proxied(one.port) as first,
        proxied(two.port) as second,
    ):
        urls = [first.url, second.url]
        agents = [
            agent("echo", urls, handler="handlers.py:echo", capabilities=["echo"]),
            agent(
                "aecho",
                urls,
                handler="handlers.py:aecho",
                capabilities=["aecho"],
                memory="none",
                concurrency=8,
            ),
            agent(
                "counter",
                urls,
                handler="handlers.py:count",
                capabilities=["counter"],
                memory="disk",
            ),
        ]
        async with cluster(
            folder,
            *agents,
            handlers=HANDLERS,
            connection="reconnect_interval_ms = 200",
            supervision="max_restarts = 1000",  # no worker must fail because of the kills
        ) as running:
            await until(lambda: _all_ready(running), "all workers are ready")
            return await _load_and_break(
                running, [one, two], [first, second], counts, choose, seconds
            )


async def _load_and_break(
    running: Cluster,
    nodes: list[Node],
    proxies: list[Proxy],
    counts: Counts,
    choose: random.Random,
    seconds: float,
) -> int:
    node_loads = [
        NodeLoad(node, suffix, counts) for node, suffix in zip(nodes, ("", "_2"), strict=True)
    ]
    chaos = Chaos(running, proxies, choose)

    def check_count(response: Response) -> None:
        if not response.is_correct:
            return
        worker = response.headers["x-worker"]
        if worker.startswith("counter"):
            count = response.properties["count"]
            counts.check(worker, count, response.sent_s, response.received_s)

    paths = [f"/agents/{name}/query" for name in AGENTS] + ["/workers/counter_server_2/query"]
    began_s = time.monotonic()
    async with http_load(running, *paths, clients=HTTP_CLIENTS, pause_s=0.01) as http:
        http.on_response = check_count
        async with anyio.create_task_group() as tasks:
            for number, load in enumerate(node_loads):
                for name, client in itertools.product(AGENTS, range(NODE_CLIENTS)):
                    tasks.start_soon(load.run, name, f"{number}-{name}-{client}")
            await anyio.sleep(seconds * 0.05)
            tasks.start_soon(chaos.run)
            await anyio.sleep(seconds * 0.15)  # until everything has been used once
            start = await Resources.measure(running)
            await anyio.sleep(max(0.0, began_s + seconds - time.monotonic()))
            chaos.stopping = True
            for proxy in proxies:
                await proxy.restore()
            end = await Resources.measure(running)
            for load in node_loads:
                load.stopping = True
    rows = await until(lambda: _all_ready(running), "all workers are ready")
    status = await running.stop()
    took_s = time.monotonic() - began_s
    return _report(took_s, http, node_loads, counts, chaos, rows, start, end, status)


def _report(
    seconds: float,
    http: HttpLoad,
    nodes: list[NodeLoad],
    counts: Counts,
    chaos: Chaos,
    rows: list[dict[str, Any]],
    start: Resources,
    end: Resources,
    status: int,
) -> int:
    """Print the results and the faults, and return the exit status."""
    node_refused: Counter[str] = Counter()
    for load in nodes:
        node_refused += load.refused
    wrong = [
        *map(str, http.wrong),
        *(each for load in nodes for each in load.wrong),
        *counts.violations,
    ]
    http_lost = len(http.lost) + len(http.hung)
    node_lost = sum(load.lost for load in nodes)
    restarts = sum(row["restarts"] for row in rows)
    failures = sum(row["connection_failures"] for row in rows)
    kills = chaos.done["workers killed"]
    table = [
        ("", "HTTP", "nodes"),
        ("asked", http.asked, sum(load.asked for load in nodes)),
        ("answered", http.answered, sum(load.answered for load in nodes)),
        ("refused", len(http.refused), node_refused.total()),
        ("lost", http_lost, node_lost),
        ("wrong", len(http.wrong), sum(len(load.wrong) for load in nodes)),
        ("", "", ""),
        ("", "start", "end"),
        ("runner RSS, MB", f"{start.runner_rss / MIB:.1f}", f"{end.runner_rss / MIB:.1f}"),
        ("runner descriptors", start.runner_fds, end.runner_fds),
        ("largest worker RSS, MB", f"{start.worker_rss / MIB:.1f}", f"{end.worker_rss / MIB:.1f}"),
        ("most worker descriptors", start.worker_fds, end.worker_fds),
    ]
    print(f"\nsoak: {seconds:.0f} s, {len(rows)} workers")
    for row in table:
        print(f"{row[0]:<26}{row[1]:>12}{row[2]:>12}")
    print(f"\nfaults caused: {_list(chaos.done)}")
    print(f"restarts {restarts}, connection failures {failures}")
    print(f"refused by nodes: {_list(node_refused)}")
    print(f"wrong counts of a counter: {len(counts.violations)}")
    print(f"HTTP: p50 {http.percentile_ms(50):.1f} ms, p99 {http.percentile_ms(99):.1f} ms")
    faults = [f"wrong: {each}"[:300] for each in wrong[:10]]
    if http_lost + node_lost:
        faults.append(f"lost: {http_lost + node_lost}")
    if end.runner_rss > start.runner_rss + RUNNER_GROWTH_BYTES:
        faults.append(f"the runner grew by more than {RUNNER_GROWTH_BYTES // MIB} MB")
    if end.worker_rss > start.worker_rss + WORKER_GROWTH_BYTES:
        faults.append(f"a worker grew by more than {WORKER_GROWTH_BYTES // MIB} MB")
    if max(end.runner_fds - start.runner_fds, end.worker_fds - start.worker_fds) > FD_GROWTH:
        faults.append(f"more than {FD_GROWTH} descriptors were left open")
    if not kills or restarts < kills:
        faults.append("fewer restarts than kills, or no kills")
    if status != 0:
        faults.append(f"the runner exited with status {status}")
    for fault in faults:
        print(f"FAILED: {fault}")
    print("soak: failed" if faults else "soak: nothing lost, nothing wrong, no resource leaked")
    return 1 if faults else 0


def _list(counter: Counter[str]) -> str:
    items = (f"{count} {name}" for name, count in sorted(counter.items()))
    return ", ".join(items) or "none"


def main() -> int:
    """Run the soak test with the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"soak: {options.seconds:g} s, seed {options.seed}", flush=True)
    logs.configure("error")  # the log of the embedded nodes
    with tempfile.TemporaryDirectory(prefix="em-soak-") as folder:
        return uvloop.run(soak(options.seconds, options.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
