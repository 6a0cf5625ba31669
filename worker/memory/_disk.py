"""`memory = "disk"`: an agent's memory at one node, as msgpack in one row of a SQLite file.

It survives a crash of the worker, the runner and the machine. Each `flush` is one transaction of
SQLite, and in WAL mode `synchronous = FULL` syncs at the end of each transaction
(https://www.sqlite.org/pragma.html#pragma_synchronous). A file that cannot be this memory is moved
aside. It is never written to and never deleted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

import msgspec

from shared.logs.logger import get_logger
from shared.memory_files import SIDE_FILES
from worker.memory.base import Memory, MemoryBusy, MemoryFault

APPLICATION_ID: Final = 0x454D5231
"""It identifies a file of em-runner: the bytes "EMR1" at offset 68 of SQLite's header."""

_encode: Final = msgspec.msgpack.Encoder().encode
_EMPTY: Final = _encode({})
_BUSY_TIMEOUT_S: Final = 5.0

_FAILURES_KEPT: Final = 64
"""How many failed flushes `is_durable` remembers.

The dispatcher asks about each commit soon after its flush, so it needs only the last few.
"""


class DiskMemory(Memory):
    """One worker's memory in one file.

    `commit` keeps a query's memory in this process, and `flush` makes the last commit durable. An
    answer must not leave between the two. A flush that fails takes back every commit since the last
    successful flush.

    Args:
        path: the file. It and its folder are created if they do not exist.
    """

    needs_flush = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database: sqlite3.Connection
        self._open_files = ExitStack()
        # A flush runs on another thread than the handler. `_lock` guards what both change, and
        # `_flushing` lets one flush run at a time.
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._current: dict[Any, Any] = {}
        self._committed_blob = _EMPTY
        self._flushed_blob = _EMPTY
        self._last_number = 0
        self._durable_number = 0
        # For each failed flush: the last durable number before it, and the last that it took back.
        self._taken_back: deque[tuple[int, int]] = deque(maxlen=_FAILURES_KEPT)
        self._failed_flushes = 0
        self._failed_flushes_at_checkout = 0

    def open(self, handover: bytes | None = None) -> None:
        """Open or create the file. No other process can open it until this one closes it or ends.

        On a file system without locks, another process can open it at any time.

        Raises:
            MemoryBusy: if another process has it open.
            MemoryFault: if it cannot be opened or created.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = self.path.with_name(f".{self.path.stem}.lock")
            lock_fd = _lock_file(lock)
            self._open_files.callback(os.close, lock_fd)
            self._database, self._flushed_blob = _open(self.path)
            self._open_files.enter_context(closing(self._database))
        except BlockingIOError:
            raise MemoryBusy(f"the memory {self.path} is still open in another process") from None
        except (OSError, sqlite3.Error) as exc:
            self.close()
            raise MemoryFault(f"the memory {self.path} cannot be opened: {exc}") from None
        self._committed_blob = self._flushed_blob
        self._current = _decode(self._flushed_blob)

    def handover(self) -> None:
        """Return None: the successor opens the file."""

    def checkout(self) -> dict[Any, Any]:
        """Return the current dict."""
        # First the number of failures, then the dict. If a flush fails between the two, `commit`
        # refuses a memory that it could accept. In the other order, it would accept a memory that
        # was made from a commit that was taken back.
        self._failed_flushes_at_checkout = self._failed_flushes
        return self._current

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new` for the next query. Return the commit's number.

        Raises:
            MemoryFault: if msgpack cannot encode it, or a flush has failed since `checkout`.
        """
        try:
            blob = _encode(new)
        except Exception as exc:
            raise MemoryFault(f"the memory contains what msgpack cannot encode: {exc}") from exc
        with self._lock:
            if self._failed_flushes_at_checkout != self._failed_flushes:
                raise MemoryFault("the memory that this query started with could not be written")
            self._committed_blob = blob
            self._current = new
            self._last_number += 1
            return self._last_number

    def is_durable(self, number: int) -> bool:
        """Return whether a commit is durable. If not, it was taken back, or is not flushed yet."""
        if number > self._durable_number:
            return False
        with self._lock:
            return not any(before < number <= last for before, last in self._taken_back)

    def rollback(self) -> None:
        """Restore the last commit."""
        with self._lock:
            self._current = _decode(self._committed_blob)

    def flush(self) -> None:
        """Make the last commit durable. May be called on any thread.

        Raises:
            MemoryFault: if it cannot be written. The memory is then what was last flushed.
        """
        with self._flushing:
            with self._lock:
                blob, number = self._committed_blob, self._last_number
            if blob is self._flushed_blob:
                return
            # `_lock` is not held during the write, so that the handler can continue. The next flush
            # writes its further commits. If this write fails, they are taken back too, because they
            # were made from memory that is lost.
            try:
                # One statement is one transaction.
                self._database.execute("UPDATE memory SET data = ?", (blob,))
            except sqlite3.Error as exc:
                with self._lock:
                    self._failed_flushes += 1
                    failure = (self._durable_number, self._last_number)
                    self._taken_back.append(failure)
                    self._committed_blob = self._flushed_blob
                    self._current = _decode(self._committed_blob)
                raise MemoryFault(f"the memory {self.path} cannot be written: {exc}") from None
            self._flushed_blob = blob
            self._durable_number = number

    def close(self) -> None:
        """Close the file. SQLite then writes its write-ahead log into the file."""
        self._open_files.close()


def _lock_file(path: Path) -> int:
    """Lock a file, and return its descriptor.

    Raises:
        BlockingIOError: if another process has the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Not `flock`: processes that the handler forks would hold that lock too, and keep it after
        # the worker has ended. This lock belongs to the one process (fcntl(2)).
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        # Some network file systems have no locks. There the memory is used without one.
        if exc.errno != errno.ENOLCK:
            os.close(fd)
            raise
    return fd


def _open(path: Path) -> tuple[sqlite3.Connection, bytes]:
    """Open or create the file, and return its content. Move aside one that is not this memory."""
    reason = _problem(path)
    if reason is not None:
        aside = _move_aside(path)
        get_logger().error(
            "memory_moved_aside",
            file=str(path),
            to=str(aside),
            reason=reason,
            hint="the agent starts with an empty memory; repair the file, and move it back "
            "while the runner is stopped",
        )
    # Autocommit, so that `flush` is one statement. `check_same_thread` is off, because `flush` runs
    # on another thread than `open`.
    database = sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if _is_blank(database):
            _create(database)
        return database, _read(database)
    except BaseException:
        database.close()
        raise


def _problem(path: Path) -> str | None:
    """Return why a file is not this memory. None if it is, or if neither it nor its log exists."""
    if not path.exists() or path.stat().st_size == 0:
        # SQLite deletes the write-ahead log when it opens an empty file, but the log may contain
        # the whole memory.
        log = path.with_name(f"{path.name}-wal")
        return "it is missing or empty, but its write-ahead log exists" if log.exists() else None
    # Read-only: a connection that can write would write the write-ahead log into the file, even if
    # the file is another program's.
    uri = f"{path.absolute().as_uri()}?mode=ro"
    database = sqlite3.connect(
        uri,
        uri=True,
        timeout=_BUSY_TIMEOUT_S,
    )
    with closing(database):
        try:
            if _is_blank(database):
                return None
            if _application_id(database) != APPLICATION_ID:
                return "it is another program's database"
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                return f"it is corrupt: {verdict}"
            _decode(_read(database))
        except sqlite3.OperationalError as exc:
            # SQLITE_ERROR: a table is missing, or a later version wrote the file. All other codes
            # are about the access, such as a lock, a permission or a failing disk. The file may be
            # intact, so it must not be moved.
            if exc.sqlite_errorcode != sqlite3.SQLITE_ERROR:
                raise
            return f"it is corrupt: {exc}"
        except (
            sqlite3.DatabaseError,
            msgspec.DecodeError,
            TypeError,
            ValueError,
        ) as exc:
            return f"it is corrupt: {exc}"
    return None


def _is_blank(database: sqlite3.Connection) -> bool:
    """Return whether a file has no content: it is new, or its creator was killed."""
    if _application_id(database) not in (0, APPLICATION_ID):
        return False
    tables: int = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return tables == 0


def _application_id(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA application_id").fetchone()[0])


def _read(database: sqlite3.Connection) -> bytes:
    data: bytes = database.execute("SELECT data FROM memory").fetchone()[0]
    return data


def _create(database: sqlite3.Connection) -> None:
    with database:
        # All or nothing: sqlite3 itself starts no transaction before a PRAGMA or a CREATE.
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("CREATE TABLE memory (data BLOB NOT NULL)")
        database.execute("INSERT INTO memory VALUES (?)", (_EMPTY,))


def _move_aside(path: Path) -> Path:
    """Rename a file and its write-ahead log, which may have the last commits. Return the name."""
    timestamp = time.strftime("%Y%m%dT%H%M%S")
    aside = path.with_name(f"{path.name}.aside-{timestamp}-{time.monotonic_ns() % 1_000_000}")
    # The database comes first. If this process is killed before the log follows, the next one finds
    # a log without its database, and moves that aside too. In the other order, a
    # database could be left without its log, and would open as an older state of the memory.
    for suffix in ("", *SIDE_FILES):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(aside.with_name(aside.name + suffix))
    return aside


def _decode(data: bytes) -> dict[Any, Any]:
    # `dict` and not `dict[str, Any]`: a handler may use keys that are not strings.
    return msgspec.msgpack.decode(data, type=dict)
