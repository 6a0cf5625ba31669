"""What `em-runner status` shows: the table of workers in a terminal, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as Grid
from rich.text import Text

from runner import client
from runner.table import Table, WorkerRow
from shared.errors import StartError

EXIT_NOT_READY: Final = 1
EXIT_NO_RUNNER: Final = 2
LONGEST_REASON: Final = 120
_COLOURS: Final = {"ready": "green", "failed": "bold red", "crashed": "red", "restarting": "red", "backoff": "yellow"}
_UNITS: Final = ((86_400, "d"), (3600, "h"), (60, "m"))


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


def grid(rows: Sequence[WorkerRow], rates: Mapping[str, float] | None = None, *, fitted: bool = False) -> Grid:
    """Return the rows as a table; `rates` are queries a second, where they are known.

    `fitted` to a terminal, a row is one line, and the reason is what is cut.
    """
    table = Grid(box=None, pad_edge=False, expand=fitted)
    for heading in ("worker", "state", "node", "pid", "up", "queries"):
        table.add_column(heading, justify="right" if heading in ("pid", "up", "queries") else "left", no_wrap=True)
    if rates is not None:
        table.add_column("a second", justify="right", no_wrap=True)
    table.add_column("errors", justify="right", no_wrap=True)
    table.add_column("restarts", justify="right", no_wrap=True)
    table.add_column("why, or the last error", overflow="ellipsis", no_wrap=True, ratio=1 if fitted else None)
    for row in rows:
        reason = " ".join((row.detail or row.last_error).split())
        cells = [
            Text(row.name),
            Text(row.state, style=_COLOURS.get(row.state, "cyan")),
            Text(row.node),
            Text("" if row.pid is None else str(row.pid)),
            Text(_duration(row.uptime_s)),
            Text(f"{row.queries:,}"),
        ]
        if rates is not None:
            cells.append(Text(f"{rates[row.name]:,.0f}" if row.name in rates else ""))
        cells += [Text(f"{row.errors:,}"), Text(str(row.restarts)), Text(reason[:LONGEST_REASON])]
        table.add_row(*cells)
    return table


def summary(rows: Sequence[WorkerRow]) -> Text:
    """Return one line that says how it stands."""
    ready = sum(row.state == "ready" for row in rows)
    words = f"{ready} of {len(rows)} worker{'s' if len(rows) != 1 else ''} ready"
    return Text(words, style="green" if ready == len(rows) else "yellow")


def watch(console: Console, base: str, token: str | None, interval_s: float) -> None:
    """Show the table until interrupted; a runner that is gone is shown as gone, and looked for again."""
    before: Table | None = None
    before_s = 0.0
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            try:
                now, now_s = fetch(base, token), time.monotonic()
            except (StartError, NotAnswered) as exc:
                live.update(Text(f"{exc}", style="red"), refresh=True)
                before = None
            else:
                rates = {} if before is None else _rates(before, now, now_s - before_s)
                fitted = console.is_terminal
                live.update(
                    Group(grid(now.workers, rates, fitted=fitted), Text(""), summary(now.workers)), refresh=True
                )
                before, before_s = now, now_s
            time.sleep(interval_s)


def _rates(before: Table, now: Table, seconds: float) -> dict[str, float]:
    counts = {row.name: row.queries for row in before.workers}
    return {row.name: max(row.queries - counts[row.name], 0) / seconds for row in now.workers if row.name in counts}


def _duration(seconds: float) -> str:
    """Return a time in its two largest units, such as `2d 3h`."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in _UNITS:
        if left >= size or parts:
            parts.append(f"{left // size}{unit}")
            left %= size
    parts.append(f"{left}s")
    return " ".join(parts[:2])
