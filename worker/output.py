"""What a handler prints, and what its own threads fail with, as lines of the log.

So that each line says which worker it is of. What goes past `sys.stdout` and `sys.stderr` (from C, from a program that
the handler starts, a crash's last words) is left as it is: a pipe that this process has to read would lose the last.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TextIO

from shared.logs import LONGEST_CHARS, Folded, flush, get_logger, place_of

_log: Final = get_logger("worker.output")
_folded: Final = Folded(what="thread_failed")


class Printed(io.TextIOBase):
    """Takes the place of `sys.stdout` or `sys.stderr`; tells each line as an event.

    Args:
        stream: which of the two.
        tell: the logger's method for it.
        original: what it takes the place of; None where the process was started without.
    """

    encoding = "utf-8"
    errors = "backslashreplace"  # as the log has it
    newlines = None
    mode = "w"
    line_buffering = True
    write_through = False

    def __init__(self, stream: str, tell: Callable[..., Any], original: TextIO | None) -> None:
        self.name = f"<{stream}>"
        self._stream = stream
        self._tell = tell
        self._original = original
        self._rest = ""
        self._one_at_a_time = threading.RLock()  # a destructor may print in the midst of it

    @property
    def buffer(self) -> Any:
        """Where bytes go: to the stream itself, past the log."""
        return self._original.buffer if self._original is not None else io.BytesIO()

    def fileno(self) -> int:
        """Return the stream's own descriptor."""
        if self._original is None:
            raise io.UnsupportedOperation("fileno")
        return self._original.fileno()

    def reconfigure(self, **options: Any) -> None:
        """Take what a handler asks of a stream of text, and go on: each line is an event, whatever it asks."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Tell the lines that this ends; keep what is no whole line yet, within bounds."""
        with self._one_at_a_time:
            *lines, self._rest = (self._rest + text).split("\n")
            if len(self._rest) > LONGEST_CHARS:
                lines.append(self._rest)
                self._rest = ""
        for line in lines:
            self._say(line)
        return len(text)

    def finish(self) -> None:
        """Tell what is left when the process ends."""
        with self._one_at_a_time:
            rest, self._rest = self._rest, ""
        self._say(rest)

    def _say(self, line: str) -> None:
        if line.strip():
            with contextlib.suppress(Exception):  # it must cost nobody a query
                self._tell("printed", text=line.rstrip("\r"), stream=self._stream)


def take() -> None:
    """Have all that this process's handler prints, and its threads fail with, told in the log."""
    sys.stdout = Printed("stdout", _log.info, sys.stdout)
    sys.stderr = Printed("stderr", _log.warning, sys.stderr)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _not_raised


def finish() -> None:
    """Tell what was printed without an end of line. For the process's end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Printed):
            stream.finish()
    for original in (sys.__stdout__, sys.__stderr__):  # what was written there past the log
        with contextlib.suppress(Exception):
            if original is not None:
                original.flush()
    flush()


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    if issubclass(args.exc_type, SystemExit):
        return
    more = _like_it("thread", args.exc_value)
    if more is not None:
        name = args.thread.name if args.thread is not None else None
        _log.error("thread_failed", thread=name, exc_info=_info(args.exc_value, args.exc_traceback), **more)


def _not_raised(args: sys.UnraisableHookArgs) -> None:
    more = _like_it("ignored", args.exc_value)
    if more is not None:
        at = getattr(args.object, "__qualname__", type(args.object).__name__)
        _log.warning("exception_ignored", at=at, exc_info=_info(args.exc_value, args.exc_traceback), **more)


def _like_it(what: str, exc: BaseException | None) -> dict[str, int] | None:
    """Return what a line says of those like it that were held back; None when it is itself."""
    held = _folded.admit(f"{what} {place_of(exc)}" if exc is not None else what)
    return None if held is None else {"like_it_before": held} if held else {}


def _info(exc: BaseException | None, traceback: TracebackType | None) -> Any:
    return None if exc is None else (type(exc), exc, traceback)
