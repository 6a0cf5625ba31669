"""`worker.output`: printed lines become log events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from shared.logs.logger import LogThrottle, report_suppressed
from tests.logs import capture_logs
from worker import output
from worker.output import _LogStream


def test_thread_prints_while_another_one_logs_its_line() -> None:
    lines: list[str] = []

    def log(event: str, *, text: str, stream: str) -> None:
        if text == "first":
            thread = threading.Thread(target=printed.write, args=("second\n",), daemon=True)
            thread.start()
            thread.join(60)
        lines.append(text)

    printed: Any = _LogStream("stdout", log, None)
    printed.write("first\n")
    assert lines == ["second", "first"]


@pytest.mark.parametrize(
    ("event", "report"),
    [
        ("thread_failed", output._thread_failed),
        ("exception_ignored", output._exception_ignored),
    ],
)
def test_suppressed_exceptions_are_reported_under_their_event(
    event: str, report: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Python passes to both hooks.
    error = ValueError("failed")
    args = SimpleNamespace(exc_type=ValueError, exc_value=error, thread=None, object=None)
    now_s = 0.0
    throttles = [value for value in vars(output).values() if isinstance(value, LogThrottle)]
    for throttle in throttles:
        monkeypatch.setattr(throttle, "_clock", lambda: now_s)
    with capture_logs() as lines:
        report(args)
        report(args)
        now_s = 60.0
        report_suppressed()
    assert [line["event"] for line in lines] == [event, "repeated"]
    assert lines[1]["what"] == event
