"""Logging for every process, with structlog: one event per line on standard error.

The console format is for terminals; otherwise lines are JSON. If the log cannot be written (the
pipe has no reader, the disk is full), the process neither exits nor blocks. Tracebacks do not show
local variables, which could contain secrets. In a line that is too long, long fields are truncated.
A handler may configure structlog: em-runner's loggers do not use that configuration.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import json
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, Final, Literal, TextIO

import structlog

from shared.logs._sink import MAX_LINE_BYTES, Sink

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
DEFAULT_FORMAT: Final[LogFormat] = "auto"
DEFAULT_LEVEL: Final[LogLevel] = "info"

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# A key may contain what a peer sent, so the number of keys must have a limit.
_MAX_THROTTLE_KEYS: Final = 256
_MAX_KEYS_PER_PLACE: Final = 8

LONGEST_CHARS: Final = 3800
"""How much of a field's value is kept. It may quote a node or a client, as a traceback does."""

_MIN_FIELD_CHARS: Final = 24
"""Fields are not cut below this. If a line is still too long, only `_ESSENTIAL` ones are kept."""

_ESSENTIAL: Final = ("timestamp", "level", "event", "worker", "agent", "node", "incarnation")

# At exit: a reader that has stalled, such as a terminal after Ctrl-S, must not keep the process.
_FLUSH_TIMEOUT_S: Final = 0.5

Event = MutableMapping[str, Any]
Processor = Callable[[Any, str, Any], Any]


class Logging:
    """The logging of one process.

    Args:
        level: the least severe level that is written.
        processors: structlog's processors, called in this order. The last one returns the line.
        sink: where lines are written; None for the value of `sys.stderr` at the time of a line.
    """

    def __init__(
        self,
        level: LogLevel,
        processors: Sequence[Processor],
        sink: Sink | None = None,
    ) -> None:
        self.threshold = _LEVELS[level]
        self.processors = list(processors)
        self.sink = sink
        # The throttles with suppressed events. A set of references and not a `WeakSet`: handlers'
        # threads add to it while `report_suppressed` copies it, and copying a `WeakSet` fails when
        # it grows. `list()` of a set is one step of the interpreter.
        self.throttles: set[weakref.ref[LogThrottle]] = set()

    def emit(
        self,
        level: str,
        event: str,
        fields: dict[str, Any],
    ) -> None:
        """Write an event of any level."""
        values: Any = {"event": event, **fields}
        try:
            for process in self.processors:
                values = process(self, level, values)
        except structlog.DropEvent:  # a handler may have added a processor that raises it
            return
        self.msg(values)

    def msg(self, message: str) -> None:
        """Write a line."""
        if self.sink is not None:
            self.sink.write(_encoded(message))
        elif sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{message}\n")

    # structlog calls the method that is named like the level.
    log = debug = info = warning = warn = error = critical = exception = msg


class Logger:
    """A logger for em-runner's modules. `get_logger` makes one."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def bind(self, **fields: Any) -> Logger:
        """Return a logger that adds these fields to each event."""
        return Logger({**self._fields, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        """Log an event at level `debug`. The other methods log at the level of their name."""
        self._log("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._log("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._log("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._log("error", event, fields)

    def _log(
        self,
        level: str,
        event: str,
        fields: dict[str, Any],
    ) -> None:
        if _LEVELS[level] < _logging.threshold:
            return
        fields = {**self._fields, **fields}
        try:
            _logging.emit(level, event, fields)
        except Exception:  # noqa: BLE001
            # A handler can bind any object to structlog's context, also one whose repr raises.
            contextvars.copy_context().run(self._log_without_context, level, event, fields)

    def _log_without_context(
        self,
        level: str,
        event: str,
        fields: dict[str, Any],
    ) -> None:
        structlog.contextvars.clear_contextvars()
        with contextlib.suppress(Exception):
            _logging.emit(level, event, fields)


def get_logger() -> Logger:
    """Return a logger without bound fields."""
    return Logger({})


def flush() -> None:
    """Wait a short time for a slow reader to take all lines. Call it before the process exits."""
    if _logging.sink is not None:
        _logging.sink.flush(_FLUSH_TIMEOUT_S)


class _FromLogging(logging.Handler):
    """Logs what libraries log with `logging` and `warnings`.

    It throttles a repeated message, and different messages from one place in the source.
    """

    def __init__(self) -> None:
        super().__init__()
        self._throttle = LogThrottle("library")

    def emit(self, record: logging.LogRecord) -> None:
        # A library's record may hold objects whose `__str__` raises. The caller must not notice.
        with contextlib.suppress(Exception):
            message = record.getMessage().strip()
            place = f"{record.name} {_place(record, message)}"
            exc = record.exc_info[1] if record.exc_info else None
            # Two exceptions of one type and line are alike, even if their messages differ.
            likeness = message[:LONGEST_CHARS] if exc is None else place_of(exc)
            suppressed = self._throttle.admit(f"{place} {likeness}", place)
            if suppressed is None:
                return
            fields: dict[str, Any] = {"library": record.name, **suppressed}
            if exc is not None:
                fields["exc_info"] = record.exc_info
            log = get_logger()
            if record.levelno >= logging.ERROR:
                log.error(message, **fields)
            elif record.levelno >= logging.WARNING:
                log.warning(message, **fields)
            else:
                log.info(message, **fields)


def _place(record: logging.LogRecord, message: str) -> str:
    """Return the place in the source that logged a record."""
    if record.name == "py.warnings":
        # `logging` itself logs these, so only the message has the place: at its start.
        return message.split(": ")[0]
    return f"{record.pathname}:{record.lineno}"


def place_of(exc: BaseException) -> str:
    """Return an exception's type and the place where it was raised, `Type FILE:LINE`."""
    trace = exc.__traceback__
    where = ""
    while trace is not None:
        where = f" {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(exc).__qualname__}{where}"


def _encoded(line: str) -> bytes:
    return line.encode("utf-8", "backslashreplace") + b"\n"


def _truncating(render: Processor) -> Processor:
    """Return a renderer whose lines, with the newline, have at most `MAX_LINE_BYTES`.

    It truncates the fields, not the line, so that a JSON line stays valid.
    """

    def rendered(logger: Any, method: str, event: Event) -> str:
        # How long a rendered field is depends on the format and the characters: JSON writes six
        # bytes for one control character. So the result is measured, and rendered again if needed.
        chars = LONGEST_CHARS
        while chars > _MIN_FIELD_CHARS:
            line: str = render(logger, method, _truncated_fields(event, chars))
            if len(_encoded(line)) <= MAX_LINE_BYTES:
                return line
            chars = chars * 3 // 4
        # There are too many fields: a handler can bind any number of them.
        event = {key: event[key] for key in _ESSENTIAL if key in event}
        fields = _truncated_fields(event, _MIN_FIELD_CHARS)
        line = render(logger, method, {**fields, "truncated": True})
        return line

    return rendered


def _truncated_fields(event: Event, chars: int) -> dict[str, Any]:
    fields = dict(event)
    for key, value in event.items():
        if isinstance(value, str):
            fields[key] = shortened(value, chars)
        elif not isinstance(value, int | float | None):
            shown = repr(value)
            if len(shown) > chars:
                fields[key] = shortened(shown, chars)
    return fields


def _escape_values(_: Any, __: str, event: Event) -> Event:
    """Escape what a terminal would obey, and newlines that could imitate another event's line."""
    for key, value in event.items():
        if type(value) is str and not value.isprintable():
            lines = value.split("\n") if key == "exception" else [value]
            event[key] = "\n    ".join(map(escaped, lines))
    return event


def escaped(text: str) -> str:
    """Return a text with each unprintable character escaped as in JSON, such as `\\u001b`."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def printable_json(text: str) -> str:
    """Return the same JSON with unprintable characters escaped, except for its line breaks.

    JSON allows some characters that a terminal obeys, or that change how the text looks.
    """
    return "\n".join(map(escaped, text.split("\n")))


def shortened(text: str, kept: int) -> str:
    """Return the text, or its first and last characters if it has more than `kept`.

    Then `kept` characters remain, and a note in the middle says how many were omitted.
    """
    if len(text) <= kept:
        return text
    half = kept // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def printable_line(text: object) -> str:
    """Return a peer's text as one line that is safe on a terminal.

    White space becomes single blanks, and other unprintable characters become `?`.
    """
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else "?" for char in line)


def configure(
    level: LogLevel = DEFAULT_LEVEL,
    style: LogFormat = DEFAULT_FORMAT,
    **bound: Any,
) -> None:
    """Set up this process's logging.

    Args:
        level: the least severe level that is written.
        style: `console`, `json`, or `auto`: `console` if standard error is a terminal, else `json`.
        bound: fields that are added to every event.
    """
    global _logging
    terminal = _is_terminal(sys.stderr)
    pretty = style == "console" or (style == "auto" and terminal)
    if pretty:
        # A person at the terminal knows the date, and reads local time.
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
        escape = [_escape_values]
        render = _console(terminal)
    else:
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
        escape = []  # JSON escapes control characters itself
        render = structlog.processors.JSONRenderer()

    def add_bound(_: Any, __: str, event: Event) -> Event:
        # Context variables would not do: a thread that a handler starts has none, and a handler can
        # clear them. These fields replace a handler's: only em-runner knows which worker this is.
        return {**event, **bound}

    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_bound,
        structlog.processors.add_log_level,
        stamp,
        structlog.processors.format_exc_info,
        *escape,
        _truncating(render),
    ]
    before, _logging = _logging, Logging(level, processors, _sink(sys.stderr))
    _logging.throttles = before.throttles
    if before.sink is not None:
        before.sink.close()
    atexit.unregister(flush)  # a second `configure` must not register it twice
    atexit.register(flush)
    # For handlers that use structlog without configuring it.
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _logging,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[_FromLogging()], force=True)


def use(other: Logging) -> Logging:
    """Log with `other`, and return the previous logging. For tests."""
    global _logging
    before, _logging = _logging, other
    return before


def _sink(stream: TextIO | None) -> Sink:
    """Return a sink for a stream's file descriptor, or one that writes nothing if it has none."""
    try:
        fd = -1 if stream is None else stream.fileno()  # None: the process has no standard error
    except (OSError, ValueError):  # the stream is closed, or not a file
        fd = -1
    return Sink(fd, lambda lines: get_logger().warning("lines_dropped", lines=lines))


def _console(colours: bool) -> Any:
    return structlog.dev.ConsoleRenderer(
        colors=colours,
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
    )


# In use until `configure`.
_logging = Logging(
    "debug",
    (
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        _escape_values,
        _console(False),
    ),
)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def report_suppressed() -> None:
    """Log how many events were suppressed in windows that have ended.

    The runner and `em-runner disco` call it once a second, a worker at each heartbeat. Otherwise
    the count of a burst would be logged only with the next event of its kind, which may never
    happen.
    """
    for reference in list(_logging.throttles):
        throttle = reference()
        if throttle is None:
            continue
        for key, suppressed in throttle.take_ended():
            fields = {"what": throttle.event, "like": key, "suppressed": suppressed}
            get_logger().warning("repeated", **fields)


class _Window:
    def __init__(self, start_s: float) -> None:
        self.start_s = start_s
        self.admitted = 1
        self.suppressed = 0


class LogThrottle:
    """Admits `limit` events of each key in `window_s`, and counts the others.

    Use it for every event that a peer or a handler can cause without limit.

    Args:
        event: its name, for `report_suppressed`.
        limit: how many events of a key are admitted in a window.
        window_s: the length of a window in seconds, from its first event.
        clock: returns the seconds of a monotonic clock.
    """

    def __init__(
        self,
        event: str,
        *,
        limit: int = 1,
        window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.event = event
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._evicted = 0
        # A handler's thread admits events, and the event loop reports them. Reentrant, because a
        # destructor may log while the same thread holds the lock.
        self._mutex = threading.RLock()

    def admit(self, key: str = "", place: str = "") -> dict[str, int] | None:
        """Return None if an event is suppressed, else fields for its line.

        The field `suppressed` is the number of events suppressed since the previous line. Keys that
        start with the same `place` share one key after the first few.
        """
        with self._mutex:
            # Read with the lock held: otherwise a thread could be admitted with a time before the
            # start of the window.
            now = self._clock()
            is_new = key not in self._windows
            if place and is_new and self._keys_of(place) >= _MAX_KEYS_PER_PLACE:
                key = f"{place} and others"
            window = self._windows.get(key)
            if window is None or now - window.start_s >= self._window_s:
                return self._open_window(key, now)
            if window.admitted < self._limit:
                window.admitted += 1
                return {}
            window.suppressed += 1
            self._register()
            return None

    def _open_window(self, key: str, now: float) -> dict[str, int]:
        # Popped also if it is replaced, so that the first key is always that of the oldest window.
        before = self._windows.pop(key, None)
        if len(self._windows) >= _MAX_THROTTLE_KEYS:
            oldest = self._windows.pop(next(iter(self._windows)), None)
            if oldest is not None:  # a destructor in between may have made room
                self._evicted += oldest.suppressed
        self._windows[key] = _Window(now)
        if before is None or not before.suppressed:
            return {}
        return {"suppressed": before.suppressed}

    def _register(self) -> None:
        throttles = _logging.throttles
        throttles.add(weakref.ref(self, throttles.discard))

    def _keys_of(self, place: str) -> int:
        # The list is a copy: a destructor in between may add a key.
        return sum(key.startswith(f"{place} ") for key in [*self._windows])

    def take_ended(self) -> list[tuple[str, int]]:
        """Remove the windows that have ended; return (key, number suppressed) of each burst.

        The key of windows that were removed early to make room is `others`.
        """
        with self._mutex:
            now = self._clock()
            ended = {
                key: window
                for key, window in [*self._windows.items()]
                if now - window.start_s >= self._window_s
            }
            for key in ended:
                self._windows.pop(key, None)
            evicted, self._evicted = self._evicted, 0
        found = []
        for key, window in ended.items():
            if window.suppressed:
                found.append((key, window.suppressed))
        if evicted:
            found.append(("others", evicted))
        return found
