"""Where a process's log lines go: written whole, and never waited for.

A line is written at once where that is possible. Where it is not (a reader that stalls, a terminal that is held, a
shipper that hangs) a thread writes it when it can, and what comes on top of some megabytes is dropped and counted: no
event loop, and no handler, ever waits for the reader of a log.

On a pipe, lines longer than the kernel keeps whole would mix with those of other processes: who writes holds a lock
on the pipe. One of another user's (after sudo) cannot be locked; there, lines of more than 4 KB may mix.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

MOST_BYTES: Final = 4 << 20
"""How much may wait for a reader that stalls."""

LONGEST_LINE_BYTES: Final = 1 << 20


class Sink:
    """Writes lines to a descriptor.

    Args:
        fd: where to; -1 for nowhere. It stays as it is: blocking, and its owner's.
        tell_dropped: called, from a thread, with how many lines were dropped, once lines can be written again.
    """

    def __init__(self, fd: int, tell_dropped: Callable[[int], None] = lambda _: None) -> None:
        self._fd = fd
        self._tell_dropped = tell_dropped
        self._socket: socket.socket | None = None
        self._own = -1
        self.begin_anew()

    def _open(self, fd: int) -> None:
        """Have a way to `fd` that never waits; a file and /dev/null have none, and need none."""
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):  # such as journald's
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or os.isatty(fd):
            # Opened anew: the flag for not waiting would hold for every process that has inherited the old one.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._asks_first = True  # where it is another user's, after sudo: that may be used, and not opened
            self._own = os.open(f"/proc/self/fd/{fd}", flags)
            self._asks_first = False
            self._locks = stat.S_ISFIFO(mode)

    def begin_anew(self) -> None:
        """Begin with nothing, as a process that has just been forked must: it has no thread yet, and no lock."""
        if self._own != -1:
            os.close(self._own)
        self._own, self._locks, self._asks_first = -1, False, False
        if self._socket is None:
            with contextlib.suppress(OSError):
                self._open(self._fd)
        self._mutex = threading.RLock()  # reentrant: a destructor may log in the midst of it
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._within_line = False
        self._begun = False  # a part of a line is written, and the rest is still to be
        self._torn = False  # and will never be

    def write(self, line: bytes) -> None:
        """Write a line, now or later, or drop it. Never raises, never waits."""
        with self._mutex:
            if len(line) > LONGEST_LINE_BYTES or self._waiting_bytes + len(line) > MOST_BYTES:
                self._dropped += 1
            elif self._waiting:
                self._keep(line)
            else:
                rest = self._at_once(line)
                if rest:
                    self._keep(rest)  # whatever its length: a line that has been begun is ended
                elif rest is not None and self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    self._tell_dropped(dropped)

    def flush(self, timeout_s: float) -> None:
        """Wait until nothing waits any more, for so long at the most."""
        self._idle.wait(timeout_s)

    def close(self) -> None:
        """Let go of what was opened, unless something waits: then it goes with the process."""
        with self._mutex:
            if not self._waiting:
                if self._own != -1:
                    os.close(self._own)
                if self._socket is not None:
                    self._socket.close()
                self._own, self._socket, self._fd, self._locks = -1, None, -1, False

    # --- at once ---

    def _at_once(self, line: bytes) -> bytes | None:
        """Write as much as can be written now, and return the rest; None when nothing can be written at all."""
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
            rest: bytes | None = self._begin(line)
        except BlockingIOError:
            return line
        except OSError:  # its reader is gone, the disk is full: there is nobody to be told now
            self._lose()
            rest = None
        if not rest:
            self._end_line()
        return rest

    def _begin(self, line: bytes) -> bytes:
        """Write what can be written of a line now, after the end of one before it that was torn; return the rest."""
        line = b"\n" + line if self._torn else line
        return self._go_on(line)

    def _go_on(self, rest: bytes) -> bytes:
        rest = rest[self._write_some(rest) :]
        self._torn, self._begun = False, bool(rest)
        return rest

    def _lose(self) -> None:
        self._dropped += 1
        self._torn, self._begun = self._begun or self._torn, False

    def _lock(self, how: int) -> None:
        if self._locks and not self._within_line:
            try:
                fcntl.flock(self._own, how)
            except BlockingIOError:
                raise
            except OSError:  # there are no locks here: lines may mix, and none is lost
                self._locks = False
        self._within_line = True

    def _write_some(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        if self._asks_first:
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            if not poll.poll(0):
                raise BlockingIOError
            data = data[: select.PIPE_BUF]  # there is room for so much
        return os.write(self._fd if self._own == -1 else self._own, data)

    def _end_line(self) -> None:
        self._within_line = False
        if self._locks:
            with contextlib.suppress(OSError):
                fcntl.flock(self._own, fcntl.LOCK_UN)

    # --- later ---

    def _keep(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._idle.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_later, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread is to be had
                self._dropped += len(self._waiting)
                self._waiting.clear()
                self._end_line()  # what has been begun of one stays so, but others may write
                self._over()

    def _write_later(self) -> None:
        dropped, written = 0, False
        while True:
            with self._mutex:
                if not self._waiting:
                    if written:  # else it is told with the next line that can be
                        dropped, self._dropped = self._dropped, 0
                    self._over()
                    break
                line = self._waiting[0]
            written = self._write_when_possible(line)
            with self._mutex:
                self._waiting.popleft()
                self._waiting_bytes -= len(line)
        if dropped:
            self._tell_dropped(dropped)

    def _over(self) -> None:
        self._thread, self._waiting_bytes = None, 0
        self._idle.set()

    def _write_when_possible(self, rest: bytes) -> bool:
        """Write the rest of a line, however long that takes; False when it cannot be."""
        written = False
        try:
            self._lock(fcntl.LOCK_EX)
            fd = self._fd if self._own == -1 else self._own
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            while rest:
                poll.poll()
                with contextlib.suppress(BlockingIOError):
                    rest = self._go_on(rest) if self._begun else self._begin(rest)
            written = True
        except OSError:
            with self._mutex:
                self._lose()
        self._end_line()
        return written
