"""What `em-runner status` shows: the table of workers in a terminal, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from runner import client, table
from runner.table import Table, WorkerRow
from shared.errors import StartError

EXIT_NOT_READY: Final = 1
EXIT_NO_RUNNER: Final = 2
LONGEST_REASON: Final = 120
_COLOURS: Final = {"ready": "green", "failed": "bold red", "crashed": "red", "restarting": "red", "backoff": "yellow"}
_SPENT_FIRST: Final = ("p50", "queries", "up", "pid", "p99", "a second", "node", "restarts", "errors")
"""What a terminal that is too narrow does without, in this order."""

LEAST_REASON: Final = 24
"""How many characters of the reason are worth more than a column."""

_GAP: Final = 2


class NotAnswered(Exception):
    """The runner answered, but not with its table; the text says what to do."""


def fetch(base: str, token: str | None) -> Table:
    """Ask a runner for its table.

    Raises:
        StartError: when nobody answers, or what answers is none.
        NotAnswered: when it refuses.
    """
    answer = client.call(base, "/workers", token=token, timeout_s=10.0)
    if answer.status != 200:
        words = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
        advice = "; name the file with the token as --token-file" if answer.status == 401 else ""
        raise NotAnswered(f"{answer.status}: {words}{advice}")
    try:
        return msgspec.convert(answer.body, Table)
    except msgspec.ValidationError:
        raise StartError(f"what answers at {base} is not em-runner, or one of another version") from None


def exit_status(rows: Sequence[WorkerRow]) -> int:
    """Return 0 when every worker is ready, else 1."""
    return 0 if all(row.state == "ready" for row in rows) else EXIT_NOT_READY


def grid(rows: Sequence[WorkerRow], width: int | None = None) -> Grid:
    """Return the rows as a table; of the width of a terminal, a row is one line, and what matters least is left out."""
    columns = _columns(rows)
    reasons = [" ".join((row.detail or row.last_error).split())[:LONGEST_REASON] for row in rows]
    if width is not None:
        left = width - min(LEAST_REASON, max(map(len, reasons), default=0))
        for heading in _SPENT_FIRST:
            if sum(_width(name, cells) for name, cells in columns.items()) > left:
                del columns[heading]
    grid = Grid(box=None, pad_edge=False, expand=width is not None, padding=(0, _GAP, 0, 0))
    for heading in columns:
        grid.add_column(heading, justify="left" if heading in ("worker", "state", "node") else "right", no_wrap=True)
    fitted = 1 if width is not None else None
    grid.add_column("why, or the last error", overflow="ellipsis", no_wrap=True, ratio=fitted)
    for *cells, reason in zip(*columns.values(), map(Text, reasons), strict=True):
        grid.add_row(*cells, reason)
    return grid


def _columns(rows: Sequence[WorkerRow]) -> dict[str, list[Text]]:
    return {
        "worker": [Text(row.name) for row in rows],
        "state": [Text(row.state, style=_COLOURS.get(row.state, "cyan")) for row in rows],
        "node": [Text(row.node) for row in rows],
        "pid": [Text("" if row.pid is None else str(row.pid)) for row in rows],
        "up": [Text(table.uptime(row.uptime_s)) for row in rows],
        "queries": [Text(f"{row.queries:,}") for row in rows],
        "a second": [Text(table.rate(row.queries_per_s)) for row in rows],
        "p50": [Text(table.latency(row.p50_s)) for row in rows],
        "p99": [Text(table.latency(row.p99_s)) for row in rows],
        "errors": [Text(f"{row.errors:,}") for row in rows],
        "restarts": [Text(str(row.restarts)) for row in rows],
    }


def _width(heading: str, cells: Sequence[Text]) -> int:
    return _GAP + max(len(heading), *(cell.cell_len for cell in cells)) if cells else _GAP + len(heading)


def summary(rows: Sequence[WorkerRow]) -> Text:
    """Return one line that says how it stands."""
    ready = sum(row.state == "ready" for row in rows)
    return Text(table.summary(ready, len(rows)), style="green" if ready == len(rows) else "yellow")


def watch(console: Console, base: str, token: str | None, interval_s: float) -> None:
    """Show the table until interrupted; a runner that is gone is shown as gone, and looked for again."""
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            try:
                now = fetch(base, token)
            except (StartError, NotAnswered) as exc:
                live.update(Text(f"{exc}", style="red"), refresh=True)
            else:
                width = console.width if console.is_terminal else None
                live.update(Group(grid(now.workers, width), Text(""), summary(now.workers)), refresh=True)
            time.sleep(interval_s)
