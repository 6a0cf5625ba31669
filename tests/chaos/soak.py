"""The soak: a small cluster under mixed load while its workers are killed and its lines are cut.

    scripts/soak.sh MINUTES          python -m tests.chaos.soak --seconds 30 --seed 7

Prints a table at the end, and leaves with status 1 when a query was lost or answered wrongly, or
something grew past its bound. How each query is accounted for:

- answered: with what its handler made of this very query; a counter's answer counts it exactly once.
- refused: over HTTP an honest 503 with Retry-After; by a node, at once, because nobody was
  registered, or the worker or its line died under the query.
- lost: no answer at all: an HTTP connection that ended, or one that hangs; at a node, its time-out.
- wrong: any other answer: another query's, another status, `null` from a worker that is well, a
  count that was given before or that forgets one that was.
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
from shared import logs
from tests.chaos.load import Answer, HttpLoad, http_load
from tests.chaos.proxy import Line, proxied
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
QUERY_TIMEOUT_S = 5.0
HTTP_CLIENTS = 12
NODE_CLIENTS = 3
"""For each agent at each node."""

MIB = 1024 * 1024
RUNNER_GROWTH_BYTES = 12 * MIB
WORKER_GROWTH_BYTES = 12 * MIB
FD_GROWTH = 8


class Measure(NamedTuple):
    """What the processes hold; of the workers, the one that holds most."""

    runner_rss: int
    runner_fds: int
    worker_rss: int
    worker_fds: int

    @classmethod
    async def take(cls, running: Cluster) -> Measure:
        await running.wait_ready()
        rows = await until(lambda: _all_ready(running), "all workers are ready", 30)
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
    """Holds a counter with disk memory to its word: each count once, none below one that was answered before."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        self._given: dict[str, set[int]] = {}
        self._answers: dict[str, list[tuple[float, int]]] = {}

    def take(self, worker: str, count: int, sent_s: float, came_s: float) -> None:
        given = self._given.setdefault(worker, set())
        if count in given:
            self.broken.append(f"{worker} gave {count} twice")
        given.add(count)
        answers = self._answers.setdefault(worker, [])
        for at_s, earlier in reversed(answers):
            if at_s < sent_s:
                if earlier >= count:
                    self.broken.append(f"{worker} gave {count} after {earlier}")
                break
        # Ascending in both: the highest count that was answered by then.
        answers.append((came_s, max(count, answers[-1][1] if answers else 0)))
        del answers[:-1000]


class NodeLoad:
    """Queries by way of one node, each accounted for."""

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
        peer = self._node.registry.peer(name)
        if peer is None:  # a node with nobody to ask for this capability would ask everybody
            self.asked += 1
            self.refused["nobody registered"] += 1
            return
        self.asked += 1
        sent_s = time.monotonic()
        found = await self._node.query(query, [name])
        came_s = time.monotonic()
        if not found:
            if came_s - sent_s >= QUERY_TIMEOUT_S:
                self.lost += 1
            elif self._node.registry.peer(name) is not peer:
                self.refused["its worker or line died"] += 1
            else:
                self.wrong.append(f"{name} answered null to {query}")
        elif len(found) == 1 and found[0]["properties"]["body"] == query:
            self.answered += 1
            if name == "counter":
                count = found[0]["properties"]["count"]
                self._counts.take(f"counter_server{self._suffix}", count, sent_s, came_s)
        else:
            self.wrong.append(f"{query}: {found}")


class Chaos:
    """Kills workers and breaks lines, one at a time, at random."""

    def __init__(self, running: Cluster, lines: list[Line], choose: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self.stopping = False
        self._running = running
        self._lines = lines
        self._choose = choose

    async def run(self) -> None:
        while not self.stopping:
            await anyio.sleep(self._choose.uniform(0.2, 1.0))
            if self.stopping:
                return
            kinds = (self._kill, self._kill, self._cut, self._reset, self._reset_in_mid_frame, self._stall)
            await self._choose.choice(kinds)()

    async def _kill(self) -> None:
        rows = list((await self._running.rows()).values())
        if (pid := self._choose.choice(rows)["pid"]) is not None:
            self._running.note_processes()
            try:
                os.kill(pid, signal.SIGKILL)
                self.done["workers killed"] += 1
            except ProcessLookupError:
                pass

    async def _cut(self) -> None:
        self._choose.choice(self._lines).cut()
        self.done["lines cut"] += 1

    async def _reset(self) -> None:
        self._choose.choice(self._lines).reset()
        self.done["lines reset"] += 1

    async def _reset_in_mid_frame(self) -> None:
        self._choose.choice(self._lines).reset_after(self._choose.randrange(1, 2000))
        self.done["lines reset in mid-frame"] += 1

    async def _stall(self) -> None:
        line = self._choose.choice(self._lines)
        line.stall(0.8, 0.2)
        await anyio.sleep(0.6)
        await line.mend()
        self.done["lines stalled"] += 1


async def soak(seconds: float, seed: int, folder: Path) -> int:
    """Run it; return the exit status."""
    counts, choose = Counts(), random.Random(seed)
    settings = NodeSettings(port=0, query_timeout_ms=int(QUERY_TIMEOUT_S * 1000))
    async with serve(settings) as one, serve(settings) as two, proxied(one.port) as first, proxied(two.port) as second:
        urls = [first.url, second.url]
        agents = [
            agent("echo", urls, handler="handlers.py:echo", capabilities=["echo"]),
            agent("aecho", urls, handler="handlers.py:aecho", capabilities=["aecho"], memory="none", concurrency=8),
            agent("counter", urls, handler="handlers.py:count", capabilities=["counter"], memory="disk"),
        ]
        async with cluster(
            folder,
            *agents,
            handlers=HANDLERS,
            connection="reconnect_interval_ms = 200",
            supervision="max_restarts = 1000",  # the kills are ours: no worker is to be given up for them
        ) as running:
            await until(lambda: _all_ready(running), "all workers are ready", 30)
            return await _load_and_break(running, [one, two], [first, second], counts, choose, seconds)


async def _load_and_break(
    running: Cluster, nodes: list[Node], lines: list[Line], counts: Counts, choose: random.Random, seconds: float
) -> int:
    node_loads = [NodeLoad(node, suffix, counts) for node, suffix in zip(nodes, ("", "_2"), strict=True)]
    chaos = Chaos(running, lines, choose)

    def watch(answer: Answer) -> None:
        if answer.right and answer.headers["x-worker"].startswith("counter"):
            count = answer.properties["count"]
            counts.take(answer.headers["x-worker"], count, answer.sent_s, answer.came_s)

    paths = [f"/agents/{name}/query" for name in AGENTS] + ["/workers/counter_server_2/query"]
    began_s = time.monotonic()
    async with http_load(running, *paths, clients=HTTP_CLIENTS, pause_s=0.01) as http:
        http.watch = watch
        async with anyio.create_task_group() as tasks:
            for number, load in enumerate(node_loads):
                for name, client in itertools.product(AGENTS, range(NODE_CLIENTS)):
                    tasks.start_soon(load.run, name, f"{number}-{name}-{client}")
            await anyio.sleep(seconds * 0.05)
            tasks.start_soon(chaos.run)
            await anyio.sleep(seconds * 0.15)  # what is made once is made, then it counts
            start = await Measure.take(running)
            await anyio.sleep(max(0.0, began_s + seconds - time.monotonic()))
            chaos.stopping = True
            for line in lines:
                await line.mend()
            end = await Measure.take(running)
            for load in node_loads:
                load.stopping = True
    rows = await until(lambda: _all_ready(running), "all workers are ready", 30)
    status = await running.stop()
    return _tell(time.monotonic() - began_s, http, node_loads, counts, chaos, rows, start, end, status)


def _tell(
    seconds: float,
    http: HttpLoad,
    nodes: list[NodeLoad],
    counts: Counts,
    chaos: Chaos,
    rows: list[dict[str, Any]],
    start: Measure,
    end: Measure,
    status: int,
) -> int:
    refused: Counter[str] = Counter()
    for load in nodes:
        refused += load.refused
    wrong = [*map(str, http.wrong), *(each for load in nodes for each in load.wrong), *counts.broken]
    lost = len(http.lost) + len(http.hung) + sum(load.lost for load in nodes)
    table = [
        ("", "HTTP", "nodes"),
        ("asked", http.asked, sum(load.asked for load in nodes)),
        ("answered", http.right, sum(load.answered for load in nodes)),
        ("refused", len(http.refused), refused.total()),
        ("lost", len(http.lost) + len(http.hung), sum(load.lost for load in nodes)),
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
    print(f"\nbroken: {', '.join(f'{count} {what}' for what, count in sorted(chaos.done.items()))}")
    print(f"restarts {sum(row['restarts'] for row in rows)}, reconnects {sum(row['reconnects'] for row in rows)}")
    print(f"nodes refused: {', '.join(f'{count} {why}' for why, count in refused.items()) or 'none'}")
    print(f"counts that a counter gave twice or forgot: {len(counts.broken)}")
    print(f"HTTP: p50 {http.percentile_ms(50):.1f} ms, p99 {http.percentile_ms(99):.1f} ms")
    faults = [f"wrong: {each}"[:300] for each in wrong[:10]]
    if lost:
        faults.append(f"lost: {lost}")
    if end.runner_rss > start.runner_rss + RUNNER_GROWTH_BYTES:
        faults.append(f"the runner grew by more than {RUNNER_GROWTH_BYTES // MIB} MB")
    if end.worker_rss > start.worker_rss + WORKER_GROWTH_BYTES:
        faults.append(f"a worker grew by more than {WORKER_GROWTH_BYTES // MIB} MB")
    if max(end.runner_fds - start.runner_fds, end.worker_fds - start.worker_fds) > FD_GROWTH:
        faults.append(f"more than {FD_GROWTH} descriptors were left open")
    if not chaos.done["workers killed"] or sum(row["restarts"] for row in rows) < chaos.done["workers killed"]:
        faults.append("fewer restarts than kills")
    if status != 0:
        faults.append(f"the runner ended with status {status}")
    for fault in faults:
        print(f"FAILED: {fault}")
    print("soak: failed" if faults else "soak: nothing lost, nothing wrong, nothing left over")
    return 1 if faults else 0


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(prog="soak")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"soak: {options.seconds:g} s, seed {options.seed}", flush=True)
    logs.configure("error")  # the nodes' logs
    with tempfile.TemporaryDirectory(prefix="em-soak-") as folder:
        return uvloop.run(soak(options.seconds, options.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
