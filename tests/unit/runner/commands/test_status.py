"""`runner.commands.status`: the table of workers, its summary and the reasons."""

from __future__ import annotations

import time
from io import StringIO
from typing import Any, get_args

import pytest
from rich.console import Console

from runner.commands.client import parse_url
from runner.commands.status import exit_status, grid, reasons, summary, view
from runner.table import ErrorSource, WorkerRow, count, last_errors, latency, rate
from runner.web.dashboard._view import views
from shared.ipc import LastError

SOURCES = get_args(ErrorSource)


def row(name: str = "a_server", state: str = "ready", **more: Any) -> WorkerRow:
    values: dict[str, Any] = {
        "name": name,
        "agent": "a",
        "node": "ws://localhost:8080",
        "state": state,
        "reason": "",
        "pid": 42,
        "incarnation": 1,
        "uptime_s": 0.0,
        "restarts": 0,
        "queries": 0,
        "queries_node": 0,
        "queries_direct": 0,
        "queries_per_s": 0.0,
        "p50_s": None,
        "p99_s": None,
        "errors": 0,
        "connection_failures": 0,
        "ignored": {},
        "unserved": 0,
        "last_error": "",
        "last_errors": [],
    }
    return WorkerRow(**values | more)


def error_fields(**errors: tuple[float, str]) -> dict[str, Any]:
    """Return the error fields of a row from the age in seconds and the text for each source."""
    found = last_errors(
        *(None if name not in errors else error_from(*errors[name]) for name in SOURCES)
    )
    return {"last_error": found[0].error, "last_errors": found}


def error_from(ago_s: float, text: str) -> LastError:
    return LastError(time.time() - ago_s, text)


def printed(*rows: WorkerRow, width: int = 10_000, wide: bool = True) -> list[str]:
    console = Console(width=width, record=True, soft_wrap=True, file=StringIO())
    console.print(grid(rows, wide))
    console.print(summary(rows))
    return console.export_text().splitlines()


def test_row_shows_state_counts_and_latest_error() -> None:
    heading, line, _ = printed(
        row(
            queries=12_345,
            errors=3,
            restarts=2,
            uptime_s=3 * 3600 + 59,
            **error_fields(handler=(200.5, "ValueError: no\nsuch [bold]thing")),
        )
    )
    for title in ("worker", "state", "node", "pid", "up", "queries", "errors", "restarts"):
        assert title in heading
    for cell in ("a_server", "ready", "ws://localhost:8080", "42", "3h 0m", "12,345", "3", "2"):
        assert f" {cell} " in f" {line} "
    # On one line, and its markup is text.
    assert "3m 20s ago: ValueError: no such [bold]thing" in line


@pytest.mark.message_text
def test_summary_counts_the_ready_workers() -> None:
    assert printed(row())[-1] == "1 of 1 worker ready"
    assert printed(row(), row("b", "backoff"))[-1] == "1 of 2 workers ready"


def test_current_reason_is_shown_instead_of_an_earlier_error() -> None:
    line = printed(
        row(
            state="backoff",
            reason="cannot connect to localhost:8080",
            **error_fields(handler=(1, "long ago")),
        )
    )[1]
    assert "cannot connect" in line
    assert "long ago" not in line


def test_handler_error_is_shown_before_a_newer_connection_loss() -> None:
    rows = (
        row(**error_fields(handler=(90.5, "ValueError: no"), connection=(5.5, "lost"))),
        row("b", **error_fields(connection=(5.5, "lost"))),
    )
    _, first, second, _ = printed(*rows)
    assert "1m 30s ago: ValueError: no" in first
    assert "lost" not in first
    assert "5s ago: lost" in second


def test_errors_of_a_row_have_the_newest_first() -> None:
    found = row(**error_fields(handler=(90.5, "ValueError: no"), connection=(5.5, "lost")))
    assert found.last_error == "lost"
    assert [each.source for each in found.last_errors] == ["connection", "handler"]


def test_only_a_wide_table_has_all_columns() -> None:
    heading, line, *_ = printed(row(unserved=1234))
    assert "503, 504" in heading
    assert " 1,234 " in line
    heading, line, *_ = printed(row(unserved=1234), wide=False)
    assert heading.split() == [
        "worker",
        "state",
        "pid",
        "up",
        "queries",
        "errors",
        "restarts",
        "reason",
    ]
    assert "1,234" not in line


def test_rate_and_latencies_are_shown() -> None:
    heading, first, second, _ = printed(
        row(queries_per_s=1234.4, p50_s=0.0000124, p99_s=0.25), row("b_server")
    )
    for title in ("queries/s", "p50", "p99"):
        assert title in heading
    for cell in ("1,234", "12 us", "250 ms"):
        assert f" {cell} " in first
    assert "us" not in second.replace("status", ""), "without queries there is no latency"


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
def test_latency_is_shown_with_two_digits(seconds: float | None, shown: str) -> None:
    assert latency(seconds) == shown


@pytest.mark.parametrize(
    ("per_s", "shown"),
    [(0.0, "0"), (0.2, "0.2"), (9.94, "9.9"), (9.96, "10"), (10.4, "10"), (54321.0, "54,321")],
)
def test_rate_has_a_decimal_place_only_below_ten(per_s: float, shown: str) -> None:
    assert rate(per_s) == shown


@pytest.mark.parametrize("width", [40, 60, 80, 100, 150])
def test_narrow_terminal_cuts_the_reason_of_a_row_first(width: int) -> None:
    rows = (
        row("word_counter_server_2", **error_fields(handler=(0, "x" * 300))),
        row("b", "registering"),
    )
    heading, *lines, _ = printed(*rows, width=width, wide=False)
    assert len(lines) == 2
    assert all(len(line) <= width for line in (heading, *lines))
    if width >= 80:
        assert [line.split()[:2] for line in lines] == [
            ["b", "registering"],
            ["word_counter_server_2", "ready"],
        ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0s"),
        (59.9, "59s"),
        (60, "1m 0s"),
        (3725, "1h 2m"),
        (90_061, "1d 1h"),
        (8_640_000, "100d 0h"),
    ],
)
def test_uptime_is_shown_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert f" {shown} " in printed(row(uptime_s=seconds))[1]


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (1_234_567, "1.23 M"),
        (12_345_678, "12.3 M"),
        (1_234_567_890, "1.23 G"),
    ],
)
def test_large_counts_are_shortened(number: int, shown: str) -> None:
    assert count(number) == shown


REASON = "cannot connect to disco.example.com:8080: Name or service not known"


def test_workers_with_one_reason_share_a_paragraph() -> None:
    rows = [row(f"w{number}", "backoff", reason=REASON) for number in range(4)]
    rows.append(row("other", "backoff", reason="short"))
    first, second = reasons(rows).plain.splitlines()
    assert first.startswith("w0, w1 ")
    assert first.endswith(f": {REASON}")
    assert second == "other: short"


def test_ready_or_starting_worker_has_no_reason() -> None:
    rows = [row(**error_fields(handler=(0, "no"))), row("new", "starting")]
    assert reasons(rows).plain == ""


@pytest.mark.message_text
def test_paragraph_of_a_reason_counts_the_workers_that_it_does_not_name() -> None:
    rows = [row(f"w{number}", "backoff", reason=REASON) for number in range(4)]
    assert reasons(rows).plain == f"w0, w1 and 2 more: {REASON}\n"


def test_only_the_first_five_reasons_are_shown() -> None:
    rows = [row(f"w{number}", "backoff", reason=f"reason {number}") for number in range(7)]
    lines = reasons(rows).plain.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "and 2 more reasons"


def test_workers_that_are_not_ready_come_first() -> None:
    rows = [
        row(name, state)
        for name, state in (("a", "ready"), ("b", "backoff"), ("c", "ready"), ("d", "failed"))
    ]
    assert [line.split()[0] for line in printed(*rows)[1:-1]] == ["b", "d", "a", "c"]


def test_failed_worker_shows_its_reason() -> None:
    assert "killed by SIGKILL" in printed(row("a", "failed", reason="killed by SIGKILL"))[1]


@pytest.mark.message_text
def test_failed_worker_shows_that_it_will_be_retried() -> None:
    rows = row("a", "failed", reason="killed by SIGKILL"), row("b", "failed")
    _, first, second, _ = printed(*rows)
    assert "killed by SIGKILL; it is tried again within a minute" in first
    assert second.rstrip().endswith("  it is tried again within a minute")


def test_exit_status_is_zero_only_if_all_workers_are_ready() -> None:
    assert exit_status([row(), row("b_server")]) == 0
    assert exit_status([row(), row("b_server", "backoff")]) == 1
    assert exit_status([]) == 1


def watched(*rows: WorkerRow, problem: str | None = None, width: int = 120) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(view(rows, problem))
    return [line.rstrip() for line in console.export_text().splitlines()]


def one_unready_worker() -> list[WorkerRow]:
    """Return the rows of 50 workers, of which only w40 is not ready."""
    return [
        row(f"w{number}", "backoff" if number == 40 else "ready", reason="refused")
        for number in range(50)
    ]


def test_watched_view_shows_reasons_and_unready_workers_first() -> None:
    _, reason, *lines = watched(*one_unready_worker())
    assert reason == "w40: refused"
    assert [line.split()[0] for line in lines if line][:3] == ["worker", "w40", "w0"]


@pytest.mark.message_text
def test_watched_view_starts_with_the_summary() -> None:
    assert watched(*one_unready_worker())[0] == "49 of 50 workers ready"


def test_narrow_screen_shows_the_whole_reason() -> None:
    reason = "cannot connect to disco.example.com:8080: " + "Name or service not known " * 5
    text = " ".join(watched(row("a", "backoff", reason=reason), width=40))
    assert text.replace(" ", "").count(reason.replace(" ", "")) == 1


def test_problem_is_shown_above_the_last_table() -> None:
    lines = watched(row(), problem="no answer from http://127.0.0.1:9600")
    assert lines[0].endswith(": no answer from http://127.0.0.1:9600")
    assert any("a_server" in line for line in lines[1:])


def test_problem_without_a_table_is_shown_alone() -> None:
    assert watched(problem="no runner is known") == ["no runner is known"]


@pytest.mark.message_text
def test_last_table_is_marked_as_out_of_date() -> None:
    lines = watched(row(), problem="no answer from http://127.0.0.1:9600")
    assert lines[0] == "The table below is out of date: no answer from http://127.0.0.1:9600"


def test_long_error_is_cut_with_an_ellipsis_on_the_page() -> None:
    (short,) = views([row(**error_fields(handler=(0, "x" * 160)))], {})
    (long,) = views([row(**error_fields(handler=(0, "x" * 161)))], {})
    assert short.brief.endswith(": " + "x" * 160)
    assert long.brief.endswith(": " + "x" * 159 + "\u2026")
    assert long.last_errors.endswith("\n" + "x" * 161)


def test_control_characters_in_a_handlers_error_are_replaced() -> None:
    assert "?[2Jgone ?]0;title?" in "".join(
        printed(row(**error_fields(handler=(0, "\x1b[2Jgone\n\x1b]0;title\x07"))))
    )


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:9600/", "http://127.0.0.1:9600"),
        ("127.0.0.1:9600", "http://127.0.0.1:9600"),
        ("[::1]:9600", "http://[::1]:9600"),
        ("https://agents.example.com/em", "https://agents.example.com/em"),
    ],
)
def test_runner_address_may_be_a_url_or_host_and_port(text: str, url: str) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "ftp://127.0.0.1", "http://", "host:port", "http://h:99999", "a/b:9600"],
)
def test_invalid_runner_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the next test checks the message
        parse_url(text)


@pytest.mark.message_text
def test_message_for_an_invalid_runner_address_has_an_example() -> None:
    with pytest.raises(ValueError, match=r"such as http://127\.0\.0\.1:9600"):
        parse_url("nonsense")


@pytest.mark.parametrize("password", ["s3cr3t", "s3cr3t/s3cr3t", "s3cr3t#"])
def test_password_in_an_address_is_refused_and_not_repeated(password: str) -> None:
    with pytest.raises(ValueError, match="--token-file") as caught:
        parse_url(f"http://me:{password}@127.0.0.1:9600")
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.message_text
def test_message_for_a_password_in_an_address_names_it() -> None:
    with pytest.raises(ValueError, match=r"a password in it is not accepted.*--token-file"):
        parse_url("http://me:s3cr3t@127.0.0.1:9600")
