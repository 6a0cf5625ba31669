"""`memory = "disk"`: an agent's memory in SQLite, one file for each of its nodes, one row, msgpack.

Survives the end of the worker, of the runner and of the machine: WAL with `synchronous = FULL`
syncs at each commit (https://www.sqlite.org/pragma.html#pragma_synchronous). A file that cannot be
this memory is moved aside, never written to and never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec

from shared.logs import get_logger
from shared.memory_files import SIDE_FILES
from worker.memory import MemoryBusy, MemoryFault

APPLICATION_ID: Final = 0x454D5231  # "EMR1", in SQLite's header at byte 68: whose file this is
_encode: Final = msgspec.msgpack.Encoder().encode
_EMPTY: Final = _encode({})
_BUSY_TIMEOUT_S: Final = 5.0
LOST_REMEMBERED: Final = 1024
"""How many failed flushes are remembered: a commit's fate is asked within one or two."""


class DiskMemory:
    """One worker's memory in one file.

    `commit` keeps a query's memory in this process, `flush` makes the last one durable. An answer
    must not leave between the two. A flush that fails takes back every commit since the one before
    it.

    Args:
        path: the file; it and its folder are made when missing.
    """

    durable = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._generation = 0
        self._checked_out = 0
        self._last = self._durable = 0  # the numbers of the last commit, and of the last that is on disk
        # After which commit, and up to which, a failed flush took all back. Few are looked at: the newest first.
        self._lost: deque[tuple[int, int]] = deque(maxlen=LOST_REMEMBERED)
        self._database: sqlite3.Connection | None = None
        self._lock_fd: int | None = None
        self._flushed = self._blob = _EMPTY
        self._current: dict[Any, Any] = {}
        # A flush runs on a thread of its own, beside the handler: what both touch changes together.
        self._lock = threading.Lock()
        self._flushing = threading.Lock()

    def open(self, legacy: bytes | None = None) -> None:
        """Open or make the file. It is this process's alone until `close`, or the process's end.

        Raises:
            MemoryBusy: while another process has it open.
            MemoryFault: when it cannot be opened or made.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _hold(self.path.with_name(f".{self.path.stem}.lock"))
            self._database, self._flushed = _open(self.path)
        except BlockingIOError:
            raise MemoryBusy(f"the memory {self.path} is still open in another process") from None
        except (OSError, sqlite3.Error) as exc:
            self._let_go()
            raise MemoryFault(f"the memory {self.path} cannot be opened: {exc}") from None
        self._blob = self._flushed
        self._current = _decode(self._blob)

    def legacy(self) -> None:
        """Nothing: the successor opens the file."""

    def checkout(self) -> dict[Any, Any]:
        """Return the current dict."""
        self._checked_out = self._generation  # first: taken back between the two, the commit is refused
        return self._current

    def peek(self) -> dict[Any, Any]:
        """Return what was committed last, on disk or still to be flushed, as a dict of its own."""
        return _decode(self._blob)

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new` for the next query; return the commit's number.

        Raises:
            MemoryFault: when it holds what msgpack cannot, or what it was made from was taken back meanwhile.
        """
        try:
            blob = _encode(new)
        except Exception as exc:
            raise MemoryFault(f"the memory holds what msgpack cannot: {exc}") from exc
        with self._lock:
            if self._checked_out != self._generation:
                raise MemoryFault("the memory that this query began with could not be written")
            self._blob, self._current = blob, new
            self._last += 1
            return self._last

    def kept(self, number: int) -> bool:
        """Return whether a commit is durable. One that is not was taken back, or is still to be flushed."""
        if number > self._durable:
            return False
        if not self._lost:
            return True
        with self._lock:
            for before, last in reversed(self._lost):
                if number > last:
                    return True
                if number > before:
                    return False
        return True

    def rollback(self) -> None:
        """Bring back the last commit."""
        with self._lock:
            self._current = _decode(self._blob)

    def flush(self) -> None:
        """Make the last commit durable. May be called on any thread.

        Raises:
            MemoryFault: when it cannot be written; the memory is what was last flushed then.
        """
        with self._flushing:
            with self._lock:
                blob, last = self._blob, self._last
            if blob is self._flushed:
                return
            assert self._database is not None
            try:
                self._database.execute("UPDATE memory SET data = ?", (blob,))  # a transaction of its own
            except sqlite3.Error as exc:
                with self._lock:
                    self._generation += 1
                    self._lost.append((self._durable, self._last))
                    self._blob = self._flushed
                    self._current = _decode(self._blob)
                raise MemoryFault(f"the memory {self.path} cannot be written: {exc}") from None
            self._flushed, self._durable = blob, last

    def close(self) -> None:
        """Let the file go; the log is folded into it."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._let_go()

    def _let_go(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _hold(path: Path) -> int:
    """Lock a file, and return its descriptor. What the handler forks does not hold it, too, as with `flock` it would.

    Raises:
        BlockingIOError: while another process holds it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno == errno.ENOLCK:  # a file system without locks
            return fd
        os.close(fd)
        if exc.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(exc.errno, exc.strerror) from None
        raise
    return fd


def _open(path: Path) -> tuple[sqlite3.Connection, bytes]:
    """Open or make the file; move aside one that is corrupt or not ours."""
    try:
        return _open_own(path)
    except _NotOurs as exc:
        why = str(exc)
    aside = _move_aside(path)
    get_logger("worker.memory").error(
        "memory_moved_aside",
        file=str(path),
        to=str(aside),
        why=why,
        do="the agent starts with an empty memory; mend the file and move it back while the runner is stopped",
    )
    return _open_own(path)


class _NotOurs(Exception):
    """The file is corrupt, or another program's."""


def _open_own(path: Path) -> tuple[sqlite3.Connection, bytes]:
    if path.exists() and path.stat().st_size > 0:
        _check(path)
    elif path.with_name(f"{path.name}-wal").exists():
        raise _NotOurs("it is empty, but there is a log of what it held")
    database = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if _is_blank(database):
            _make(database)
        (data,) = database.execute("SELECT data FROM memory").fetchone()
    except BaseException:
        database.close()
        raise
    return database, data


def _check(path: Path) -> None:
    """Look whether a file is this memory, by a connection that cannot write: not even a log is folded in.

    Raises:
        _NotOurs: when it is not.
    """
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_S)) as database:
        try:
            if _is_blank(database):
                return
            if _application_id(database) != APPLICATION_ID:
                raise _NotOurs("it is another program's database")
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise _NotOurs(f"it is corrupt: {verdict}")
            (data,) = database.execute("SELECT data FROM memory").fetchone()
            _decode(data)
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode == sqlite3.SQLITE_ERROR:  # no such table, a format from the future
                raise _NotOurs(f"it is corrupt: {exc}") from None
            raise  # locked, not readable, a disk that fails: nothing that is wrong with the file
        except (sqlite3.DatabaseError, msgspec.DecodeError, TypeError, ValueError) as exc:
            raise _NotOurs(f"it is corrupt: {exc}") from None


def _is_blank(database: sqlite3.Connection) -> bool:
    """Return whether there is nothing in it: it is new, or whoever made it was killed while doing so."""
    return _application_id(database) in (0, APPLICATION_ID) and (
        database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    )


def _application_id(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA application_id").fetchone()[0])


def _make(database: sqlite3.Connection) -> None:
    with database:
        database.execute("BEGIN IMMEDIATE")  # all or nothing: sqlite3 begins none before a PRAGMA or a CREATE
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("CREATE TABLE memory (data BLOB NOT NULL)")
        database.execute("INSERT INTO memory VALUES (?)", (_EMPTY,))


def _move_aside(path: Path) -> Path:
    aside = path.with_name(f"{path.name}.aside-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 1_000_000}")
    for suffix in ("", *SIDE_FILES):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(aside.with_name(aside.name + suffix))
    return aside


def _decode(data: bytes) -> dict[Any, Any]:
    # `strict_map_key` does not exist here: any hashable msgpack value may be a key.
    return msgspec.msgpack.decode(data, type=dict)
