"""What `em-runner status` shows: the table of workers in a terminal, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.styled import Styled
from rich.table import Table as Grid
from rich.text import Text

from runner import client, table
from runner.table import Table, WorkerRow
from shared.errors import StartError
from shared.logs import printable_line
from shared.tokens import TokenError

EXIT_NOT_READY: Final = 1
EXIT_NO_RUNNER: Final = 2
LONGEST_REASON: Final = 120
_COLOURS: Final = {"ready": "green", "failed": "bold red", "crashed": "red", "restarting": "red", "backoff": "yellow"}
_SPENT_FIRST: Final = ("p50", "queries", "up", "p99", "a second", "node", "pid", "restarts", "503, 504", "errors")
"""What a terminal that is too narrow does without, in this order."""

_WHY: Final = "why, or the last error"

LEAST_REASON: Final = 20
"""How many characters of the reason are worth more than a column."""

_GAP: Final = 2

LOOK_S: Final = 3.0
"""How long one who watches waits for the runner before it is shown as gone."""


class NotAnswered(Exception):
    """The runner answered, but not with its table; the text says what to do."""


def fetch(base: str, token: str | None, timeout_s: float = 10.0) -> Table:
    """Ask a runner for its table.

    Raises:
        StartError: when nobody answers, or what answers is none.
        NotAnswered: when it refuses.
    """
    answer = client.call(base, "/workers", token=token, timeout_s=timeout_s)
    if answer.status == 404:
        raise StartError(f"what answers at {base} is not em-runner")
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
    columns, room = _fitting(rows, width)
    reasons = [_cut(_reason(row)) for row in rows]
    grid = Grid(box=None, pad_edge=False, expand=width is not None, padding=(0, _GAP, 0, 0))
    for heading in columns:
        grid.add_column(heading, justify="left" if heading in ("worker", "state", "node") else "right", no_wrap=True)
    fitted = 1 if width is not None else None
    if width is None or (any(reasons) and room >= len("why")):
        grid.add_column(_WHY if room >= len(_WHY) else "why", overflow="ellipsis", no_wrap=True, ratio=fitted)
    for *cells, reason in zip(*columns.values(), map(Text, reasons), strict=True):
        grid.add_row(*cells, *([reason] if len(grid.columns) > len(cells) else []))
    return grid


def in_full(rows: Sequence[WorkerRow], width: int | None) -> Text:
    """Return why workers are not ready, where the table has no room for it: a paragraph for each, or nothing."""
    room = _fitting(rows, width)[1]
    cut = [row for row in rows if row.state != "ready" and len(_reason(row)) > min(room, LONGEST_REASON)]
    return _wrapped("".join(f"{row.name}: {_reason(row)}\n" for row in cut))


def _wrapped(text: str, style: str = "") -> Text:
    """Return a text that goes on in the next line, in a screen that cuts its lines otherwise, too."""
    return Text(text, style=style, no_wrap=False, overflow="fold")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}\u2026"


def _without_middle(name: str, longest: int) -> str:
    """Return a name that is short enough; its end tells an agent's workers from each other."""
    end = longest // 2
    return name if len(name) <= longest else f"{name[: longest - end - 1]}\u2026{name[-end:]}"


def _reason(row: WorkerRow) -> str:
    return printable_line(row.detail or _last_error(row))


def _fitting(rows: Sequence[WorkerRow], width: int | None) -> tuple[dict[str, list[Text]], int]:
    """Return the columns that fit, and how much room is left for the reason."""
    whole = _columns(rows)
    if width is None:
        return whole, LONGEST_REASON
    left = width - min(LEAST_REASON, max((len(_reason(row)) for row in rows), default=0))
    spent: list[str] = []
    for heading in _SPENT_FIRST:
        if sum(_width(name, whole[name]) for name in whole if name not in spent) > left:
            spent.append(heading)
    for heading in reversed(spent[:]):  # what is narrow may fit where what is wide did not
        kept = [name for name in whole if name not in spent or name == heading]
        if sum(_width(name, whole[name]) for name in kept) <= left:
            spent.remove(heading)
    columns = {name: cells for name, cells in whole.items() if name not in spent}
    room = width - sum(_width(name, cells) for name, cells in columns.items())
    if room < 0:  # the states are what one looks for: the names give way
        longest = max(len("worker"), _width("worker", columns["worker"]) - _GAP + room)
        columns["worker"] = [Text(_without_middle(row.name, longest)) for row in rows]
    return columns, max(room, 0)


def _columns(rows: Sequence[WorkerRow]) -> dict[str, list[Text]]:
    unanswered = any(row.unanswered for row in rows)
    return {
        "worker": [Text(row.name) for row in rows],
        "state": [Text(row.state, style=_COLOURS.get(row.state, "cyan")) for row in rows],
        "node": [Text(row.node) for row in rows],
        "pid": [Text("" if row.pid is None else str(row.pid)) for row in rows],
        "up": [Text("" if row.pid is None else table.uptime(row.uptime_s)) for row in rows],
        "queries": [Text(table.count(row.queries)) for row in rows],
        "a second": [Text(table.rate(row.queries_per_s)) for row in rows],
        "p50": [Text(table.latency(row.p50_s)) for row in rows],
        "p99": [Text(table.latency(row.p99_s)) for row in rows],
        "errors": [Text(table.count(row.errors)) for row in rows],
        # The rarest of all: it is there when it says something.
        **({"503, 504": [Text(table.count(row.unanswered)) for row in rows]} if unanswered else {}),
        "restarts": [Text(str(row.restarts)) for row in rows],
    }


def _last_error(row: WorkerRow) -> str:
    """Return the newest error in a line; one of the connection, which is over, only where there is no other."""
    found = sorted(row.last_errors, key=lambda each: (each.source != "connection", each.at))
    return f"{table.ago(found[-1].at)}: {found[-1].error}" if found else ""


def _width(heading: str, cells: Sequence[Text]) -> int:
    return _GAP + max(len(heading), *(cell.cell_len for cell in cells)) if cells else _GAP + len(heading)


def summary(rows: Sequence[WorkerRow]) -> Text:
    """Return one line that says how it stands."""
    ready = sum(row.state == "ready" for row in rows)
    return Text(table.summary(ready, len(rows)), style="green" if ready == len(rows) else "yellow")


def watch(console: Console, where: Callable[[], tuple[str, str | None]], interval_s: float) -> None:
    """Show the table until interrupted; a runner that is gone is shown as gone, and looked for again.

    Args:
        console: where to. What is no terminal, or one that cannot move its cursor, gets one table below the other.
        where: finds the runner, and returns its address and token; called for each look.
        interval_s: how long between two looks.
    """
    redraws = console.is_terminal and not console.is_dumb_terminal
    width, height = (console.width, console.height) if console.is_terminal else (None, None)
    rows: Sequence[WorkerRow] = ()
    with Live(console=console, auto_refresh=False, screen=True) if redraws else nullcontext() as live:
        while True:
            problem = ""
            try:
                rows = fetch(*where(), timeout_s=LOOK_S).workers
            except (StartError, NotAnswered, TokenError) as exc:
                problem = str(exc)
            if live is not None:
                width, height = console.width, console.height
                live.update(view(rows, width, height, problem), refresh=True)
            else:
                console.print(view(rows, width, None, problem))
            time.sleep(interval_s)


def view(rows: Sequence[WorkerRow], width: int | None, height: int | None, problem: str = "") -> Group:
    """Return how it stands, then the table; of more rows than fit, those that are not ready come first.

    Args:
        rows: the table, as it was when it could last be had.
        width, height: of the terminal; None sets no limit.
        problem: why it cannot be had now; empty when it can.
    """
    told = f"What is below was before: {problem}" if rows else problem
    parts = [_wrapped(told, "bold red") if problem else summary(rows), Text("")]
    lines = 1 + (len(told) // width + 1 if problem and width else 1)
    left_out = 0 if height is None else max(len(rows) - max(height - lines - 2, 1), 0)
    if left_out:
        rows = sorted(rows, key=lambda row: row.state == "ready")[: len(rows) - left_out]
    shown: list[RenderableType] = [*parts]
    if rows:
        shown.append(Styled(grid(rows, width), "dim") if problem else grid(rows, width))
    if left_out:
        shown.append(Text(f"and {left_out} more that do not fit", style="dim"))
    elif not problem and (reasons := in_full(rows, width)):
        shown.append(reasons)  # where it does not fit, the screen cuts it off
    return Group(*shown)
