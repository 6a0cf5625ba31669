"""Measures a worker's resident memory before and after millions of queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks.load_node import LoadNode, Workload
from benchmarks.measure import Figure
from benchmarks.systems import em_runner

SUITE: Final = "endurance"
QUERIES: Final = 10_000_000
QUICK: Final = 200_000
WARM_UP: Final = 100_000
WINDOW: Final = 64
TIMEOUT_S: Final = 1200.0
BODY: Final = "x" * 40


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Return the resident memory before and after, in MB. Measures once and ignores `runs`."""
    queries = QUICK if quick else QUERIES
    workload = Workload(BODY, lambda data: data == BODY)
    with LoadNode() as node, em_runner(node.addresses) as running:
        node.wait_registered()
        (worker,) = running.workers()
        node.blast_count(workload, WINDOW, WARM_UP, TIMEOUT_S)
        before = worker.memory_info().rss / 1e6
        node.blast_count(workload, WINDOW, queries, TIMEOUT_S)
        after = worker.memory_info().rss / 1e6
    report(f"  {queries:,} queries: {before:.2f} MB before, {after:.2f} MB after")
    return [
        Figure(suite=SUITE, name=name, system="em-runner", unit="MB", runs=[value])
        for name, value in (("RSS before", before), (f"RSS after {queries:,} queries", after))
    ]
