"""`runner.status`: what an operator reads at a glance."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from runner.status import exit_status, grid, summary
from runner.table import WorkerRow


def row(name: str = "a_server", state: str = "ready", **more: Any) -> WorkerRow:
    values: dict[str, Any] = {
        "name": name,
        "agent": "a",
        "node": "ws://localhost:8080",
        "state": state,
        "detail": "",
        "pid": 42,
        "incarnation": 1,
        "uptime_s": 0.0,
        "restarts": 0,
        "queries": 0,
        "queries_node": 0,
        "queries_http": 0,
        "errors": 0,
        "reconnects": 0,
        "ignored": {},
        "last_error": "",
    }
    return WorkerRow(**values | more)


def printed(*rows: WorkerRow, width: int = 200, rates: dict[str, float] | None = None) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nobody reads it
    console.print(grid(rows, rates, fitted=width < 200))
    console.print(summary(rows))
    console.file.close()
    return console.export_text().splitlines()


def test_row_has_what_one_looks_for() -> None:
    heading, line, last = printed(
        row(queries=12_345, errors=3, restarts=2, uptime_s=3 * 3600 + 59, last_error="ValueError: no\nsuch [bold]thing")
    )
    for word in ("worker", "state", "node", "pid", "up", "queries", "errors", "restarts"):
        assert word in heading
    for cell in ("a_server", "ready", "ws://localhost:8080", "42", "3h 0m", "12,345", "3", "2"):
        assert f" {cell} " in f" {line} "
    assert "ValueError: no such [bold]thing" in line, "one line, and as it is"
    assert last == "1 of 1 worker ready"


def test_what_a_worker_is_at_goes_before_what_once_went_wrong() -> None:
    line = printed(row(state="backoff", detail="cannot connect to localhost:8080", last_error="long ago"))[1]
    assert "cannot connect" in line
    assert "long ago" not in line


def test_rates_are_shown_where_they_are_known() -> None:
    heading, first, second, _ = printed(row(), row("b_server"), rates={"a_server": 1234.4})
    assert "a second" in heading
    assert "1,234" in first
    assert "1,234" not in second


def test_narrow_terminal_cuts_the_reason_and_no_name() -> None:
    line = printed(row(last_error="x" * 300), width=100)[1]
    assert "a_server" in line
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m 0s"), (3725, "1h 2m"), (90_061, "1d 1h"), (8_640_000, "100d 0h")],
)
def test_uptime_is_told_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert f" {shown} " in printed(row(uptime_s=seconds))[1]


def test_exit_status_says_whether_all_are_ready() -> None:
    assert exit_status([row(), row("b_server")]) == 0
    assert exit_status([row(), row("b_server", "backoff")]) == 1
