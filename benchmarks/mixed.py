"""One worker under two loads: queries from its node and over HTTP, first alone, then at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from benchmarks.load_http import closed_loop
from benchmarks.load_node import LoadNode, Workload
from benchmarks.measure import Figure, figures, interleave
from benchmarks.systems import em_runner

SUITE: Final = "mixed"
WINDOW: Final = 64
CONNECTIONS: Final = 64
SECONDS: Final = 2
BODY: Final = "x" * 40


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Return the throughput of each kind of query, alone and together."""
    found = interleave({"em-runner": _once}, 1 if quick else runs, report)
    return list(figures(SUITE, "queries/s", found))


def _once() -> dict[str, float]:
    workload = Workload(BODY, lambda data: data == BODY)
    with LoadNode() as node, em_runner(node.addresses) as running, ThreadPoolExecutor(1) as aside:
        node.wait_registered()
        alone = node.blast(workload, WINDOW, SECONDS).rate
        http_alone = closed_loop(running.http, CONNECTIONS, SECONDS)
        # wrk is a separate process. The thread only waits for it.
        http = aside.submit(closed_loop, running.http, CONNECTIONS, SECONDS)
        together = node.blast(workload, WINDOW, SECONDS - 0.5).rate
        return {
            "alone: node": alone,
            "alone: HTTP": http_alone,
            "together: node": together,
            "together: HTTP": http.result(),
        }
