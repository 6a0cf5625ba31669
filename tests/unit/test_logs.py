"""`shared.logs`: lines that machines and people can read, and a log that never ends a process."""

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

from shared import logs
from shared.logs import Folded
from shared.tokens import Secret
from tests.logs import chain
from worker import output
from worker.handler import Handler, told

ROOT = Path(__file__).resolve().parents[2]
Read = Callable[[], str]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    before, root, lines = structlog.get_config(), logging.getLogger(), logs._lines
    handlers, level, sink, threshold = root.handlers[:], root.level, lines.sink, lines.threshold
    with chain(*logs.CHAIN):
        yield
    lines.sink, lines.threshold = sink, threshold
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stderr(capfd: pytest.CaptureFixture[str]) -> Read:
    """Return what reads standard error, which is no terminal here."""
    return lambda: capfd.readouterr().err


def log() -> Any:
    return logs.get_logger("test")


# --- lines ---


def test_json_line_holds_the_event_its_fields_and_what_was_bound(stderr: Read) -> None:
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


def test_console_line_is_plain_text_without_colours_in_a_file(stderr: Read) -> None:
    logs.configure("info", "console", worker="echo_server")
    log().info("ready", node="ws://h:1")
    (line,) = stderr().splitlines()
    assert "ready" in line
    assert "node=ws://h:1" in line
    assert "worker=echo_server" in line
    assert "\x1b" not in line


def test_auto_is_json_in_a_file(stderr: Read) -> None:
    logs.configure("info", "auto")
    log().info("ready")
    assert json.loads(stderr())["event"] == "ready"


def test_auto_is_for_people_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logs.configure("info", "auto")
        log().info("ready", node="here")
        line = os.read(ours, 65536).decode()
    os.close(ours)
    assert "ready" in line
    assert "\x1b[" in line
    assert not line.startswith("{")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_less_severe_lines_than_the_level_are_not_written(level: Any, stderr: Read) -> None:
    logs.configure(level, "json")
    for name in ("debug", "info", "warning", "error"):
        getattr(log(), name)(name)
    seen = [json.loads(line)["event"] for line in stderr().splitlines()]
    assert seen == ["debug", "info", "warning", "error"][["debug", "info", "warning", "error"].index(level) :]


def test_fields_bound_before_are_gone_after_another_configure(stderr: Read) -> None:
    logs.configure("info", "json", old=1)
    logs.configure("info", "json", new=1)
    log().info("e")
    assert {"old", "new"} & json.loads(stderr()).keys() == {"new"}


@pytest.mark.parametrize("style", ["json", "console"])
def test_traceback_shows_the_way_but_no_local_variable(style: Any, stderr: Read) -> None:
    logs.configure("info", style)

    def inner() -> None:
        token = "s3cr3t" + "-value"  # noqa: F841 - what a traceback with locals would show
        held = Secret("s3cr3t" + "-value")  # noqa: F841 - as above
        raise ValueError("failed")

    try:
        inner()
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc)
    told = stderr()
    assert "ValueError: failed" in told
    assert "in inner" in told
    assert "s3cr3t-value" not in told


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("value", [object(), {1, 2}, b"\xff", "a\ud800", Secret("s3cr3t"), float("nan"), [{}]])
def test_any_value_can_be_logged(style: Any, value: Any, stderr: Read) -> None:
    logs.configure("info", style)
    log().info("e", value=value)
    (line,) = stderr().splitlines()
    assert "s3cr3t" not in line


def test_each_line_is_one_write_so_that_processes_do_not_mix(stderr: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(logs.os, "write", lambda fd, data: written.append(data) or len(data))
    logs.configure("info", "json")
    log().info("one")
    log().error("two")
    assert [line.count(b"\n") for line in written] == [1, 1]
    assert all(line.endswith(b"\n") for line in written)


# --- libraries ---


def test_warnings_of_libraries_come_out_as_events_and_their_chatter_does_not(stderr: Read) -> None:
    logs.configure("debug", "json")
    library = logging.getLogger("some.library")
    library.info("chatter")
    wordy = logging.getLogger("wordy")
    wordy.setLevel(logging.INFO)
    wordy.info("as it was asked to")
    wordy.setLevel(logging.NOTSET)
    told = json.loads(stderr())
    assert (told["event"], told["level"], told["library"]) == ("as it was asked to", "info", "wordy")
    library.warning("took %d s", 3)
    library.error("broke")
    first, second = map(json.loads, stderr().splitlines())
    assert (first["event"], first["level"], first["library"]) == ("took 3 s", "warning", "some.library")
    assert (second["event"], second["level"]) == ("broke", "error")


def test_library_that_logs_wrongly_raises_nothing(stderr: Read) -> None:
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


def test_same_words_of_a_library_again_and_again_are_one_line(stderr: Read) -> None:
    logs.configure("info", "json")
    for number in range(50):
        logging.getLogger("some.library").warning("pool is full")
        logging.getLogger("some.library").warning("retry %d", number // 25)
    assert [json.loads(line)["event"] for line in stderr().splitlines()] == ["pool is full", "retry 0", "retry 1"]


def test_words_of_one_place_that_differ_each_time_are_few_lines(stderr: Read) -> None:
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for number in range(200):
            logging.getLogger("some.library").warning("cannot reach %s", f"host-{number}")
            warnings.warn(f"odd {number}", stacklevel=1)
    logging.getLogger("some.library").warning("elsewhere")
    said = [json.loads(line)["event"] for line in stderr().splitlines()]
    assert said[-1] == "elsewhere"
    assert [sum(word in words for words in said) for word in ("cannot reach", "odd")] == [9, 9]


def test_python_warnings_are_events(stderr: Read) -> None:
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
def test_thread_of_a_handlers_own_and_one_that_clears_the_context_log_as_the_worker(style: Any, stderr: Read) -> None:
    logs.configure("info", style, worker="echo_server", incarnation=3)

    def speak() -> None:
        structlog.contextvars.clear_contextvars()
        log().info("one")
        logging.getLogger("some.library").warning("two")

    for target in (speak, lambda: contextvars.Context().run(speak)):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    lines = stderr().splitlines()
    assert len(lines) == 3, "the second warning is the first one's like"
    assert all("echo_server" in line and "incarnation" in line for line in lines)


@pytest.mark.parametrize("style", ["json", "console"])
def test_very_long_values_and_tracebacks_are_cut_in_their_middle(style: Any, stderr: Read) -> None:
    logs.configure("info", style)
    try:
        raise ValueError("x" * 100_000 + "END")
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc, error="y" * 100_000)
    told = stderr()
    assert len(told) < 4 * logs.LONGEST_CHARS
    assert "characters" in told
    assert "END" in told
    assert "Traceback" in told


def test_query_text_is_logged_at_debug_level_alone_cut_and_otherwise_costs_nothing(stderr: Read) -> None:
    loaded = Handler(handle=lambda body, memory: (body, memory), is_async=False)
    for level in ("info", "warning", "error"):
        assert told(loaded, level) is loaded, "not even a call is added"
    logs.configure("debug", "json")
    assert told(loaded, "debug").handle("q" * 60_000, {}) == ("q" * 60_000, {})
    (line,) = stderr().splitlines()
    found = json.loads(line)
    assert (found["event"], found["level"]) == ("query", "debug")
    assert found["text"].startswith("qqq")
    assert "59800 characters" in found["text"]
    assert len(found["text"]) < 250


def others(style: Any) -> None:
    """What applications do in their first lines."""
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
def test_handler_that_configures_structlog_configures_its_own_lines_alone(style: Any, stderr: Read) -> None:
    logs.configure("info", "json", worker="echo_server")
    bound = log().bind(node="n")
    others(style)
    structlog.contextvars.bind_contextvars(worker="another")
    bound.error("handler_failed", exc_info=ValueError("x"))
    bound.debug("held back")
    logging.getLogger("own").warning("of its own")
    first, second = (json.loads(line) for line in stderr().splitlines())
    assert (first["event"], first["level"], first["node"]) == ("handler_failed", "error", "n")
    assert first["worker"] == second["worker"] == "echo_server", "whose line it is, a handler does not say"
    assert "timestamp" in first
    assert "ValueError: x" in first["exception"]
    assert second["event"] == "of its own"


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("bound", [{(1, 2): 3}, Unspeakable()])
def test_what_a_handler_binds_to_its_context_costs_no_line_and_nobody_an_exception(
    style: Any, bound: Any, stderr: Read
) -> None:
    logs.configure("info", style, worker="echo_server")
    with structlog.contextvars.bound_contextvars(bound=bound):
        log().error("handler_failed", error="x")
        structlog.contextvars.bind_contextvars(more="kept")
        logging.getLogger("a.library").warning("said")
    for line, words in zip(stderr().splitlines(), ("handler_failed", "said"), strict=True):
        assert words in line
        assert "echo_server" in line


def test_exceptions_of_one_kind_are_folded_whatever_they_say(stderr: Read) -> None:
    logs.configure("info", "json")
    for number in range(3):
        try:
            raise ValueError(f"query {number}")
        except ValueError:
            logging.getLogger("asyncio").error("Task exception was never retrieved, Task-%d", number, exc_info=True)
    assert len(stderr().splitlines()) == 1


def test_failures_of_a_handlers_own_threads_are_folded(stderr: Read, monkeypatch: pytest.MonkeyPatch) -> None:
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


def descriptor_gone(tmp_path: Path) -> IO[str]:
    stream = (tmp_path / "gone").open("w")
    os.close(stream.fileno())
    return stream


def disk_full(tmp_path: Path) -> IO[str]:
    return open("/dev/full", "w")


def reader_gone(tmp_path: Path) -> IO[str]:
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


def none(tmp_path: Path) -> None:
    return None


@pytest.mark.parametrize("style", ["json", "console", "auto"])
@pytest.mark.parametrize("stream", [closed, descriptor_gone, disk_full, reader_gone, pipe_full, none])
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
    if broken is not None and stream is descriptor_gone:
        with pytest.raises(OSError, match="Bad file descriptor"):
            broken.close()
    elif broken is not None:
        broken.close()


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2>&- >&- <&-"])
def test_process_without_a_standard_error_logs_and_goes_on(redirection: str) -> None:
    code = "from shared import logs; logs.configure(); import structlog; structlog.get_logger().error('e'); exit(7)"
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == 7


# --- Folded ---


class Clock:
    now_s: float = 100

    def __call__(self) -> float:
        return self.now_s


def test_first_event_passes_and_those_like_it_are_held_and_counted() -> None:
    clock = Clock()
    folded = Folded(60, clock)
    assert [folded.admit("a") for _ in range(4)] == [0, None, None, None]
    clock.now_s += 59.9
    assert folded.admit("a") is None
    clock.now_s += 0.1
    assert folded.admit("a") == 4
    assert folded.admit("a") is None
    clock.now_s += 60
    assert folded.admit("a") == 1


def test_threads_admit_and_tell_at_the_same_time() -> None:
    folded = Folded(0.0)
    told = 0
    threads = [threading.Thread(target=lambda: [folded.admit(str(number)) for number in range(5000)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        told += len(folded.overdue())
    assert told == 0


def test_other_events_are_not_held() -> None:
    folded = Folded(60, Clock())
    assert [folded.admit("a"), folded.admit("b")] == [0, 0]


def test_end_of_a_burst_is_told_once_its_time_is_up() -> None:
    clock = Clock()
    folded = Folded(60, clock)
    for key in ("a", "a", "a", "once"):
        folded.admit(key)
    assert folded.overdue() == []
    clock.now_s += 60
    assert folded.overdue() == [("a", 2)]
    assert folded.overdue() == []
    assert folded.admit("a") == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100))))
def test_no_event_is_lost_or_told_twice(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    folded = Folded(60, clock)
    told = 0
    for key, pause_s in events:
        clock.now_s += pause_s
        held = folded.admit(key)
        told += 0 if held is None else 1 + held
    clock.now_s += 60
    told += sum(held for _, held in folded.overdue())
    assert told == len(events)


def test_end_of_any_burst_is_told(stderr: Read) -> None:
    logs.configure("info", "json", worker="w")
    clock = Clock()
    folded = Folded(60, clock, what="request_refused")
    for _ in range(419):
        folded.admit("403 127.0.0.1")
    logs.tell_held_back()
    assert stderr() == ""
    clock.now_s += 60
    logs.tell_held_back()
    logs.tell_held_back()
    told = json.loads(stderr())
    assert (told["event"], told["what"], told["like"], told["more"], told["worker"]) == (
        "repeated",
        "request_refused",
        "403 127.0.0.1",
        418,
        "w",
    )


def test_destructor_that_logs_while_an_event_is_admitted_holds_up_nothing() -> None:
    class Talkative:
        def __init__(self) -> None:
            self.itself = self  # the collector's, not to be gone at once

        def __del__(self) -> None:
            folded.admit("the last words")

    def clock() -> float:
        gc.collect()
        return 0.0

    folded = Folded(60, clock)
    admitting = threading.Thread(target=lambda: [folded.admit("x") for _ in range(2)], daemon=True)
    Talkative()
    admitting.start()
    admitting.join(10)
    assert not admitting.is_alive()
    assert folded.admit("the last words") is None


def test_places_of_which_one_begins_like_another_are_told_apart() -> None:
    folded = Folded(60, Clock())
    for number in range(10, 18):
        assert folded.admit(f"x.py:{number} a", f"x.py:{number}") == 0
    assert [folded.admit(f"x.py:1 {words}", "x.py:1") for words in "abc"] == [0, 0, 0]


def test_kind_that_is_told_again_is_not_the_oldest() -> None:
    clock = Clock()
    folded = Folded(60, clock)
    folded.admit("busy")
    for number in range(255):
        folded.admit(str(number))
    clock.now_s += 60
    assert folded.admit("busy") == 0
    folded.admit("one more")
    assert folded.admit("busy") is None


def test_endless_kinds_of_events_do_not_fill_the_memory() -> None:
    folded = Folded(60, Clock())
    for number in range(5000):
        assert folded.admit(str(number)) == 0
    assert len(folded._seen) <= 256


# --- what nobody may do to a terminal ---


def test_no_text_of_a_peer_or_a_handler_moves_the_cursor_or_poses_as_a_line(stderr: Read) -> None:
    logs.configure("debug", "console")
    log().info("a library\nsays", text="\x1b]0;pwned\x07", reason="\x1b[31mred\r")
    try:
        raise ValueError("\x1b[2J\n12:00:00 [info     ] forged")
    except ValueError as exc:
        log().error("handler_failed", exc_info=exc)
    found = stderr()
    assert not set(found) & {"\x1b", "\x07", "\r"}
    assert "\\x1b]0;pwned\\x07" in found
    first, *rest = found.splitlines()
    assert "says" in first
    assert [line for line in rest if line.startswith("12:00:00")] == []
    assert "forged" in found


def test_json_lines_keep_texts_as_they_are(stderr: Read) -> None:
    logs.configure("info", "json")
    log().info("x", text="\x1b[31m\n")
    assert json.loads(stderr())["text"] == "\x1b[31m\n"
