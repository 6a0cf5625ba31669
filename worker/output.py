"""Logs what a handler prints, and the exceptions that its threads and destructors raise.

In the log, each line has the worker's name. C code, programs that the handler starts, and a
crashing interpreter do not write to `sys.stdout` and `sys.stderr`. Their output is not logged: this
process would have to read it from a pipe, and a crash would lose the last lines.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, TextIO

from shared.logs.logger import (
    LONGEST_CHARS,
    LogThrottle,
    flush,
    get_logger,
    place_of,
)

_log: Final = get_logger()
_failures: Final = LogThrottle("thread_failed")
_ignored: Final = LogThrottle("exception_ignored")


class _LogStream(io.TextIOBase):
    """Replaces `sys.stdout` or `sys.stderr`, and logs each line as an event.

    Args:
        stream_name: `stdout` or `stderr`.
        log: the logger's method for its level.
        original: the stream that it replaces; None if the process was started without one.
    """

    encoding = "utf-8"
    errors = "backslashreplace"  # as in the log
    # Libraries expect a text stream to have these attributes. Some read them when imported.
    mode = "w"
    line_buffering = True
    write_through = False

    def __init__(
        self,
        stream_name: str,
        log: Callable[..., Any],
        original: TextIO | None,
    ) -> None:
        self.name = f"<{stream_name}>"
        self._stream_name = stream_name
        self._log = log
        self._original = original
        self._rest = ""
        # Reentrant: the collector may run a destructor that prints while this thread has the lock.
        self._lock = threading.RLock()

    @property
    def buffer(self) -> Any:
        """The original stream's buffer. Bytes are not logged."""
        if self._original is None:
            return io.BytesIO()
        return self._original.buffer

    def fileno(self) -> int:
        """Return the original stream's descriptor."""
        if self._original is None:
            raise io.UnsupportedOperation("fileno")
        return self._original.fileno()

    def reconfigure(self, **options: Any) -> None:
        """Accept the options of a text stream, and ignore them: each line remains one event."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Log each complete line. Keep the rest until its line ends, or until it is too long."""
        with self._lock:
            *lines, rest = (self._rest + text).split("\n")
            # A handler that never ends its line must not fill this process's memory.
            if len(rest) > LONGEST_CHARS:
                lines.append(rest)
                rest = ""
            self._rest = rest
        # Without the lock. The log has a lock, too, and a destructor may print while its thread
        # holds that one: two threads would wait for each other's lock forever. The price is that
        # lines of different threads may be logged in another order than they were printed.
        for line in lines:
            self._write_line(line)
        return len(text)

    def finish(self) -> None:
        """Log a last line that has no end."""
        with self._lock:
            rest, self._rest = self._rest, ""
        self._write_line(rest)

    def _write_line(self, line: str) -> None:
        if line.strip():
            # A `print` must never fail a query.
            with contextlib.suppress(Exception):
                self._log(
                    "printed",
                    text=line.rstrip("\r"),
                    stream=self._stream_name,
                )


def redirect_stdio() -> None:
    """Log from now on what this process prints, and the exceptions that nothing catches."""
    sys.stdout = _LogStream("stdout", _log.info, sys.stdout)
    sys.stderr = _LogStream("stderr", _log.warning, sys.stderr)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _exception_ignored


def finish() -> None:
    """Write all that is still buffered, before the process exits."""
    for stream in (
        sys.stdout,
        sys.stderr,
        sys.__stdout__,
        sys.__stderr__,
    ):
        # A handler may have replaced or closed each of them.
        with contextlib.suppress(Exception):
            if isinstance(stream, _LogStream):
                stream.finish()
            elif stream is not None:
                stream.flush()
    flush()


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    # As Python does: a thread may end itself with `sys.exit`.
    if issubclass(args.exc_type, SystemExit):
        return
    suppressed = _admit(_failures, args.exc_value)
    if suppressed is not None:
        name = args.thread.name if args.thread is not None else None
        _log.error(
            "thread_failed",
            thread=name,
            exc_info=args.exc_value,
            **suppressed,
        )


def _exception_ignored(args: sys.UnraisableHookArgs) -> None:
    # Python prints what a destructor or a callback raises, and continues.
    suppressed = _admit(_ignored, args.exc_value)
    if suppressed is not None:
        kind = type(args.object).__name__
        _log.warning(
            "exception_ignored",
            at=getattr(args.object, "__qualname__", kind),
            exc_info=args.exc_value,
            **suppressed,
        )


def _admit(throttle: LogThrottle, exc: BaseException | None) -> dict[str, int] | None:
    """Return the fields about suppressed events, or None to suppress this one."""
    return throttle.admit("" if exc is None else place_of(exc))
