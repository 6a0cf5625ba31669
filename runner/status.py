"""What `em-runner status` shows: the table of workers in a terminal, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Literal

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
_HEADINGS: Final[tuple[tuple[str, Literal["left", "right"]], ...]] = (
    ("worker", "left"),
    ("state", "left"),
    ("node", "left"),
    ("pid", "right"),
    ("up", "right"),
    ("queries", "right"),
    ("a second", "right"),
    ("p50", "right"),
    ("p99", "right"),
    ("errors", "right"),
    ("restarts", "right"),
)


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


def grid(rows: Sequence[WorkerRow], *, fitted: bool = False) -> Grid:
    """Return the rows as a table. `fitted` to a terminal, a row is one line, and the reason is what is cut."""
    grid = Grid(box=None, pad_edge=False, expand=fitted)
    for heading, justify in _HEADINGS:
        grid.add_column(heading, justify=justify, no_wrap=True)
    grid.add_column("why, or the last error", overflow="ellipsis", no_wrap=True, ratio=1 if fitted else None)
    for row in rows:
        reason = " ".join((row.detail or row.last_error).split())
        grid.add_row(
            Text(row.name),
            Text(row.state, style=_COLOURS.get(row.state, "cyan")),
            Text(row.node),
            Text("" if row.pid is None else str(row.pid)),
            Text(table.uptime(row.uptime_s)),
            Text(f"{row.queries:,}"),
            Text(table.rate(row.queries_per_s)),
            Text(table.latency(row.p50_s)),
            Text(table.latency(row.p99_s)),
            Text(f"{row.errors:,}"),
            Text(str(row.restarts)),
            Text(reason[:LONGEST_REASON]),
        )
    return grid


def summary(rows: Sequence[WorkerRow]) -> Text:
    """Return one line that says how it stands."""
    ready = sum(row.state == "ready" for row in rows)
    return Text(table.summary(ready, len(rows)), style="green" if ready == len(rows) else "yellow")


def watch(console: Console, base: str, token: str | None, interval_s: float) -> None:
    """Show the table until interrupted; a runner that is gone is shown as gone, and looked for again."""
    fitted = console.is_terminal
    with Live(console=console, auto_refresh=False, screen=fitted) as live:
        while True:
            try:
                now = fetch(base, token)
            except (StartError, NotAnswered) as exc:
                live.update(Text(f"{exc}", style="red"), refresh=True)
            else:
                live.update(Group(grid(now.workers, fitted=fitted), Text(""), summary(now.workers)), refresh=True)
            time.sleep(interval_s)
