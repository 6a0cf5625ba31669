"""Figures, and how to measure several systems so that the figures can be compared.

The machines are shared and noisy. So the systems take turns, each is measured several times, and
the result is the median, or the ratio of two medians from the same run.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec

LIBRARIES: Final = (
    "em-runner",
    "anyio",
    "websockets",
    "msgspec",
    "pyzmq",
    "uvloop",
    "uvicorn",
    "httptools",
    "picows",
    "websocket-client",
    "gunicorn",
    "circus",
    "supervisor",
)


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity of one system.

    Attributes:
        suite: the part of the benchmarks, such as `ws`.
        name: what was measured, such as `W=64, 40 B`.
        system: the measured system. A system has the same name in all suites.
        unit: the unit of `runs`, such as `queries/s` or `ms`.
        runs: the value of each run, in the order of the runs.
    """

    suite: str
    name: str
    system: str
    unit: str
    runs: list[float]

    @property
    def median(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


class Results(msgspec.Struct, kw_only=True):
    """All figures of one run of the benchmarks, with the machine and the versions."""

    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    figures: list[Figure]

    def median(self, suite: str, name: str, system: str) -> float | None:
        """Return the median of a figure, or None if it was not measured."""
        for each in self.figures:
            if (each.suite, each.name, each.system) == (suite, name, system):
                return each.median
        return None


def interleave(
    systems: Mapping[str, Callable[[], Mapping[str, float]]],
    runs: int,
    report: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Measure the systems in turn, `runs` times. Return the values by system and quantity.

    Args:
        systems: a function for each system, which measures once and returns values by quantity.
        runs: how often to call each function.
        report: called with a line of text for each value.
    """
    found: dict[str, dict[str, list[float]]] = {system: {} for system in systems}
    for run in range(runs):
        for system, once in systems.items():
            for name, value in once().items():
                found[system].setdefault(name, []).append(value)
                report(f"  {run + 1}/{runs} {system}: {name} {value:,.4g}")
    return found


def figures(
    suite: str, unit: str, found: Mapping[str, Mapping[str, list[float]]]
) -> Iterable[Figure]:
    """Return the results of `interleave` as figures of one unit."""
    for system, quantities in found.items():
        for name, runs in quantities.items():
            yield Figure(suite=suite, name=name, system=system, unit=unit, runs=runs)


def quantile(values: Sequence[float], part: float) -> float:
    """Return the smallest of `values` that at least `part` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the measured packages that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """Return the date, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")
