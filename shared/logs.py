"""Logging for every process: structlog, one event a line on standard error.

Pretty on a terminal, JSON lines otherwise. A log that cannot be written (its reader is gone, the
disk is full) is dropped: it must never end a process, nor hold one up. Tracebacks show no local variables,
which could hold secrets; what is very long is cut in its middle. What a handler makes of structlog's
configuration is its own: em-runner's loggers have theirs.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import json
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, Final, TextIO

import structlog

from shared.schema import LogFormat, LogLevel
from shared.sink import Sink

_LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_MAX_FOLDED_KEYS: Final = 256
_MOST_OF_A_PLACE: Final = 8

LONGEST_CHARS: Final = 8192
"""The longest value of a field, a traceback too: it may hold what a node or a client has sent."""


FLUSH_S: Final = 0.5
"""How long the end of a process may take to write what its log's reader has not taken yet."""


class _Lines:
    """What structlog hands its lines to. Until `configure`, whatever `sys.stderr` is."""

    def __init__(self) -> None:
        self.threshold = _LEVELS["debug"]
        self.sink: Sink | None = None

    def aim(self, stream: TextIO | None) -> None:
        """Write to a stream's descriptor from now on."""
        try:
            fd = -1 if stream is None else stream.fileno()  # None: started without one
        except (OSError, ValueError):  # closed, or no file
            fd = -1
        if self.sink is not None:
            self.sink.close()
        self.sink = Sink(fd, lambda lines: get_logger("log").warning("lines_dropped", lines=lines))

    def msg(self, message: str) -> None:
        """Write a line."""
        if self.sink is not None:
            self.sink.write(message.encode("utf-8", "backslashreplace") + b"\n")
        elif sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"{message}\n")

    log = debug = info = warning = warn = error = critical = exception = msg


_lines: Final = _Lines()


class Logger(structlog.BoundLoggerBase):
    """A logger of em-runner's own; make it with `get_logger`."""

    def debug(self, event: str, **fields: Any) -> None:
        """Log at this level; the others do it at theirs."""
        self._say("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._say("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._say("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:  # noqa: D102
        self._say("error", event, fields)

    def _say(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if _LEVELS[level] >= _lines.threshold:
            try:
                self._proxy_to_logger(level, event, **fields)
            except Exception:  # noqa: BLE001 - whatever a handler has bound to its context: a line costs nobody a query
                contextvars.copy_context().run(self._say_alone, level, event, fields)

    def _say_alone(self, level: str, event: str, fields: dict[str, Any]) -> None:
        structlog.contextvars.clear_contextvars()
        with contextlib.suppress(Exception):
            self._proxy_to_logger(level, event, **fields)


def get_logger(name: str) -> Logger:
    """Return a logger. `name` is for the reader of the source: the events are told apart by their own."""
    return Logger(_lines, CHAIN, {})


def flush() -> None:
    """Write what waits for a slow reader, for a moment. For the process's end."""
    if _lines.sink is not None:
        _lines.sink.flush(FLUSH_S)


atexit.register(flush)
os.register_at_fork(after_in_child=lambda: None if _lines.sink is None else _lines.sink.begin_anew())


class _FromLogging(logging.Handler):
    """Hands what libraries say through `logging` and `warnings` to structlog.

    The same words again and again are told once; of one place in the source, a few that differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folded = Folded(what="library")

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            words = record.getMessage().strip()
            place = f"{record.name} {_where(record, words)}"
            held = self._folded.admit(f"{place} {_kind(record) or words[:LONGEST_CHARS]}", place)
            if held is None:
                return
            event: dict[str, Any] = {"library": record.name}
            if held:
                event["like_it_before"] = held
            if record.exc_info:
                event["exc_info"] = record.exc_info
            log = get_logger("library")
            say = log.error if record.levelno >= logging.ERROR else log.warning if record.levelno >= 30 else log.info
            say(words, **event)


def _where(record: logging.LogRecord, words: str) -> str:
    """Return where in the source something is said; of a warning, its text begins with that."""
    return words.split(": ")[0] if record.name == "py.warnings" else f"{record.pathname}:{record.lineno}"


def _kind(record: logging.LogRecord) -> str:
    """Return what tells an exception from others, whatever words it and its line hold; else an empty text."""
    exc = record.exc_info[1] if record.exc_info else None
    return "" if exc is None else place_of(exc)


def place_of(exc: BaseException) -> str:
    """Return an exception's type, and where it was raised."""
    trace, where = exc.__traceback__, ""
    while trace is not None:
        where = f" {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(exc).__qualname__}{where}"


def _cut(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            if len(value) > LONGEST_CHARS:
                event[key] = shortened(value, LONGEST_CHARS)
        elif isinstance(value, list | tuple | dict | set | bytes) and len(shown := repr(value)) > LONGEST_CHARS:
            event[key] = shortened(shown, LONGEST_CHARS)
    return event


def _harmless(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Leave nothing that a terminal would obey, and no line that looks like another event's."""
    for key, value in event.items():
        if type(value) is str and not value.isprintable():
            lines = value.split("\n") if key == "exception" else [value]
            event[key] = "\n    ".join(map(escaped, lines))
    return event


def escaped(text: str) -> str:
    """Return a text with what is not printable as Python writes it, such as `\\x1b`."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def printable_json(text: str) -> str:
    """Return JSON that means the same, with what no terminal may obey, or show otherwise than it is, as `\\u009b`."""
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def shortened(text: str, longest: int) -> str:
    """Return a text, or when it is longer than that its beginning, how much is left out, and its end."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


def printable_line(text: object) -> str:
    """Return somebody's words as one line that no terminal obeys: of what is unprintable only blanks are left."""
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(char if char.isprintable() else "?" for char in line)


def configure(level: LogLevel = "info", style: LogFormat = "auto", **bound: Any) -> None:
    """Set up this process's logging.

    Args:
        level: the least severe level that is written.
        style: `console`, `json`, or `auto` for what fits standard error.
        bound: fields that every line carries from now on.
    """
    terminal = _is_terminal(sys.stderr)
    pretty = style == "console" or (style == "auto" and terminal)
    render = [_console(terminal)] if pretty else [structlog.processors.JSONRenderer()]

    def add_bound(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        # Not by contextvars: a thread of a handler's own has none of ours, and a handler may clear them.
        # And they are ours: whose line it is, nobody says but we.
        return {**event, **bound}

    CHAIN[:] = [
        structlog.contextvars.merge_contextvars,
        add_bound,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if not pretty else "%H:%M:%S", utc=not pretty),
        structlog.processors.format_exc_info,
        _cut,
        *([_harmless] if pretty else []),
        *render,
    ]
    _lines.threshold = _LEVELS[level]
    _lines.aim(sys.stderr)
    structlog.configure(  # for handlers that use it and do not configure it
        processors=CHAIN,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _lines,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(True)
    logging.basicConfig(level=logging.WARNING, handlers=[_FromLogging()], force=True)


def _console(colours: bool) -> Any:
    return structlog.dev.ConsoleRenderer(
        colors=colours, exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )


CHAIN: Final[list[Any]] = [
    structlog.processors.add_log_level,
    structlog.processors.format_exc_info,
    _harmless,
    _console(False),
]
"""What a line goes through. Until `configure`, a few words for whoever embeds a part of em-runner."""


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def tell_held_back() -> None:
    """Log how many events were held back, once their time is up. For every process, to be called now and then."""
    for folded in list(_folding):
        for key, held in folded.overdue():
            get_logger("log").warning("repeated", what=folded.what, like=key, more=held)


class Folded:
    """Lets a repeated event through once, then at most once in `every_s`, with the number held back.

    For anything that a peer or a handler can cause as often as it likes.

    Args:
        every_s: how long those like one are held back.
        clock: seconds that only go forward.
        what: the event, for `tell_held_back`; empty where the owner tells of the end of a burst.
    """

    def __init__(self, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic, *, what: str = "") -> None:
        self.what = what
        if what:
            _folding.add(self)
        self._every_s = every_s
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}
        # A handler's thread admits what the loop tells the end of. Reentrant: a destructor may log in the midst of it.
        self._one_at_a_time = threading.RLock()

    def admit(self, key: str, place: str = "") -> int | None:
        """Return None to hold this event back, else how many like it were held back before it.

        Of a `place`, which the key begins with, only so many kinds are told apart: the others are one.
        """
        with self._one_at_a_time:
            now = self._clock()  # inside: another thread's later time would be before it
            if place and key not in self._seen and self._kinds_of(place) >= _MOST_OF_A_PLACE:
                key = f"{place} and others"
            since, held = self._seen.get(key, (None, 0))
            if since is not None and now - since < self._every_s:
                self._seen[key] = (since, held + 1)
                return None
            if since is None and len(self._seen) >= _MAX_FOLDED_KEYS:
                self._seen.pop(next(iter(self._seen)), None)
            self._seen.pop(key, None)  # to the end: what is told again is not the oldest any more
            self._seen[key] = (now, 0)
            return held

    def _kinds_of(self, place: str) -> int:
        return sum(key.startswith(f"{place} ") for key in [*self._seen])

    def overdue(self) -> list[tuple[str, int]]:
        """Return (key, number held back) of events whose time is up, so that their end is told too."""
        with self._one_at_a_time:
            now = self._clock()  # inside: another thread's later time would be before it
            found = [(key, held) for key, (since, held) in [*self._seen.items()] if now - since >= self._every_s]
            for key, _ in found:
                self._seen.pop(key, None)
        return [(key, held) for key, held in found if held]


_folding: Final[weakref.WeakSet[Folded]] = weakref.WeakSet()
