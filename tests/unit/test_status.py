"""`runner.status`: what an operator reads at a glance."""

from __future__ import annotations

import time
from io import StringIO
from typing import Any, get_args

import pytest
from rich.console import Console

from runner.client import parse_url
from runner.dashboard.view import views
from runner.status import exit_status, grid, in_full, summary, view
from runner.table import ErrorSource, WorkerRow, count, last_errors, latency, rate
from shared.ipc import Mishap

SOURCES = get_args(ErrorSource)


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
        "queries_per_s": 0.0,
        "p50_s": None,
        "p99_s": None,
        "errors": 0,
        "reconnects": 0,
        "ignored": {},
        "unanswered": 0,
        "last_error": "",
        "last_errors": [],
    }
    return WorkerRow(**values | more)


def wrong(**errors: tuple[float, str]) -> dict[str, Any]:
    """Return what a row has of errors, by their source: how many seconds ago, and what."""
    found = last_errors(*(None if name not in errors else mishap(*errors[name]) for name in SOURCES))
    return {"last_error": found[0].error, "last_errors": found}


def mishap(ago_s: float, words: str) -> Mishap:
    return Mishap(time.time() - ago_s, words)


def printed(*rows: WorkerRow, width: int = 200) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nobody reads it
    console.print(grid(rows, width if width < 200 else None))
    console.print(summary(rows))
    console.file.close()
    return console.export_text().splitlines()


def test_row_has_what_one_looks_for() -> None:
    heading, line, last = printed(
        row(
            queries=12_345,
            errors=3,
            restarts=2,
            uptime_s=3 * 3600 + 59,
            **wrong(handler=(200.5, "ValueError: no\nsuch [bold]thing")),
        )
    )
    for word in ("worker", "state", "node", "pid", "up", "queries", "errors", "restarts"):
        assert word in heading
    for cell in ("a_server", "ready", "ws://localhost:8080", "42", "3h 0m", "12,345", "3", "2"):
        assert f" {cell} " in f" {line} "
    assert "3m 20s ago: ValueError: no such [bold]thing" in line, "one line, and as it is"
    assert last == "1 of 1 worker ready"


def test_what_a_worker_is_at_goes_before_what_once_went_wrong() -> None:
    line = printed(row(state="backoff", detail="cannot connect to localhost:8080", **wrong(handler=(1, "long ago"))))[1]
    assert "cannot connect" in line
    assert "long ago" not in line


def test_connection_that_was_lost_hides_no_error_of_the_handler() -> None:
    rows = (
        row(**wrong(handler=(90.5, "ValueError: no"), connection=(5.5, "lost"))),
        row("b", **wrong(connection=(5.5, "lost"))),
    )
    _, first, second, _ = printed(*rows)
    assert "1m 30s ago: ValueError: no" in first
    assert "lost" not in first
    assert "5s ago: lost" in second
    assert rows[0].last_error == "lost"
    assert [each.source for each in rows[0].last_errors] == ["connection", "handler"], "the newest first"


def test_direct_queries_without_an_answer_are_shown_where_there_are_some() -> None:
    heading, line, *_ = printed(row(unanswered=1234), row("b_server"))
    assert "503, 504" in heading
    assert " 1,234 " in line
    assert "503" not in printed(row())[0]


def test_rate_and_times_are_shown() -> None:
    heading, first, second, _ = printed(row(queries_per_s=1234.4, p50_s=0.0000124, p99_s=0.25), row("b_server"))
    for word in ("a second", "p50", "p99"):
        assert word in heading
    for cell in ("1,234", "12 us", "250 ms"):
        assert f" {cell} " in first
    assert "us" not in second.replace("status", ""), "of nothing there is no time"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, ""),
        (2e-7, "0 us"),
        (0.000999, "999 us"),
        (0.00123, "1.2 ms"),
        (0.00996, "10 ms"),
        (0.0456, "46 ms"),
        (1.26, "1.3 s"),
        (64.0, "64 s"),
    ],
)
def test_latency_is_told_with_two_digits(seconds: float | None, shown: str) -> None:
    assert latency(seconds) == shown


@pytest.mark.parametrize(
    ("per_s", "shown"), [(0.0, "0"), (0.2, "0.2"), (9.94, "9.9"), (9.96, "10"), (10.4, "10"), (54321.0, "54,321")]
)
def test_rate_has_a_decimal_place_only_where_it_says_something(per_s: float, shown: str) -> None:
    assert rate(per_s) == shown


@pytest.mark.parametrize("width", [60, 80, 100, 120, 150])
def test_narrow_terminal_does_without_columns_and_cuts_no_name(width: int) -> None:
    rows = (
        row("word_counter_server_2", queries=123_456, p50_s=0.001, restarts=1, **wrong(handler=(0, "x" * 300))),
        row("b", "registering"),
    )
    heading, *lines, _ = printed(*rows, width=width)
    assert [line.split()[:2] for line in lines] == [["word_counter_server_2", "ready"], ["b", "registering"]]
    assert all(len(line) <= width for line in lines)
    assert "xxxxxxxxxx" in lines[0], "some of the reason is there"
    assert ("restarts" in heading) is (width >= 80), "what tells of trouble goes last"
    assert ("pid" in heading) is (width >= 80), "it is what one acts by"


@pytest.mark.parametrize("width", [20, 40, 60])
def test_name_that_no_row_has_room_for_gives_way_to_the_state(width: int) -> None:
    name = "a" * 53 + "_server_2"
    heading, *lines, _ = printed(row(name, "backoff", detail="refused"), row("b"), width=width)
    assert heading.split() == ["worker", "state"]
    (shown, state), (other, ready) = (line.split() for line in lines)
    assert (state, other, ready) == ("backoff", "b", "ready")
    start, _, end = shown.partition("\u2026")
    assert name.startswith(start)
    assert name.endswith(end)
    assert "r_2" in end
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.9, "59s"), (60, "1m 0s"), (3725, "1h 2m"), (90_061, "1d 1h"), (8_640_000, "100d 0h")],
)
def test_uptime_is_told_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert f" {shown} " in printed(row(uptime_s=seconds))[1]


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (999_999, "999,999"), (1_234_567, "1.23 M"), (12_345_678, "12.3 M"), (1_234_567_890, "1.23 G")],
)
def test_large_counts_are_short(number: int, shown: str) -> None:
    assert count(number) == shown


@pytest.mark.parametrize("width", [60, 80, 120, 132])
def test_why_a_worker_is_not_ready_is_told_in_whole_where_a_row_has_no_room_for_it(width: int) -> None:
    why = "cannot connect to disco.example.com:8080: Name or service not known"
    rows = row("word_counter_server", "backoff", detail=why), row("b", detail=""), row("c", "backoff", detail="short")
    told = in_full(rows, width).plain
    assert told in (f"word_counter_server: {why}\n", "")
    assert why in told + "".join(printed(*rows, width=width)).replace("  ", "")
    assert "c: short" not in told
    assert in_full(rows, None).plain == ""


def test_column_that_says_nothing_goes_before_the_reason_is_cut() -> None:
    why = "cannot connect to disco.example.com:8080: Name or service not known"
    rows = row("a_server", "backoff", detail=why, pid=None), row("b_server", "backoff", pid=None, queries=7)
    heading, first, *_ = printed(*rows, width=120)
    assert why in first
    assert "queries" in heading
    assert not {"errors", "restarts", "p50", "pid"} & set(heading.split())
    heading, first, *_ = printed(*(row(each.name, errors=1, restarts=1) for each in rows), width=150)
    assert {"errors", "restarts", "p50"} <= set(heading.split()), "where there is room for all, all are there"


def test_worker_that_failed_is_said_to_be_tried_again() -> None:
    rows = row("a", "failed", detail="killed by SIGKILL"), row("b", "failed")
    _, first, second, _ = printed(*rows)
    assert "killed by SIGKILL; it is tried again within a minute" in first
    assert second.rstrip().endswith("  it is tried again within a minute")


@pytest.mark.parametrize(
    ("reason", "problem"),
    [
        ("\u7bc0\u70b9\u306b\u63a5\u7d9a\u3067\u304d\u306a\u3044" * 12, ""),
        ("see https://example.com/" + "x" * 120 + " for more of it", ""),
        ("short", "no answer from http://127.0.0.1:9600: [Errno 111] Connection refused; is the runner up?"),
    ],
    ids=["wide letters", "long words", "gone"],
)
@pytest.mark.parametrize("width", [40, 60, 80])
def test_watched_table_is_as_high_as_the_screen_at_the_most(reason: str, problem: str, width: int) -> None:
    rows = [row(f"w{number}_server", "backoff", detail=f"{number} {reason}") for number in range(30)]
    console = Console(width=width, height=24, record=True, file=StringIO())
    console.print(view(rows, width, 24, problem))
    assert len(console.export_text().splitlines()) <= 24


def test_exit_status_says_whether_all_are_ready() -> None:
    assert exit_status([row(), row("b_server")]) == 0
    assert exit_status([row(), row("b_server", "backoff")]) == 1
    assert exit_status([]) == 1, "of nothing it cannot be said that all is well"


def seen(*rows: WorkerRow, height: int | None = None, problem: str = "") -> list[str]:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nobody reads it
    console.print(view(rows, 120, height, problem))
    console.file.close()
    return console.export_text().splitlines()


def test_of_more_workers_than_fit_those_that_are_not_ready_are_seen() -> None:
    rows = [row(f"w{number}", "backoff" if number == 40 else "ready") for number in range(50)]
    lines = seen(*rows, height=10)
    assert len(lines) == 10
    assert lines[0].rstrip() == "49 of 50 workers ready"
    assert lines[3].startswith("w40")
    assert lines[-1].rstrip() == "and 44 more that do not fit"
    assert len(seen(*rows[:7], height=10)) == 10
    assert "that do not fit" not in seen(*rows[:6], height=10)[-1]


def test_why_workers_are_not_ready_goes_before_the_rows_of_those_that_are() -> None:
    why = "cannot connect to disco.example.com:8080: " + "Name or service not known " * 5
    rows = [row(f"w{number}", "backoff" if number >= 37 else "ready", detail=why) for number in range(40)]
    lines = seen(*rows, height=12)
    assert len(lines) <= 12
    assert [line.split()[0] for line in lines[3:6]] == ["w37", "w38", "w39"]
    assert "".join(lines).count("Name or service not known") > 5, "it is told in whole, once"
    assert any(line.startswith("w37, w38 and 1 more: cannot connect") for line in lines)
    assert any(line.startswith("w0 ") for line in lines), "what room is left is theirs"
    # Of more than there is room for: some rows, and why.
    lines = seen(*[row(f"w{number}", "backoff", detail=why) for number in range(40)], height=12)
    assert len(lines) <= 12
    assert any(line.startswith("w0, w1 and 38 more: cannot connect") for line in lines)
    assert sum("backoff" in line for line in lines) >= 5


def test_table_of_a_runner_that_is_gone_is_said_to_be_from_before() -> None:
    lines = seen(row(), problem="no answer from http://127.0.0.1:9600")
    assert lines[0].startswith("What is below was before: no answer from http://127.0.0.1:9600")
    assert any("a_server" in line for line in lines)
    assert [line.rstrip() for line in seen(problem="no runner is known")] == ["no runner is known", ""]


def test_error_that_is_cut_on_the_page_says_so() -> None:
    (short,) = views([row(**wrong(handler=(0, "x" * 160)))], {})
    (long,) = views([row(**wrong(handler=(0, "x" * 161)))], {})
    assert short.brief.endswith(": " + "x" * 160)
    assert long.brief.endswith(": " + "x" * 159 + "\u2026")
    assert long.last_error.endswith("\n" + "x" * 161)


def test_no_word_of_a_handler_moves_the_cursor() -> None:
    assert "?[2Jgone ?]0;title?" in "".join(printed(row(**wrong(handler=(0, "\x1b[2Jgone\n\x1b]0;title\x07")))))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:9600/", "http://127.0.0.1:9600"),
        ("127.0.0.1:9600", "http://127.0.0.1:9600"),
        ("[::1]:9600", "http://[::1]:9600"),
        ("https://agents.example.com/em", "https://agents.example.com/em"),
    ],
)
def test_runner_is_named_by_its_url_or_its_address(text: str, url: str) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "nonsense", "ftp://127.0.0.1", "http://", "host:port", "http://h:99999", "a/b:9600"]
)
def test_what_is_no_address_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as http://127\.0\.0\.1:9600"):
        parse_url(text)


def test_password_in_an_address_is_refused_and_not_repeated() -> None:
    for password in ("s3cr3t", "s3cr3t/s3cr3t", "s3cr3t#"):
        with pytest.raises(ValueError, match=r"a password in it is not taken.*--token-file") as caught:
            parse_url(f"http://me:{password}@127.0.0.1:9600")
        assert "s3cr3t" not in str(caught.value)
