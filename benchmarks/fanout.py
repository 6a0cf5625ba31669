"""One agent at many nodes: the cost of each worker, and the throughput of all together.

The cost is start-up time, memory and idle CPU. The load node runs in this process and shares the
machine's cores with the workers. On a machine with few cores, the cores therefore limit the
throughput. The runner does not limit it, because queries from nodes do not pass through the runner.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Final

import psutil

from benchmarks.load_node import LoadNode, Workload
from benchmarks.measure import Figure, interleave
from benchmarks.systems import em_runner

SUITE: Final = "fanout"
NODES: Final = (1, 2, 4, 8, 32, 100)
QUICK_NODES: Final = (1, 4, 16)
WINDOW: Final = 16
BODY: Final = "x" * 40
WORKLOAD: Final = Workload(BODY, lambda data: data == BODY)
SETTLE_S: Final = 1.0
"""The delay before idle CPU is measured: work such as the first heartbeat follows registration."""

UNITS: Final = {
    "start-up": "s",
    "first registered": "s",
    "first to last": "s",
    "queries": "queries/s",
    "PSS a worker": "MB",
    "idle CPU": "%",
}
"""The measured quantities. `start-up` lasts from the start of the runner's process until all agents
are registered. It is the sum of `first registered`, which includes the runner's start, and
`first to last`."""


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Measure each number of nodes `runs` times."""
    idle_s, blast_s = (3.0, 1.0) if quick else (10.0, 3.0)
    sizes = {
        f"{nodes} node{'s' if nodes > 1 else ''}": partial(_once, nodes, idle_s, blast_s)
        for nodes in (QUICK_NODES if quick else NODES)
    }
    found = interleave(sizes, runs, report)
    return [
        Figure(
            suite=SUITE,
            name=f"{size}: {quantity}",
            system="em-runner",
            unit=UNITS[quantity],
            runs=values,
        )
        for size, quantities in found.items()
        for quantity, values in quantities.items()
    ]


def _once(nodes: int, idle_s: float, blast_s: float) -> dict[str, float]:
    with LoadNode(nodes) as node:
        began_s = time.perf_counter()
        with em_runner(node.addresses) as runner:
            node.wait_registered(nodes)
            registered_s = sorted(
                peer.registered_s for peer in node.peers if peer.registered_s is not None
            )
            node.serve(SETTLE_S)
            processes = runner.all_processes()
            before_s = _cpu_s(processes)
            idle_from_s = time.perf_counter()
            node.serve(idle_s)
            idle_cpu = (_cpu_s(processes) - before_s) / (time.perf_counter() - idle_from_s)
            memory = statistics.median(worker.memory_full_info().pss for worker in runner.workers())
            blast = node.blast(WORKLOAD, WINDOW, blast_s)
    return {
        "start-up": registered_s[-1] - began_s,
        "first registered": registered_s[0] - began_s,
        "first to last": registered_s[-1] - registered_s[0],
        "queries": blast.rate,
        "PSS a worker": memory / 1e6,
        "idle CPU": idle_cpu * 100,
    }


def _cpu_s(processes: Iterable[psutil.Process]) -> float:
    # schedstat has nanoseconds. CPU times in ticks of 10 ms are too coarse for an idle process.
    tasks = (task for each in processes for task in Path(f"/proc/{each.pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
