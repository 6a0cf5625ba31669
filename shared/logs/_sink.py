"""Writes a process's log lines to a file descriptor, each line whole, without waiting.

A line is written at once if possible. Otherwise (a reader that stalls, a stopped terminal) a thread
writes it later. Beyond `MAX_WAITING_BYTES`, lines are dropped and counted.

Several processes write to one pipe or file. The kernel keeps a write to a pipe whole if it has at
most `PIPE_BUF` bytes (pipe(7)), and any write to a file. So the processes need no lock, as long as
no line is longer than `MAX_LINE_BYTES`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

MAX_LINE_BYTES: Final = select.PIPE_BUF
"""The longest line, with its newline, that is not mixed with other processes' lines in a pipe."""

MAX_WAITING_BYTES: Final = 4 << 20


class Sink:
    """Writes lines to a descriptor.

    Args:
        fd: the file descriptor, or -1 to write nothing. It is neither changed nor closed.
        on_dropped: called with the number of dropped lines, after the next line was written.
    """

    def __init__(
        self,
        fd: int,
        on_dropped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._fd = fd
        self._on_dropped = on_dropped
        self._opened: socket.socket | int | None = None
        # Whether a write to `_fd` may block. Then only the thread writes.
        self._may_block = False
        with contextlib.suppress(OSError):
            self._open()
        self._reset()

    def _open(self) -> None:
        """Reopen a pipe or terminal in non-blocking mode. Other files never block."""
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISSOCK(mode):  # from journald, for example; it cannot be reopened by its path
            self._opened = socket.socket(fileno=os.dup(self._fd))
        elif stat.S_ISFIFO(mode) or os.isatty(self._fd):
            # `os.set_blocking` would change the descriptor for all processes that inherited it, and
            # a program that expects a blocking standard error would fail. So the pipe is opened
            # again, with flags for this process alone. After sudo, it belongs to another user and
            # cannot be opened again: `_may_block` then stays set.
            self._may_block = True
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = self._opened = os.open(f"/proc/self/fd/{self._fd}", flags)
            self._may_block = False

    def _reset(self) -> None:
        self._pid = os.getpid()
        # Reentrant, because a destructor may log while the same thread holds the lock.
        self._mutex = threading.RLock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()
        self._idle.set()
        self._mid_line = False

    def _notice_fork(self) -> None:
        """Start with an empty queue in a child process.

        The child has no copy of the thread, its copy of the lock may be held forever, and the
        parent writes the lines that wait.
        """
        if self._pid != os.getpid():
            self._reset()

    def write(self, line: bytes) -> None:
        """Write a line now or later, or drop it. It neither raises nor waits."""
        self._notice_fork()
        with self._mutex:
            if self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self._dropped += 1
            elif self._waiting or self._may_block:  # lines that wait come first
                self._enqueue(line)
            else:
                self._write_now(line)

    def flush(self, timeout_s: float) -> None:
        """Wait until all lines are written, for at most `timeout_s`."""
        self._notice_fork()
        self._idle.wait(timeout_s)

    def close(self) -> None:
        """Close the reopened descriptor, unless lines wait. Then it stays open until the exit."""
        self._notice_fork()
        with self._mutex:
            if self._waiting:
                return
            if isinstance(self._opened, socket.socket):
                self._opened.close()
            elif self._opened is not None:
                os.close(self._opened)
            self._opened = None
            self._fd = -1

    def _write_now(self, line: bytes) -> None:
        try:
            rest = self._write_some(self._at_line_start(line))
        except OSError:  # the disk is full, or no process reads the pipe
            self._dropped += 1
            return
        if rest:
            self._enqueue(rest)
        else:
            self._report_dropped()

    def _at_line_start(self, line: bytes) -> bytes:
        """Return the line, after a newline if the previous line was written only in part.

        A pipe accepts a line whole or not at all. A file on a disk that becomes full does not.
        """
        return b"\n" + line if self._mid_line else line

    def _write_some(self, data: bytes) -> bytes:
        """Write as much as possible without waiting, and return the rest."""
        try:
            if isinstance(self._opened, socket.socket):
                written = self._opened.send(data, socket.MSG_DONTWAIT)
            else:
                written = os.write(self._fd, data)
        except BlockingIOError:
            return data
        rest = data[written:]
        self._mid_line = bool(rest)
        return rest

    def _enqueue(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._idle.clear()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_later, name="log", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the system allows no more threads
                self._dropped += len(self._waiting)
                self._waiting.clear()
                self._note_thread_ended()

    def _write_later(self) -> None:
        # The thread ends when no line waits, so that an idle process has none. The first line stays
        # in the queue while it is written without the lock: `write` then sees that lines wait, and
        # appends after it instead of overtaking it.
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        rest = self._waiting[0]
        while True:
            lost = False
            try:
                while rest:
                    poll.poll()
                    rest = self._write_some(rest)
            except OSError:
                lost = True
            with self._mutex:
                self._dropped += lost
                self._waiting_bytes -= len(self._waiting.popleft())
                if not self._waiting:
                    self._note_thread_ended()
                    if not lost:
                        self._report_dropped()
                    return
                rest = self._at_line_start(self._waiting[0])

    def _note_thread_ended(self) -> None:
        self._thread = None
        self._waiting_bytes = 0
        self._idle.set()

    def _report_dropped(self) -> None:
        if self._dropped:
            # Reset first: the callback logs, and so calls this method again.
            dropped, self._dropped = self._dropped, 0
            self._on_dropped(dropped)
