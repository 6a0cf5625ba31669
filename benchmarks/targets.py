"""The performance targets, and how the results compare with them.

A target is a bound for one figure, or for the ratio of two figures of the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from benchmarks.measure import Results, quantile


class Target(NamedTuple):
    """One target.

    Attributes:
        what: a description of the figure.
        minimum: the bound that the figure must reach.
        goal: the bound that the figure should reach.
        unit: the unit of the figure and of the bounds.
        find: returns the figure, or None if it was not measured.
        lower_is_better: whether the bounds are upper bounds.
    """

    what: str
    minimum: float
    goal: float
    unit: str
    find: Callable[[Results], float | None]
    lower_is_better: bool = False

    def verdict(self, found: float) -> str:
        """Return how a figure compares with the target."""
        if self._holds(found, self.goal):
            return "goal reached"
        return "met" if self._holds(found, self.minimum) else "MISSED"

    def _holds(self, found: float, bound: float) -> bool:
        return found <= bound if self.lower_is_better else found >= bound


def _ratio(
    suite: str, name: str, system: str, other_system: str
) -> Callable[[Results], float | None]:
    """Return the ratio of one quantity of two systems."""

    def find(results: Results) -> float | None:
        value = results.median(suite, name, system)
        other = results.median(suite, name, other_system)
        return None if value is None or other is None else value / other

    return find


def _within(
    suite: str, system: str, name: str, other_name: str
) -> Callable[[Results], float | None]:
    """Return the ratio of two quantities of one system."""

    def find(results: Results) -> float | None:
        value = results.median(suite, name, system)
        other = results.median(suite, other_name, system)
        return None if value is None or other is None else value / other

    return find


def _median(suite: str, name: str) -> Callable[[Results], float | None]:
    return lambda results: results.median(suite, name, "em-runner")


def _growth(results: Results) -> float | None:
    found = {each.name: each.median for each in results.figures if each.suite == "endurance"}
    after = next((value for name, value in found.items() if name.startswith("RSS after")), None)
    return None if after is None else after - found["RSS before"]


_ASYNC: Final = "em-runner, async"
TARGETS: Final = (
    Target(
        "WebSocket, W=64, async echo / the SDK's technique",
        5,
        8,
        "x",
        _ratio("ws", "W=64, 40 B", _ASYNC, "SDK technique"),
    ),
    Target(
        "... / picows and msgspec",
        0.5,
        0.8,
        "x",
        _ratio("ws", "W=64, 40 B", _ASYNC, "picows (ceiling)"),
    ),
    Target(
        "WebSocket, W=64, sync echo / async echo",
        0.75,
        0.9,
        "x",
        _ratio("ws", "W=64, 40 B", "em-runner, sync", _ASYNC),
    ),
    Target(
        "WebSocket, W=1 / websockets' asyncio client",
        1.0,
        1.2,
        "x",
        _ratio("ws", "W=1, 40 B", _ASYNC, "websockets asyncio"),
    ),
    Target(
        "WebSocket, W=64, disk memory / ram memory",
        0.5,
        0.8,
        "x",
        _ratio("ws", "W=64, 40 B", "em-runner, disk", "em-runner, ram counter"),
    ),
    Target(
        "HTTP, 64 connections / the SDK's technique",
        12,
        20,
        "x",
        _ratio("http", "64 connections", "em-runner", "SDK technique"),
    ),
    Target(
        "... / bare uvicorn, no worker behind it",
        0.75,
        1.0,
        "x",
        _ratio("http", "64 connections", "em-runner", "uvicorn (ceiling)"),
    ),
    Target(
        "HTTP at half of the maximum load, p99 / p50",
        5,
        3,
        "x",
        _within("http", "em-runner", "half load: p99, ms", "half load: p50, ms"),
        lower_is_better=True,
    ),
    Target(
        "100 workers: all registered",
        3,
        1.5,
        "s",
        _median("fanout", "100 nodes: start-up"),
        lower_is_better=True,
    ),
    Target(
        "... PSS a worker",
        9,
        6,
        "MB",
        _median("fanout", "100 nodes: PSS a worker"),
        lower_is_better=True,
    ),
    Target(
        "... idle CPU of all processes together",
        5,
        2,
        "% of a core",
        _median("fanout", "100 nodes: idle CPU"),
        lower_is_better=True,
    ),
    Target(
        "kill -9 to registered again",
        60,
        30,
        "ms",
        _median("recovery", "kill -9 to registered"),
        lower_is_better=True,
    ),
    Target(
        "RSS of a worker, growth over 10 million queries",
        1.0,
        0.5,
        "MB",
        _growth,
        lower_is_better=True,
    ),
)


def table(results: Results) -> str:
    """Return the targets and the measured figures, as a Markdown table."""
    lines = ["| | minimum | goal | measured | |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        sign = "<= " if target.lower_is_better else ""
        found = target.find(results)
        shown = "not measured" if found is None else f"{found:.3g} {target.unit}"
        verdict = "" if found is None else target.verdict(found)
        minimum = f"{sign}{target.minimum:g} {target.unit}"
        goal = f"{sign}{target.goal:g} {target.unit}"
        lines.append(f"| {target.what} | {minimum} | {goal} | {shown} | {verdict} |")
    return "\n".join(lines)


def medians(results: Results) -> str:
    """Return each figure's median, lowest and highest value, as a Markdown table."""
    lines = [
        "| suite | what | system | median | of runs from | to |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in results.figures:
        median, low, high = (
            f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            for value in (each.median, min(each.runs), max(each.runs))
        )
        lines.append(
            f"| {each.suite} | {each.name} | {each.system} "
            f"| {median} {each.unit} | {low} | {high} |"
        )
        if len(each.runs) >= 20:
            p95 = f"{quantile(each.runs, 0.95):.3g}"
            lines.append(
                f"| {each.suite} | {each.name}, p95 | {each.system} | {p95} {each.unit} | | |"
            )
    return "\n".join(lines)
