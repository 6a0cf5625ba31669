"""`em-runner status`: shows the table of workers in a terminal, once or until interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Final, NamedTuple

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.styled import Styled
from rich.table import Table as Grid
from rich.text import Text

from runner import table
from runner.commands import client
from runner.table import Table, WorkerRow
from shared.config.tokens import TokenError
from shared.errors import CommandError
from shared.logs.logger import printable_line

_EXIT_NOT_READY: Final = 1
EXIT_NO_RUNNER: Final = 2
_MAX_REASONS: Final = 5

_WATCH_TIMEOUT_S: Final = 3.0
"""How long `--watch` waits for a response before it shows that the runner is unavailable."""

# Rows in their normal state have no colour, so that the others stand out.
_STYLES: Final = {
    "failed": "bold red",
    "crashed": "red",
    "restarting": "red",
    "backoff": "yellow",
}


class _Column(NamedTuple):
    title: str
    cell: Callable[[WorkerRow], str]
    wide: bool = False
    justify: JustifyMethod = "right"


_COLUMNS: Final = (
    _Column("worker", lambda row: row.name, justify="left"),
    _Column("state", lambda row: row.state, justify="left"),
    _Column("node", lambda row: row.node, wide=True, justify="left"),
    _Column("pid", lambda row: "" if row.pid is None else str(row.pid)),
    _Column("up", lambda row: "" if row.pid is None else table.duration(row.uptime_s)),
    _Column("queries", lambda row: table.count(row.queries)),
    _Column("queries/s", lambda row: table.rate(row.queries_per_s), wide=True),
    _Column("p50", lambda row: table.latency(row.p50_s), wide=True),
    _Column("p99", lambda row: table.latency(row.p99_s), wide=True),
    _Column("errors", lambda row: table.count(row.errors)),
    _Column("503, 504", lambda row: table.count(row.unserved), wide=True),
    _Column("restarts", lambda row: str(row.restarts)),
)


def fetch(
    base: str,
    token: str | None,
    timeout_s: float = 10.0,
) -> Table:
    """Return the table of a runner.

    Raises:
        CommandError: if no runner of this version answers, or it refuses the request.
    """
    answer = client.call(
        base,
        "/workers",
        token=token,
        timeout_s=timeout_s,
    )
    if answer.status != 200:
        raise CommandError(client.describe_failure(base, answer))
    return client.convert(base, answer, Table)


def exit_status(rows: Sequence[WorkerRow]) -> int:
    """Return 0 if every worker is ready, else 1, also if there are no workers."""
    return 0 if rows and _all_ready(rows) else _EXIT_NOT_READY


def _all_ready(rows: Sequence[WorkerRow]) -> bool:
    return all(row.state == "ready" for row in rows)


def grid(rows: Sequence[WorkerRow], wide: bool = False) -> Grid:
    """Return the rows as a table, one line each. Workers that are not ready come first."""
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [column for column in _COLUMNS if wide or not column.wide]
    for column in columns:
        grid.add_column(
            column.title,
            justify=column.justify,
            no_wrap=True,
        )
    # In a narrow terminal, Rich first shrinks the columns that may wrap. Only the reason's column
    # may, so it is the first to become narrower. Its cells are cut, though, instead of wrapped.
    grid.add_column("reason")
    for row in _ready_last(rows):
        cells = [Text(column.cell(row)) for column in columns]
        reason = Text(_reason(row) or "", no_wrap=True, overflow="ellipsis")
        grid.add_row(*cells, reason, style=_STYLES.get(row.state))
    return grid


def reasons(rows: Sequence[WorkerRow]) -> Text:
    """Return why workers are not ready, one paragraph for each distinct reason."""
    # The rows of a narrow table cut their reasons, so the whole text is shown here.
    names: dict[str, list[str]] = {}
    for row in rows:
        reason = _reason(row)
        if row.state != "ready" and reason is not None:
            names.setdefault(reason, []).append(row.name)
    paragraphs = [f"{_shortened(workers)}: {reason}\n" for reason, workers in names.items()]
    more = len(paragraphs) - _MAX_REASONS
    if more > 0:
        # When a network fails, each of a hundred workers may have its own reason.
        paragraphs[_MAX_REASONS:] = [f"and {more} more reason{'' if more == 1 else 's'}\n"]
    return _folded("".join(paragraphs))


def summary(rows: Sequence[WorkerRow]) -> Text:
    """Return one line: how many workers are ready."""
    style = "green" if _all_ready(rows) else "yellow"
    return Text(table.summary([row.state for row in rows]), style=style)


def _ready_last(rows: Sequence[WorkerRow]) -> list[WorkerRow]:
    return sorted(rows, key=lambda row: row.state == "ready")


def _shortened(names: Sequence[str]) -> str:
    first = ", ".join(names[:2])
    more = len(names) - 2
    return f"{first} and {more} more" if more > 0 else first


def _folded(text: str, style: str = "") -> Text:
    """Return text that wraps even on a console that does not wrap other output."""
    return Text(
        text,
        style=style,
        no_wrap=False,
        overflow="fold",
    )


def _reason(row: WorkerRow) -> str | None:
    """Return why a worker is in its state, else its last error, else None."""
    reason = table.displayed_reason(row)
    if reason is None:
        if not row.last_errors:
            return None
        # An error of the connection is the least important one, even if it is the newest: the
        # worker has reconnected since.
        error = max(row.last_errors, key=lambda each: (each.source != "connection", each.at))
        reason = f"{table.ago(error.at)}: {error.error}"
    # It may contain a handler's or a node's text, which must not control the terminal.
    return printable_line(reason)


def watch(
    console: Console,
    find: Callable[[], tuple[str, str | None]],
    interval_s: float,
    wide: bool,
) -> None:
    """Show the table until interrupted, also while the runner is unavailable.

    Args:
        console: where to print. A terminal that can move its cursor shows one table, which is
            updated and cut at the terminal's height. Anything else gets one table after another.
        find: returns the runner's address and token. It is called for each update.
        interval_s: the time between two updates.
        wide: whether to show all columns.
    """
    redraws = console.is_terminal and not console.is_dumb_terminal
    rows: Sequence[WorkerRow] = ()
    screen = Live(console=console, auto_refresh=False, screen=True) if redraws else nullcontext()
    with screen as live:
        while True:
            problem: str | None = None
            try:
                # The address each time: after a restart the runner may have another port.
                base, token = find()
                rows = fetch(base, token, _WATCH_TIMEOUT_S).workers
            except (CommandError, TokenError) as exc:
                problem = str(exc)
            shown = view(rows, problem, wide)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            time.sleep(interval_s)


def view(
    rows: Sequence[WorkerRow],
    problem: str | None = None,
    wide: bool = False,
) -> Group:
    """Return what `--watch` shows. The most important is on top, because a screen cuts the rest.

    Args:
        rows: the last table of the runner.
        problem: why there is no newer one; None if there is.
        wide: whether to show all columns.
    """
    if problem is None:
        return Group(summary(rows), reasons(rows), grid(rows, wide))
    if not rows:
        return Group(_folded(problem, "bold red"))
    text = f"The table below is out of date: {problem}\n"
    return Group(_folded(text, "bold red"), Styled(grid(rows, wide), "dim"))
