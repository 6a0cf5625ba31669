"""What `em-runner status` shows: the table of workers in a terminal, once or for as long as one looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from io import StringIO
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

_MEASURE: Final = Console(file=StringIO())
"""What knows how a text is broken into lines; nothing is printed on it."""

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
        raise client.not_a_runner(base)
    if answer.status != 200:
        words = answer.body.get("error", answer.body) if isinstance(answer.body, dict) else answer.body
        advice = "; name the file with the token as --token-file" if answer.status == 401 else ""
        raise NotAnswered(f"{answer.status}: {words}{advice}")
    try:
        return msgspec.convert(answer.body, Table)
    except msgspec.ValidationError:
        raise _of_another_version(base, token, timeout_s) from None


def _of_another_version(base: str, token: str | None, timeout_s: float) -> StartError:
    from runner.metrics import version

    document = client.call(base, "/openapi.json", token=token, timeout_s=timeout_s).body
    match document:
        case {"info": {"title": "em-runner", "version": running}}:
            return StartError(
                f"the runner at {base} is em-runner {printable_line(running)}, and this command {version()}: start the "
                "runner anew after an upgrade, or ask it with the command of its own version"
            )
    return client.not_a_runner(base)


def exit_status(rows: Sequence[WorkerRow]) -> int:
    """Return 0 when every worker is ready, else 1: none is not all is well."""
    return 0 if rows and all(row.state == "ready" for row in rows) else EXIT_NOT_READY


def grid(rows: Sequence[WorkerRow], width: int | None = None) -> Grid:
    """Return the rows as a table; of the width of a terminal, a row is one line, and what matters least is left out."""
    columns, room = _fitting(rows, width)
    reasons = [table.brief(_reason(row), LONGEST_REASON) for row in rows]
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
    """Return why workers are not ready, where the table has no room for it: a paragraph for each why, or nothing."""
    return _wrapped("".join(f"{each}\n" for each in _paragraphs(rows, _fitting(rows, width)[1])))


def _paragraphs(rows: Sequence[WorkerRow], room: int) -> list[str]:
    """Return each why that is longer than the room in a row, and whose it is."""
    whose: dict[str, list[str]] = {}
    for row in rows:
        if row.state != "ready" and len(_reason(row)) > min(room, LONGEST_REASON):
            whose.setdefault(_reason(row), []).append(row.name)
    return [
        f"{', '.join(names[:2])}{f' and {more} more' if (more := len(names) - 2) > 0 else ''}: {why}"
        for why, names in whose.items()
    ]


def _wrapped(text: str, style: str = "") -> Text:
    """Return a text that goes on in the next line, in a screen that cuts its lines otherwise, too."""
    return Text(text, style=style, no_wrap=False, overflow="fold")


def _without_middle(name: str, longest: int) -> str:
    """Return a name that is short enough; its end tells an agent's workers from each other."""
    end = longest // 2
    return name if len(name) <= longest else f"{name[: longest - end - 1]}\u2026{name[-end:]}"


def _height(text: str, width: int) -> int:
    """Return how many lines a text takes that goes on in the next line."""
    return len(_wrapped(text).wrap(_MEASURE, width))


def _reason(row: WorkerRow) -> str:
    return printable_line(table.why(row) or _last_error(row))


def _fitting(rows: Sequence[WorkerRow], width: int | None) -> tuple[dict[str, list[Text]], int]:
    """Return the columns that fit, and how much room is left for the reason."""
    whole = _columns(rows)
    if width is None:
        return whole, LONGEST_REASON
    longest_reason = min(max((len(_reason(row)) for row in rows), default=0), LONGEST_REASON)
    # A column that says nothing goes before the reason is cut, and one that does only before it is cut to a word.
    useful = [name for name in _SPENT_FIRST if any(cell.plain not in ("", "0") for cell in whole.get(name, ()))]
    empty = [name for name in _SPENT_FIRST if name in whole and name not in useful]
    spent: list[str] = []

    def fits(kept: Iterable[str], name: str) -> bool:
        reserve = longest_reason if name in empty else min(LEAST_REASON, longest_reason)
        return sum(_width(each, whole[each]) for each in kept) <= width - reserve

    for heading in (*empty, *useful):
        if not fits((name for name in whole if name not in spent), heading):
            spent.append(heading)
    for heading in reversed(spent[:]):  # what is narrow may fit where what is wide did not
        if fits((name for name in whole if name not in spent or name == heading), heading):
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
    shown: list[RenderableType] = [_wrapped(told, "bold red") if problem else summary(rows), Text("")]
    room = None if height is None else height - 2 - (_height(told, width) if problem and width else 1)
    rows, paragraphs, left_out = _chosen(
        rows, width, room, [] if problem else _paragraphs(rows, _fitting(rows, width)[1])
    )
    if rows:
        shown.append(Styled(grid(rows, width), "dim") if problem else grid(rows, width))
    if left_out:
        shown.append(Text(f"and {left_out} more that do not fit", style="dim"))
    if paragraphs:
        shown.append(_wrapped("\n".join(paragraphs)))
    return Group(*shown)


def _chosen(
    rows: Sequence[WorkerRow], width: int | None, room: int | None, paragraphs: list[str]
) -> tuple[Sequence[WorkerRow], list[str], int]:
    """Return the rows and the paragraphs of why that so many lines have room for, and how many rows have none.

    First come the rows that are not ready, then why, then those that are ready.
    """
    heights = [_height(each, width) if width else 1 for each in paragraphs]
    if room is None or len(rows) + sum(heights) <= room:
        return rows, paragraphs, 0
    by_need = sorted(rows, key=lambda row: row.state == "ready")
    not_ready = sum(row.state != "ready" for row in rows)
    # A third of the screen is for why, however many are not ready.
    left = max(room - 1 - not_ready, room // 3)
    told: list[str] = []
    for paragraph, lines in zip(paragraphs, heights, strict=True):
        if lines > left:
            break
        told.append(paragraph)
        left -= lines
    room -= sum(heights[: len(told)])
    kept = max(room - 1, 1) if len(rows) > room else len(rows)
    return (by_need[:kept] if kept < len(rows) else rows), told, len(rows) - kept
