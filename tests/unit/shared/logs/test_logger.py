"""`shared.logs.logger`: JSON and console lines, throttling, and logs that cannot be written."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from shared.config.tokens import Secret
from shared.logs import logger as logs
from shared.logs._sink import MAX_LINE_BYTES
from shared.logs.logger import LogThrottle
from tests.logs import use_processors
from worker import output
from worker.dispatching.handler import Handler

ROOT = Path(__file__).resolve().parents[4]
Read = Callable[[], str]


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with use_processors():
        yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Read:
    """Return a function that reads standard error, which is not a terminal here."""
    return lambda: capfd.readouterr().err


def log() -> Any:
    return logs.get_logger()


# --- lines ---


def test_json_line_holds_the_event_with_its_fields_and_bound_fields(stderr: Read) -> None:
    logs.configure("info", "json", worker="echo_server", incarnation=3)
    log().warning("backoff", reason="two\nlines", count=1)
    (line,) = stderr().splitlines()
    found = json.loads(line)
    assert found.pop("timestamp").endswith("Z")
    assert found == {
        "event": "backoff",
        "level": "warning",
        "reason": "two\nlines",
        "count": 1,
        "worker": "echo_server",
        "incarnation": 3,
    }


def test_console_line_in_a_file_has_no_colours(stderr: Read) -> None:
    logs.configure("info", "console", worker="echo_server")
    log().info("ready", node="ws://h:1")
    (line,) = stderr().splitlines()
    assert "ready" in line
    assert "node=ws://h:1" in line
    assert "worker=echo_server" in line
    assert "\x1b" not in line


def test_auto_style_is_json_in_a_file(stderr: Read) -> None:
    logs.configure("info", "auto")
    log().info("ready")
    assert json.loads(stderr())["event"] == "ready"


def test_auto_style_is_coloured_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal_fd = os.openpty()
    with open(terminal_fd, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logs.configure("info", "auto")
        log().info("ready", node="here")
        line = os.read(controller, 65536).decode()
    os.close(controller)
    assert "ready" in line
    assert "\x1b[" in line
    assert not line.startswith("{")


LEVELS = ["debug", "info", "warning", "error"]


@pytest.mark.parametrize("level", LEVELS)
def test_events_below_the_level_are_not_written(level: Any, stderr: Read) -> None:
    logs.configure(level, "json")
    for name in LEVELS:
        getattr(log(), name)(name)
    written = [json.loads(line)["event"] for line in stderr().splitlines()]
    assert written == LEVELS[LEVELS.index(level) :]


def test_configure_replaces_the_bound_fields(stderr: Read) -> None:
    logs.configure("info", "json", old=1)
    logs.configure("info", "json", new=1)
    log().info("e")
    assert {"old", "new"} & json.loads(stderr()).keys() == {"new"}


@pytest.mark.parametrize("style", ["json", "console"])
def test_traceback_shows_frames_but_no_local_variables(style: Any, stderr: Read) -> None:
    logs.configure("info", style)

    def inner() -> None:
        token = "s3cr3t" + "-value"  # noqa: F841 - a traceback with locals would show it
        held = Secret("s3cr3t" + "-value")  # noqa: F841 - as above
        raise ValueError("failed")

    try:
        inner()
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc)
    output_text = stderr()
    assert "ValueError: failed" in output_text
    assert "in inner" in output_text
    assert "s3cr3t-value" not in output_text


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"\xff", "a\ud800", Secret("s3cr3t"), float("nan"), [{}]]
)
def test_any_value_can_be_logged(style: Any, value: Any, stderr: Read) -> None:
    logs.configure("info", style)
    log().info("e", value=value)
    (line,) = stderr().splitlines()
    assert "s3cr3t" not in line


def test_each_line_is_one_write(stderr: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda fd, data: written.append(data) or len(data))
    logs.configure("info", "json")
    log().info("one")
    log().error("two")
    assert [line.count(b"\n") for line in written] == [1, 1]
    assert all(line.endswith(b"\n") for line in written)


# --- libraries ---


def library_lines(text: str) -> list[tuple[str, str, str]]:
    """Return the event, the level and the library of each JSON line."""
    lines = map(json.loads, text.splitlines())
    return [(line["event"], line["level"], line["library"]) for line in lines]


def test_only_warnings_of_libraries_are_logged_by_default(stderr: Read) -> None:
    logs.configure("debug", "json")
    library = logging.getLogger("some.library")
    library.info("detail")
    library.warning("took %d s", 3)
    library.error("broke")
    assert library_lines(stderr()) == [
        ("took 3 s", "warning", "some.library"),
        ("broke", "error", "some.library"),
    ]


def test_user_may_set_the_level_of_a_library(stderr: Read) -> None:
    logs.configure("debug", "json")
    verbose = logging.getLogger("verbose")
    verbose.setLevel(logging.INFO)
    verbose.info("level set by the user")
    verbose.setLevel(logging.NOTSET)
    assert library_lines(stderr()) == [("level set by the user", "info", "verbose")]


def test_invalid_log_call_of_a_library_raises_nothing(stderr: Read) -> None:
    logs.configure("debug", "json")
    logging.getLogger("some.library").warning("%d", "text")
    log().info("alive")
    assert json.loads(stderr().splitlines()[-1])["event"] == "alive"


def test_exception_of_a_library_is_logged_with_its_traceback(stderr: Read) -> None:
    logs.configure("debug", "json")
    try:
        raise ValueError("failed")
    except ValueError:
        logging.getLogger("some.library").exception("oops")
    assert "ValueError: failed" in json.loads(stderr())["exception"]


def test_repeated_message_of_a_library_is_one_line(stderr: Read) -> None:
    logs.configure("info", "json")
    for number in range(50):
        logging.getLogger("some.library").warning("pool is full")
        logging.getLogger("some.library").warning("retry %d", number // 25)
    assert [json.loads(line)["event"] for line in stderr().splitlines()] == [
        "pool is full",
        "retry 0",
        "retry 1",
    ]


def test_varying_messages_of_one_log_call_are_few_lines(stderr: Read) -> None:
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for number in range(200):
            logging.getLogger("some.library").warning("cannot reach %s", f"host-{number}")
            warnings.warn(f"odd {number}", stacklevel=1)
    logging.getLogger("some.library").warning("elsewhere")
    events = [json.loads(line)["event"] for line in stderr().splitlines()]
    assert events[-1] == "elsewhere"
    assert [sum(text in event for event in events) for text in ("cannot reach", "odd")] == [9, 9]


def test_python_warnings_are_logged_as_events(stderr: Read) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logs.configure("info", "json", worker="w")
        warnings.warn("this will go", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = stderr().splitlines()
    found = json.loads(line)
    assert (found["level"], found["library"], found["worker"]) == ("warning", "py.warnings", "w")
    assert "DeprecationWarning: this will go" in found["event"]


@pytest.mark.parametrize("style", ["json", "console"])
def test_lines_of_a_handlers_threads_keep_the_workers_fields(style: Any, stderr: Read) -> None:
    logs.configure("info", style, worker="echo_server", incarnation=3)

    def write_lines() -> None:
        structlog.contextvars.clear_contextvars()
        log().info("one")
        logging.getLogger("some.library").warning("two")

    for target in (write_lines, lambda: contextvars.Context().run(write_lines)):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    lines = stderr().splitlines()
    assert len(lines) == 3, "the repeated warning is suppressed"
    assert all("echo_server" in line and "incarnation" in line for line in lines)


@pytest.mark.parametrize("style", ["json", "console"])
def test_long_values_and_tracebacks_are_cut_in_the_middle(style: Any, stderr: Read) -> None:
    logs.configure("info", style)
    try:
        raise ValueError("x" * 100_000 + "END")
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc, error="y" * 100_000)
    output_text = stderr()
    assert len(output_text) < 4 * logs.LONGEST_CHARS
    assert "characters" in output_text
    assert "END" in output_text
    assert "Traceback" in output_text


TEXTS = ["x" * 9000, "\u79d8" * 4000, "\U0001f600" * 4000, '"' * 5000, "\n" * 5000, "\x00" * 5000]


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("text", TEXTS, ids=["x", "wide", "emoji", "quotes", "newlines", "zeros"])
def test_line_is_never_longer_than_an_atomic_pipe_write(
    style: Any, text: str, stderr: Read
) -> None:
    logs.configure("info", style, worker="echo_server")
    log().info("e", text=text, values=[text], number=7)
    written = stderr()
    assert len(written.encode()) <= MAX_LINE_BYTES
    assert "characters" in written, "the line shows that it was shortened"
    assert "echo_server" in written
    if style == "json":
        assert json.loads(written)["number"] == 7


@pytest.mark.parametrize("style", ["json", "console"])
def test_line_with_too_many_fields_keeps_event_and_worker(style: Any, stderr: Read) -> None:
    logs.configure("info", style, worker="echo_server")
    log().info("handler_failed", **{f"field_{number}": number for number in range(1000)})
    written = stderr()
    assert len(written.encode()) <= MAX_LINE_BYTES
    assert all(part in written for part in ("handler_failed", "echo_server", "truncated"))
    assert style == "console" or json.loads(written)["truncated"] is True


def test_importing_the_logger_has_no_effect() -> None:
    code = (
        "import atexit, logging, structlog; before = structlog.get_config(), atexit._ncallbacks(); "
        "import shared.logs.logger; after = structlog.get_config(), atexit._ncallbacks(); "
        "assert before == after and not logging.getLogger().handlers"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=200, check=True)


ECHO = Handler(handle=lambda body, memory: (body, memory), is_async=False)


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_query_text_is_logged_only_at_debug_level(level: Any) -> None:
    assert ECHO.with_query_logging(level) is ECHO


def test_long_query_text_is_logged_shortened(stderr: Read) -> None:
    logs.configure("debug", "json")
    assert ECHO.with_query_logging("debug").handle("q" * 60_000, {}) == ("q" * 60_000, {})
    (line,) = stderr().splitlines()
    found = json.loads(line)
    assert (found["event"], found["level"]) == ("query", "debug")
    assert found["text"].startswith("qqq")
    assert "59800 characters" in found["text"]
    assert len(found["text"]) < 250


def configure_structlog(style: Any) -> None:
    """Configure structlog as applications do at their start."""
    if style == "plain":
        structlog.configure(processors=[structlog.processors.JSONRenderer()])
    elif style == "standard library":
        structlog.configure(
            processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer()],
            wrapper_class=structlog.stdlib.BoundLogger,
            logger_factory=structlog.stdlib.LoggerFactory(),
        )
    else:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory())


@pytest.mark.parametrize("style", ["plain", "standard library", "printed"])
def test_handlers_structlog_configuration_does_not_change_the_workers_lines(
    style: Any, stderr: Read
) -> None:
    logs.configure("info", "json", worker="echo_server")
    bound = log().bind(node="n")
    configure_structlog(style)
    structlog.contextvars.bind_contextvars(worker="another")
    bound.error("handler_failed", exc_info=ValueError("x"))
    bound.debug("below the level")
    logging.getLogger("own").warning("from the handler")
    first, second = (json.loads(line) for line in stderr().splitlines())
    assert (first["event"], first["level"], first["node"]) == ("handler_failed", "error", "n")
    # A handler cannot change the worker of a line.
    assert first["worker"] == second["worker"] == "echo_server"
    assert "timestamp" in first
    assert "ValueError: x" in first["exception"]
    assert second["event"] == "from the handler"


class WithoutRepr:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("bound", [{(1, 2): 3}, WithoutRepr()])
def test_value_without_a_text_in_the_context_loses_no_line(
    style: Any, bound: Any, stderr: Read
) -> None:
    logs.configure("info", style, worker="echo_server")
    with structlog.contextvars.bound_contextvars(bound=bound):
        log().error("handler_failed", error="x")
        structlog.contextvars.bind_contextvars(more="kept")
        logging.getLogger("a.library").warning("warned")
    for line, event in zip(stderr().splitlines(), ("handler_failed", "warned"), strict=True):
        assert event in line
        assert "echo_server" in line


def test_exceptions_of_one_type_are_throttled_together(stderr: Read) -> None:
    logs.configure("info", "json")
    for number in range(3):
        try:
            raise ValueError(f"query {number}")
        except ValueError:
            logging.getLogger("asyncio").error(
                "Task exception was never retrieved, Task-%d", number, exc_info=True
            )
    assert len(stderr().splitlines()) == 1


def test_failures_of_a_handlers_threads_are_throttled(
    stderr: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "json")

    def fail(number: int) -> None:
        raise ValueError(f"query {number}")

    monkeypatch.setattr(threading, "excepthook", output._thread_failed)
    for number in range(3):
        thread = threading.Thread(target=fail, args=(number,))
        thread.start()
        thread.join()
    (line,) = stderr().splitlines()
    assert json.loads(line)["event"] == "thread_failed"


# --- a log that cannot be written ---


def closed(tmp_path: Path) -> IO[str]:
    stream = (tmp_path / "closed").open("w")
    stream.close()
    return stream


def descriptor_closed(tmp_path: Path) -> IO[str]:
    stream = (tmp_path / "log").open("w")
    os.close(stream.fileno())
    return stream


def disk_full(tmp_path: Path) -> IO[str]:
    return open("/dev/full", "w")


def reader_closed(tmp_path: Path) -> IO[str]:
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w")


def pipe_full(tmp_path: Path) -> IO[str]:
    _, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x" * 65536):
            pass
    return open(writing, "w")


def no_stream(tmp_path: Path) -> None:
    return None


@pytest.mark.parametrize("style", ["json", "console", "auto"])
@pytest.mark.parametrize(
    "stream", [closed, descriptor_closed, disk_full, reader_closed, pipe_full, no_stream]
)
@pytest.mark.parametrize("late", [False, True])
def test_log_that_cannot_be_written_is_dropped(
    stream: Any, style: Any, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = stream(tmp_path)
    if not late:
        monkeypatch.setattr(sys, "stderr", broken)
    logs.configure("debug", style, worker="w")
    monkeypatch.setattr(sys, "stderr", broken)
    log().error("e", exc_info=ValueError("x"))
    logging.getLogger("some.library").error("e")
    if broken is not None and stream is descriptor_closed:
        with pytest.raises(OSError, match="Bad file descriptor"):
            broken.close()
    elif broken is not None:
        broken.close()


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- >&- <&-"])
def test_process_without_standard_error_continues_after_logging(redirection: str) -> None:
    code = (
        "from shared.logs import logger; logger.configure(); "
        "import structlog; structlog.get_logger().error('e'); exit(7)"
    )
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code]
    assert subprocess.run(command, cwd=ROOT, timeout=200, check=False).returncode == 7


# --- LogThrottle ---


class Clock:
    now_s: float = 100

    def __call__(self) -> float:
        return self.now_s


def test_repeated_events_are_suppressed_and_counted() -> None:
    clock = Clock()
    throttle = LogThrottle("e", clock=clock)
    assert [throttle.admit("a") for _ in range(4)] == [{}, None, None, None]
    clock.now_s += 59.9
    assert throttle.admit("a") is None
    clock.now_s += 0.1
    assert throttle.admit("a") == {"suppressed": 4}
    assert throttle.admit("a") is None
    clock.now_s += 60
    assert throttle.admit("a") == {"suppressed": 1}


def test_throttle_admits_up_to_its_limit_in_a_window() -> None:
    clock = Clock()
    throttle = LogThrottle("e", limit=2, window_s=10, clock=clock)
    admitted = []
    for clock.now_s in (0, 1, 2, 3, 10, 11):
        admitted.append(throttle.admit("a"))
    assert admitted == [{}, {}, None, None, {"suppressed": 2}, {}]


def test_threads_may_admit_events_while_another_reports_them() -> None:
    throttle = LogThrottle("e", window_s=0.0)
    reported = 0
    threads = [
        threading.Thread(target=lambda: [throttle.admit(str(number)) for number in range(5000)])
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reported += len(throttle.take_ended())
    assert reported == 0


def test_events_with_other_keys_are_not_suppressed() -> None:
    throttle = LogThrottle("e", clock=Clock())
    assert [throttle.admit("a"), throttle.admit("b")] == [{}, {}]


def test_suppressed_count_is_reported_once_when_the_window_ends() -> None:
    clock = Clock()
    throttle = LogThrottle("e", clock=clock)
    for key in ("a", "a", "a", "once"):
        throttle.admit(key)
    assert throttle.take_ended() == []
    clock.now_s += 60
    assert throttle.take_ended() == [("a", 2)]
    assert throttle.take_ended() == []
    assert throttle.admit("a") == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100))))
def test_each_event_is_reported_exactly_once(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    throttle = LogThrottle("e", clock=clock)
    reported = 0
    for key, pause_s in events:
        clock.now_s += pause_s
        fields = throttle.admit(key)
        reported += 0 if fields is None else 1 + fields.get("suppressed", 0)
    clock.now_s += 60
    reported += sum(suppressed for _, suppressed in throttle.take_ended())
    assert reported == len(events)


def test_suppressed_events_are_logged_when_their_window_ends(stderr: Read) -> None:
    logs.configure("info", "json", worker="w")
    clock = Clock()
    throttle = LogThrottle("request_refused", clock=clock)
    for _ in range(419):
        throttle.admit("403 127.0.0.1")
    logs.report_suppressed()
    assert stderr() == ""
    clock.now_s += 60
    logs.report_suppressed()
    logs.report_suppressed()
    line = json.loads(stderr())
    assert line["event"] == "repeated"
    assert line["what"] == "request_refused"
    assert line["like"] == "403 127.0.0.1"
    assert line["suppressed"] == 418
    assert line["worker"] == "w"


def test_destructor_that_logs_during_admit_does_not_deadlock() -> None:
    class LogsInDestructor:
        def __init__(self) -> None:
            # A cycle, so that only the garbage collector frees it.
            self.itself = self

        def __del__(self) -> None:
            throttle.admit("from the destructor")

    def clock() -> float:
        gc.collect()
        return 0.0

    throttle = LogThrottle("e", clock=clock)
    admitting = threading.Thread(
        target=lambda: [throttle.admit("x") for _ in range(2)], daemon=True
    )
    LogsInDestructor()
    admitting.start()
    admitting.join(60)
    assert not admitting.is_alive()
    assert throttle.admit("from the destructor") is None


def test_places_with_a_common_prefix_are_counted_separately() -> None:
    throttle = LogThrottle("e", clock=Clock())
    for number in range(10, 18):
        assert throttle.admit(f"x.py:{number} a", f"x.py:{number}") == {}
    assert [throttle.admit(f"x.py:1 {text}", "x.py:1") for text in "abc"] == [{}, {}, {}]


def test_key_that_is_admitted_again_is_not_evicted_first() -> None:
    clock = Clock()
    throttle = LogThrottle("e", clock=clock)
    throttle.admit("busy")
    for number in range(255):
        throttle.admit(str(number))
    clock.now_s += 60
    assert throttle.admit("busy") == {}
    throttle.admit("one more")
    assert throttle.admit("busy") is None


def test_number_of_throttled_keys_is_limited() -> None:
    throttle = LogThrottle("e", clock=Clock())
    for number in range(5000):
        assert throttle.admit(str(number)) == {}
    assert len(throttle._windows) <= 256


def test_suppressed_events_of_a_key_that_makes_room_are_counted_with_others() -> None:
    throttle = LogThrottle("e", clock=Clock())
    for _ in range(3):
        throttle.admit("first")
    for number in range(256):
        throttle.admit(str(number))
    assert throttle.take_ended() == [("others", 2)]
    assert throttle.take_ended() == []


# --- control characters ---


def test_logged_text_cannot_control_the_terminal_or_forge_a_line(stderr: Read) -> None:
    logs.configure("debug", "console")
    log().info("a library\nwarns", text="\x1b]0;pwned\x07", reason="\x1b[31mred\r")
    try:
        raise ValueError("\x1b[2J\n12:00:00 [info     ] forged")
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc)
    found = stderr()
    assert not set(found) & {"\x1b", "\x07", "\r"}
    assert "\\u001b]0;pwned\\u0007" in found
    first, *rest = found.splitlines()
    assert "warns" in first
    assert [line for line in rest if line.startswith("12:00:00")] == []
    assert "forged" in found


def test_json_lines_keep_texts_unchanged(stderr: Read) -> None:
    logs.configure("info", "json")
    log().info("x", text="\x1b[31m\n")
    assert json.loads(stderr())["text"] == "\x1b[31m\n"
