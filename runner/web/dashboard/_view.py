"""What the page shows of each worker: every cell as text, in the served page and its updates."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from runner import table, version
from runner.supervision.recent import STEPS
from runner.table import ErrorRow, WorkerRow
from shared.logs.logger import escaped, printable_line

SPARK_WIDTH: Final = 2 * STEPS
SPARK_HEIGHT: Final = 20
"""The size of a sparkline's view box. The page's template uses the same values."""

# Two workers are visible at once even on a phone.
LIST_THRESHOLD: Final = 2
"""With more workers than this, the page's header lists those that are not ready."""

_LONGEST_BRIEF: Final = 160


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The cells of one worker.

    Attributes:
        spark: the points of a sparkline of the query rate.
        peak: the highest rate in the sparkline, as a text for screen readers.
        last_errors: the last error of each part of the worker, in full and with its time.
        brief: one line for each of these errors, with its age.
    """

    name: str
    agent: str
    node: str
    state: str
    reason: str
    uptime: str
    rate: str
    spark: str
    peak: str
    p50: str
    p99: str
    queries: str
    errors: str
    unserved: str
    restarts: str
    brief: str
    last_errors: str


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """One event of GET /events.

    Attributes:
        version: em-runner's version. The page reloads when it changes.
        summary: how many workers are ready.
        table_id: changes with the set and the order of the workers. The page then reloads the
            table.
        changed: the name and the changed cells of each worker that changed since the last event.
            The first event has all cells of all workers.
    """

    version: str
    summary: str
    table_id: int
    changed: list[dict[str, str]]


def _changes(before: View | None, now: View) -> dict[str, str]:
    """Return a worker's name and its changed cells, or nothing if no cell changed."""
    if before is None:
        return msgspec.structs.asdict(now)
    found = {
        name: cell
        for name in now.__struct_fields__
        if (cell := getattr(now, name)) != getattr(before, name)
    }
    return {"name": now.name, **found} if found else {}


def views(
    rows: Sequence[WorkerRow],
    rates: Mapping[str, Sequence[float]],
) -> list[View]:
    """Return the cells of each worker.

    Args:
        rows: the workers.
        rates: each worker's queries per second in each step of the last five minutes.
    """
    return [_view(row, rates.get(row.name, ())) for row in rows]


def not_ready(rows: Sequence[View]) -> list[View]:
    """Return the workers for the list in the page's header."""
    if len(rows) <= LIST_THRESHOLD:
        return []
    return [row for row in rows if row.state != "ready"]


def update(rows: Sequence[View], sent: Mapping[str, View]) -> Update:
    """Return the event for a page that shows `sent`, which has the workers by name."""
    names = " ".join(f"{row.agent}/{row.name}" for row in rows)
    changes = [_changes(sent.get(row.name), row) for row in rows]
    return Update(
        version=version(),
        summary=table.summary([row.state for row in rows]),
        # Only compared for equality, and much shorter than the names.
        table_id=zlib.crc32(names.encode()),
        changed=[cells for cells in changes if cells],
    )


def _view(row: WorkerRow, rates: Sequence[float]) -> View:
    return View(
        name=row.name,
        agent=row.agent,
        node=row.node,
        state=row.state,
        reason=table.displayed_reason(row) or "",
        uptime="" if row.pid is None else table.duration(row.uptime_s),
        rate=table.rate(row.queries_per_s),
        spark=_spark(rates),
        peak=f"at most {table.rate(max(rates, default=0.0))} per second in five minutes",
        p50=table.latency(row.p50_s),
        p99=table.latency(row.p99_s),
        queries=table.count(row.queries),
        errors=table.count(row.errors),
        unserved=table.count(row.unserved),
        restarts=table.count(row.restarts),
        brief="\n".join(
            f"{each.source}, {table.ago(each.at)}: {_cut(printable_line(each.error))}"
            for each in row.last_errors
        ),
        last_errors="\n\n".join(map(_in_full, row.last_errors)),
    )


def _in_full(error: ErrorRow) -> str:
    # Escaped, because a handler's error may contain characters that change the reading direction.
    # The line ends stay.
    lines = error.error.split("\n")
    text = "\n".join(map(escaped, lines))
    return f"{error.source}, {error.at:%Y-%m-%d %H:%M:%S} UTC\n{text}"


def _spark(rates: Sequence[float]) -> str:
    """Return the points of a line that ends at the right. Its highest point is at the top."""
    # Rates of 0 alone give a flat line, not a division by zero.
    highest = max(rates, default=0.0) or 1.0
    step = SPARK_WIDTH / STEPS
    start = SPARK_WIDTH - step * len(rates)
    return " ".join(
        f"{start + step * index:.0f},{SPARK_HEIGHT - (SPARK_HEIGHT - 1) * each / highest:.1f}"
        for index, each in enumerate(rates, 1)
    )


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_BRIEF:
        return text
    return f"{text[: _LONGEST_BRIEF - 1]}\u2026"
