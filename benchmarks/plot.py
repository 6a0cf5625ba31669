"""Draws the results as one picture with several panels, for the README.

A quantity that was not measured has no panel or no bar. The same results give the same bytes, so
the picture in the repository changes only with its figures. The text stays text, so that it can be
searched and selected. The background is white, so that the picture is readable on dark pages too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, NullLocator, StrMethodFormatter

from benchmarks.measure import Figure, Results, quantile

STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "em-runner",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#57606a",
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "legend.fontsize": 8.0,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 1.0,
}
COLUMNS: Final = 2
PANEL_INCHES: Final = (5.6, 3.1)
TITLE_INCHES: Final = 0.5
HEADROOM: Final = 0.15
"""The space above the bars for each line of the legend, as a fraction of the bars' height."""

LEGEND_COLUMNS: Final = 2
BLUE: Final = "#0550ae"
LIGHT_BLUE: Final = "#54aeff"
ORANGE: Final = "#d4722c"
COLOURS: Final = {
    "em-runner": BLUE,
    "em-runner, async": BLUE,
    "em-runner, sync": LIGHT_BLUE,
    "em-runner, ram counter": "#79a8d9",
    "em-runner, disk": "#a5c8ec",
    "em-runner, 2 workers": LIGHT_BLUE,
    "SDK technique": ORANGE,
    "SDK technique, keep-alive": "#f0b58a",
    "websockets asyncio": "#4d9e5f",
    "picows (ceiling)": "#8c959f",
    "uvicorn (ceiling)": "#8c959f",
}
"""em-runner is blue, alternatives are orange or green, upper bounds are grey. The bars have the
order of this dictionary."""

OTHER_COLOUR: Final = "#6e7781"
Bars = dict[str, dict[int, float]]
Panel = Callable[[Axes], None]


def draw(results: Results, path: Path) -> None:
    """Write the picture of `results`. The suffix of `path` is the format, such as .svg or .png."""
    panels = _panels(results)
    rows = max(1, -(-len(panels) // COLUMNS))
    with mpl.rc_context(STYLE):
        width, height = PANEL_INCHES
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        canvas = Canvas(
            figsize=(COLUMNS * width, rows * height + TITLE_INCHES),
            layout=layout,
            facecolor="white",
        )
        canvas.suptitle(_title(results), x=0.012, ha="left", fontsize=9.0, color=OTHER_COLOUR)
        for number, panel in enumerate(panels):
            axes = canvas.add_subplot(rows, COLUMNS, number + 1)
            panel(axes)
        canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def _title(results: Results) -> str:
    machine = results.machine
    parts = [
        f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores",
        str(machine.get("system", "")),
        f"Python {machine.get('python', '?')}",
        f"em-runner {results.versions['em-runner']}" if "em-runner" in results.versions else "",
        results.date,
    ]
    return "   ·   ".join(part for part in parts if part)


def _panels(results: Results) -> list[Panel]:
    by_suite: dict[str, list[Figure]] = {}
    for each in results.figures:
        by_suite.setdefault(each.suite, []).append(each)
    found: list[Panel | None] = [
        _bars_panel(
            "Queries over a WebSocket",
            "queries/s",
            "queries in flight (W), of 40 B",
            _read(by_suite.get("ws", ()), r"W=(\d+), 40 B"),
        ),
        _bars_panel(
            "Direct queries over HTTP",
            "requests/s",
            "connections",
            _read(by_suite.get("http", ()), r"(\d+) connections?"),
        ),
        _recovery_panel(by_suite.get("recovery", ())),
        _isolation_panel(by_suite.get("isolation", ())),
        _fan_out_panel(by_suite.get("fanout", ())),
        _start_up_panel(by_suite.get("fanout", ())),
    ]
    return [panel for panel in found if panel is not None]


def _read(figures: Sequence[Figure], pattern: str) -> Bars:
    """Return the medians by system and by the number in the figure's name."""
    bars: Bars = {}
    for each in figures:
        if (match := re.fullmatch(pattern, each.name)) is not None:
            bars.setdefault(each.system, {})[int(match[1])] = each.median
    order = list(COLOURS)
    return dict(
        sorted(
            bars.items(),
            key=lambda item: order.index(item[0]) if item[0] in COLOURS else len(order),
        )
    )


def _bars_panel(title: str, unit: str, what: str, bars: Bars) -> Panel | None:
    if not bars:
        return None

    def panel(axes: Axes) -> None:
        numbers = sorted({number for medians in bars.values() for number in medians})
        colours = {system: COLOURS.get(system, OTHER_COLOUR) for system in bars}
        by_place = {
            system: {numbers.index(number): value for number, value in medians.items()}
            for system, medians in bars.items()
        }
        _grouped(axes, by_place, colours)
        axes.set_xticks(range(len(numbers)), [f"{number}" for number in numbers])
        axes.set_xlabel(what)
        axes.set_title(f"{title}, {unit}")
        _count_axis(axes, legend_lines=-(-len(bars) // LEGEND_COLUMNS))

    return panel


def _recovery_panel(figures: Sequence[Figure]) -> Panel | None:
    found = {
        each.system if each.name == "kill -9 to answering" else f"{each.system}, registered": each
        for each in figures
    }
    if not found:
        return None

    def panel(axes: Axes) -> None:
        for place, (label, each) in enumerate(reversed(found.items())):
            colour = BLUE if label.startswith("em-runner") else OTHER_COLOUR
            p95 = quantile(each.runs, 0.95)
            axes.plot(
                (each.median, p95),
                (place, place),
                color=colour,
                linewidth=2.0,
                solid_capstyle="butt",
            )
            axes.plot(p95, place, marker="|", color=colour, markersize=9.0, markeredgewidth=2.0)
            axes.plot(each.median, place, marker="o", color=colour, markersize=7.0)
            label = f"{each.median:,.0f}"
            axes.annotate(
                label,
                (each.median, place),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.0,
            )
        axes.set_yticks(range(len(found)), reversed(found.keys()))
        axes.set_ylim(-0.6, len(found) - 0.3)
        axes.set_title("kill -9 to answering again, ms")
        axes.set_xlabel("dot: median, bar: 95 % of the kills; log scale")
        axes.set_xscale("log")
        _log_axis(axes, "x")

    return panel


def _isolation_panel(figures: Sequence[Figure]) -> Panel | None:
    medians: dict[str, dict[str, float]] = {"p50": {}, "p99": {}}
    for each in figures:
        neighbour, _, part = each.name.rpartition(": ")
        if part in medians:
            medians[part][neighbour] = each.median
    neighbours = list(dict.fromkeys([*medians["p50"], *medians["p99"]]))
    if not neighbours:
        return None

    def panel(axes: Axes) -> None:
        by_place = {
            part: {neighbours.index(neighbour): value for neighbour, value in values.items()}
            for part, values in medians.items()
        }
        for bars in _grouped(axes, by_place, {"p50": LIGHT_BLUE, "p99": BLUE}):
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8.0, padding=1.0)
        axes.set_xticks(range(len(neighbours)), neighbours)
        axes.set_xlabel("neighbour in the same runner; log scale")
        axes.set_title("Latency of a healthy worker at 500 requests/s, ms")
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom / 2, top * 3)
        _log_axis(axes, "y")
        axes.legend(loc="upper left", ncols=LEGEND_COLUMNS)

    return panel


def _fan_out_panel(figures: Sequence[Figure]) -> Panel | None:
    found = _read(figures, r"(\d+) nodes?: queries").get("em-runner", {})
    if not found:
        return None

    def panel(axes: Axes) -> None:
        bars = axes.bar(
            range(len(found)), [found[number] for number in sorted(found)], color=BLUE, width=0.6
        )
        axes.bar_label(bars, fmt=EngFormatter(places=0, sep=""), fontsize=8.0, padding=1.0)
        axes.set_xticks(range(len(found)), [f"{number}" for number in sorted(found)])
        axes.set_xlabel("nodes, a worker and 16 queries in flight at each")
        axes.set_title("Fan-out: queries of all nodes together, queries/s")
        axes.margins(y=0.1)
        _count_axis(axes, legend_lines=0)

    return panel


def _start_up_panel(figures: Sequence[Figure]) -> Panel | None:
    first = _read(figures, r"(\d+) nodes?: first registered").get("em-runner", {})
    whole = _read(figures, r"(\d+) nodes?: start-up").get("em-runner", {})
    numbers = sorted(first.keys() & whole.keys())
    if not numbers:
        return None

    def panel(axes: Axes) -> None:
        places, firsts = range(len(numbers)), [first[number] for number in numbers]
        others = [max(0.0, whole[number] - first[number]) for number in numbers]
        axes.bar(
            places, firsts, color=LIGHT_BLUE, width=0.6, label="the runner, and its first worker"
        )
        bars = axes.bar(
            places, others, bottom=firsts, color=BLUE, width=0.6, label="the other workers"
        )
        axes.bar_label(
            bars, [f"{whole[number]:.2f}" for number in numbers], fontsize=8.0, padding=1.0
        )
        axes.set_xticks(places, [f"{number}" for number in numbers])
        axes.set_xlabel("nodes")
        axes.set_title("Fan-out: from the start until all are registered, s")
        axes.grid(axis="y")
        axes.set_ylim(0, axes.get_ylim()[1] * (1 + HEADROOM))
        axes.legend(loc="upper left")

    return panel


def _grouped(
    axes: Axes, values: Mapping[str, Mapping[int, float]], colours: Mapping[str, str]
) -> list[Any]:
    """Draw a group of bars at each place, with one bar per label. Return the bars by label."""
    width = 0.8 / len(values)
    drawn = []
    for number, (label, by_place) in enumerate(values.items()):
        middles = [place + (number - (len(values) - 1) / 2) * width for place in by_place]
        drawn.append(
            axes.bar(
                middles, list(by_place.values()), width * 0.92, color=colours[label], label=label
            )
        )
    return drawn


def _count_axis(axes: Axes, legend_lines: int) -> None:
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y")
    if legend_lines:
        axes.set_ylim(0, axes.get_ylim()[1] * (1 + HEADROOM * legend_lines))
        axes.legend(loc="upper left", ncols=LEGEND_COLUMNS)


def _log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_locator(NullLocator())
    axes.grid(axis=which)
