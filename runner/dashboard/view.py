"""What the page shows of a worker: every cell as text, for the page as it is served and for its updates alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from runner import table
from runner.recent import STEPS
from runner.table import LastError, WorkerRow
from shared.logs import escaped, printable_line

SPARK_WIDTH: Final = 2 * STEPS
SPARK_HEIGHT: Final = 20
"""The size of a sparkline's view box; the page's template has it too."""

GLANCE: Final = 2
"""Past so many workers those that are not ready are listed in the page's head; its script knows it from there. Two
cards are in view on a phone, more are not on every screen."""

_LONGEST_BRIEF: Final = 160


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The cells of one worker.

    `spark` is the points of a line; `peak` says its height in words. `last_error` is what went wrong last in each
    part of it, in full and with the time; `brief` has of each a line, and how long ago it was.
    """

    name: str
    agent: str
    node: str
    state: str
    detail: str
    uptime: str
    rate: str
    spark: str
    peak: str
    p50: str
    p99: str
    queries: str
    errors: str
    unanswered: str
    restarts: str
    brief: str
    last_error: str


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """One event of GET /events.

    Attributes:
        version: em-runner's: the page of another one is another page.
        summary: how it stands, in words.
        layout: changes when there are other workers than before, or in another order: then the page is asked for anew.
        changed: of the workers whose cells are not those of the event before, the name and those cells; at first all.
    """

    version: str
    summary: str
    layout: int
    changed: list[dict[str, str]]


def changes(before: View | None, now: View) -> dict[str, str]:
    """Return a worker's name and its cells that are not as before, all where there was none; nothing where all are."""
    if before is None:
        return msgspec.structs.asdict(now)
    found = {name: cell for name in now.__struct_fields__ if (cell := getattr(now, name)) != getattr(before, name)}
    return {"name": now.name, **found} if found else {}


def views(rows: Sequence[WorkerRow], rates: Mapping[str, Sequence[float]]) -> list[View]:
    """Return what is shown of each worker; `rates` are its queries a second in each step of the last five minutes."""
    return [_view(row, rates.get(row.name, ())) for row in rows]


def troubled(rows: Sequence[View]) -> list[View]:
    """Return the workers that are not ready, where there are too many to be seen at a glance."""
    return [row for row in rows if row.state != "ready"] if len(rows) > GLANCE else []


def layout(rows: Sequence[View]) -> int:
    """Return a number that stands for which workers there are, and in which order."""
    return zlib.crc32(" ".join(f"{row.agent}/{row.name}" for row in rows).encode())


def summary(rows: Sequence[View]) -> str:
    """Return how it stands, in words."""
    return table.summary(sum(row.state == "ready" for row in rows), len(rows))


def _view(row: WorkerRow, rates: Sequence[float]) -> View:
    return View(
        name=row.name,
        agent=row.agent,
        node=row.node,
        state=row.state,
        detail=table.why(row),
        uptime="" if row.pid is None else table.uptime(row.uptime_s),
        rate=table.rate(row.queries_per_s),
        spark=_spark(rates),
        peak=f"at most {table.rate(max(rates, default=0.0))} a second in five minutes",
        p50=table.latency(row.p50_s),
        p99=table.latency(row.p99_s),
        queries=table.count(row.queries),
        errors=table.count(row.errors),
        unanswered=table.count(row.unanswered),
        restarts=table.count(row.restarts),
        brief="\n".join(
            f"{each.source}, {table.ago(each.at)}: {table.brief(printable_line(each.error), _LONGEST_BRIEF)}"
            for each in row.last_errors
        ),
        last_error="\n\n".join(map(_in_full, row.last_errors)),
    )


def _in_full(error: LastError) -> str:
    text = "\n".join(map(escaped, error.error.split("\n")))  # no override of the direction of reading
    return f"{error.source}, {error.at:%Y-%m-%d %H:%M:%S} UTC\n{text}"


def _spark(rates: Sequence[float]) -> str:
    """Return the points of a line that ends at the right, its highest point at the top."""
    highest = max(rates, default=0.0) or 1.0
    step = SPARK_WIDTH / STEPS
    start = SPARK_WIDTH - step * len(rates)
    return " ".join(
        f"{start + step * index:.0f},{SPARK_HEIGHT - (SPARK_HEIGHT - 1) * each / highest:.1f}"
        for index, each in enumerate(rates, 1)
    )
