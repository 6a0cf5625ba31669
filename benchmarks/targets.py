"""What em-runner promises of its speed, each as a ratio or a figure of one run, beside what was found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from benchmarks.measure import Results, quantile


class Target(NamedTuple):
    """One promise. `find` returns the figure, or None where it was not measured."""

    what: str
    least: float
    reach: float
    unit: str
    find: Callable[[Results], float | None]
    lower_is_better: bool = False

    def verdict(self, found: float) -> str:
        """Return how a figure stands to the target."""
        if self._holds(found, self.reach):
            return "reached"
        return "kept" if self._holds(found, self.least) else "MISSED"

    def _holds(self, found: float, bound: float) -> bool:
        return found <= bound if self.lower_is_better else found >= bound


def _ratio(suite: str, name: str, ours: str, theirs: str) -> Callable[[Results], float | None]:
    def find(results: Results) -> float | None:
        mine, other = results.median(suite, name, ours), results.median(suite, name, theirs)
        return None if mine is None or other is None else mine / other

    return find


def _within(suite: str, system: str, name: str, other: str) -> Callable[[Results], float | None]:
    def find(results: Results) -> float | None:
        mine, base = results.median(suite, name, system), results.median(suite, other, system)
        return None if mine is None or base is None else mine / base

    return find


def _median(suite: str, name: str) -> Callable[[Results], float | None]:
    return lambda results: results.median(suite, name, "em-runner")


def _growth(results: Results) -> float | None:
    found = {each.name: each.median for each in results.figures if each.suite == "endurance"}
    after = next((value for name, value in found.items() if name.startswith("RSS after")), None)
    return None if after is None else after - found["RSS before"]


_ASYNC: Final = "em-runner, async"
TARGETS: Final = (
    Target("WebSocket, W=64, async echo / the SDK's technique", 5, 8, "x", _ratio("ws", "W=64, 40 B", _ASYNC, "SDK technique")),
    Target("... / picows and msgspec", 0.5, 0.8, "x", _ratio("ws", "W=64, 40 B", _ASYNC, "picows (ceiling)")),
    Target("WebSocket, W=64, sync echo / async echo", 0.75, 0.9, "x", _ratio("ws", "W=64, 40 B", "em-runner, sync", _ASYNC)),
    Target("WebSocket, W=1 / websockets' asyncio client", 1.0, 1.2, "x", _ratio("ws", "W=1, 40 B", _ASYNC, "websockets asyncio")),
    Target("WebSocket, W=64, disk memory / ram memory", 0.5, 0.8, "x", _ratio("ws", "W=64, 40 B", "em-runner, disk", "em-runner, ram counter")),
    Target("HTTP, 64 connections / the SDK's technique", 12, 20, "x", _ratio("http", "64 connections", "em-runner", "SDK technique")),
    Target("... / bare uvicorn, no worker behind it", 0.75, 1.0, "x", _ratio("http", "64 connections", "em-runner", "uvicorn (ceiling)")),
    Target("HTTP at half of the maximum load, p99 / p50", 5, 3, "x", _within("http", "em-runner", "half load: p99, ms", "half load: p50, ms"), True),
    Target("100 workers: all registered", 3, 1.5, "s", _median("fanout", "100 nodes: start-up"), True),
    Target("... PSS a worker", 9, 6, "MB", _median("fanout", "100 nodes: PSS a worker"), True),
    Target("... idle CPU of all processes together", 5, 2, "% of a core", _median("fanout", "100 nodes: idle CPU"), True),
    Target("kill -9 to registered again", 60, 30, "ms", _median("recovery", "kill -9 to registered"), True),
    Target("RSS of a worker, growth over 10 million queries", 1.0, 0.5, "MB", _growth, True),
)  # fmt: skip


def table(results: Results) -> str:
    """Return the promises beside the figures, as a Markdown table."""
    lines = ["| | at least | reach for | found | |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        sign = "<= " if target.lower_is_better else ""
        found = target.find(results)
        shown = "not measured" if found is None else f"{found:.3g} {target.unit}"
        verdict = "" if found is None else target.verdict(found)
        bounds = f"{sign}{target.least:g} {target.unit} | {sign}{target.reach:g} {target.unit}"
        lines.append(f"| {target.what} | {bounds} | {shown} | {verdict} |")
    return "\n".join(lines)


def medians(results: Results) -> str:
    """Return every figure's median, with the least and the greatest of its runs, as a Markdown table."""
    lines = ["| suite | what | system | median | of runs from | to |", "| --- | --- | --- | --- | --- | --- |"]
    for each in results.figures:
        low, high = min(each.runs), max(each.runs)
        shown = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (each.median, low, high))
        median, least, greatest = shown
        lines.append(f"| {each.suite} | {each.name} | {each.system} | {median} {each.unit} | {least} | {greatest} |")
        if len(each.runs) >= 20:
            lines.append(
                f"| {each.suite} | {each.name}, p95 | {each.system} | {quantile(each.runs, 0.95):.3g} {each.unit} | | |"
            )
    return "\n".join(lines)
