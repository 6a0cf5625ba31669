"""Queries over one WebSocket: the throughput by number of queries in flight and by size.

The generator and the system have a core each, so that neither slows the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import product
from typing import Any, Final

from benchmarks.load_node import LoadNode, Workload
from benchmarks.measure import Figure, figures, interleave
from benchmarks.systems import baseline, em_runner

SUITE: Final = "ws"
WINDOWS: Final = (1, 8, 64, 512)
SIZES: Final = {"40 B": 40, "1 KB": 1024, "64 KB": 65_536}
QUICK: Final = ((1, "40 B"), (64, "40 B"))
SECONDS: Final = 0.5
WARM_UP_S: Final = 0.2
SETTLE_S: Final = 1.0
"""The delay before a measurement: a system's start is not finished when its agent is registered."""

GENERATOR_CORE: Final = 1
SYSTEM_CORES: Final = {0}

Start = Callable[[str], AbstractContextManager[Any]]


def _runner(handler: str, memory: str = "ram") -> Start:
    return lambda node: em_runner([node], handler=handler, memory=memory, cores=SYSTEM_CORES)


def _baseline(module: str, *arguments: str) -> Start:
    return lambda node: baseline(module, *arguments, node, cores=SYSTEM_CORES)


SYSTEMS: Final[dict[str, Start]] = {
    "em-runner, async": _runner("echo"),
    "em-runner, sync": _runner("echo_sync"),
    "em-runner, ram counter": _runner("count"),
    "em-runner, disk": _runner("count", "disk"),
    "SDK technique": _baseline("sdk", "ws"),
    "websockets asyncio": _baseline("websockets_client"),
    "picows (ceiling)": _baseline("picows_client"),
}
COUNTERS: Final = ("em-runner, ram counter", "em-runner, disk")


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Measure all systems in turn. Return the throughput in queries per second."""
    cases = QUICK if quick else tuple(product(WINDOWS, SIZES))
    before = os.sched_getaffinity(0)
    if len(before) > 1:
        os.sched_setaffinity(0, {GENERATOR_CORE})
    try:
        found = interleave(
            {name: lambda name=name: _once(name, cases) for name in SYSTEMS}, runs, report
        )
    finally:
        os.sched_setaffinity(0, before)
    return list(figures(SUITE, "queries/s", found))


def _once(system: str, cases: Iterable[tuple[int, str]]) -> dict[str, float]:
    rates = {}
    with LoadNode() as node, SYSTEMS[system](node.addresses[0]):
        node.wait_registered()
        node.serve(SETTLE_S)
        for window, size in cases:
            workload = workload_for(system, SIZES[size])
            rates[f"W={window}, {size}"] = node.blast(workload, window, SECONDS, WARM_UP_S).rate
    return rates


def workload_for(system: str, size: int) -> Workload:
    """Return the workload for a system."""
    body = "x" * size
    if system in COUNTERS:
        return Workload(body, lambda data: isinstance(data, int))
    return Workload(body, lambda data: data == body)
