"""An agent's memory: what one query leaves for the next.

`none` keeps nothing, `ram` keeps it in the process and hands it over to a successor, and `disk`
keeps it in a file. If a handler fails, `rollback` restores the memory, even if the handler changed
the dict in place. Only values that cannot be copied, such as a client or a lock, keep their
changes.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any, Final

from shared.errors import text_of

_ATOMIC: Final = frozenset({str, bytes, int, float, bool, type(None)})


class MemoryFault(Exception):
    """A memory cannot be opened, kept or written. The message gives the reason."""


class MemoryBusy(MemoryFault):
    """Another process still has the memory open."""


class Memory:
    """One worker's memory. For a query, a `commit` or a `rollback` follows each `checkout`.

    This class itself is `memory = "none"`: every query gets a new dict, and the dict that it
    returns is dropped. Of all memories, only this one may be used by several queries at once. The
    subclasses are the other kinds.

    Attributes:
        needs_flush: whether `flush` must make a commit durable before its answer may leave.
    """

    needs_flush = False

    def open(self, handover: bytes | None = None) -> None:
        """Prepare for the first query. `handover` is what the predecessor's `handover` returned.

        Raises:
            MemoryBusy: if another process has the memory open.
            MemoryFault: if it cannot be opened.
        """

    def handover(self) -> bytes | None:
        """Return what a successor in another process needs; None if it needs nothing.

        Raises:
            MemoryFault: if the memory cannot be handed over.
        """
        return None

    def checkout(self) -> dict[Any, Any]:
        """Return the dict for the next call of the handler."""
        return {}

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new` for the next query. Return the commit's number.

        Raises:
            MemoryFault: if it cannot be kept. `rollback` then restores the memory.
        """
        return 0

    def is_durable(self, number: int) -> bool:
        """Return whether a commit is durable. If not, it was taken back, or is not flushed yet."""
        return False

    def rollback(self) -> None:
        """Restore what `checkout` returned, as it was then."""

    def flush(self) -> None:
        """Make the last commit durable.

        Raises:
            MemoryFault: if it cannot be written. The memory is then what was last flushed.
        """

    def close(self) -> None:
        """Close what the memory has open."""


class RamMemory(Memory):
    """`memory = "ram"`: a dict in this process."""

    def __init__(self) -> None:
        self._current: dict[Any, Any] = {}
        self._snapshot: dict[Any, Any] | bytes | None = None

    def open(self, handover: bytes | None = None) -> None:
        """Start with what the predecessor handed over, or empty.

        Raises:
            MemoryFault: if what it handed over cannot be read.
        """
        if handover is None:
            return
        try:
            # Unpickling may run any code. It is safe here: the bytes come from a process of this
            # user that runs this agent's handler, and the runner has not changed them.
            self._current = pickle.loads(handover)
        except Exception as exc:  # objects of any class may raise anything
            raise MemoryFault(f"the predecessor's memory cannot be read: {text_of(exc)}") from exc

    def handover(self) -> bytes | None:
        """Return the dict, pickled.

        Raises:
            MemoryFault: if it contains what cannot be pickled.
        """
        try:
            return pickle.dumps(self._current, pickle.HIGHEST_PROTOCOL)
        except Exception as exc:
            raise MemoryFault(f"the memory cannot be handed over: {text_of(exc)}") from exc

    def checkout(self) -> dict[Any, Any]:
        """Return the current dict, after taking a snapshot of it."""
        self._snapshot = _snapshot(self._current)
        return self._current

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new`, which may be the dict that `checkout` returned."""
        self._current = new
        self._snapshot = None
        return 0

    def rollback(self) -> None:
        """Restore the snapshot. If its pickle cannot be read, the dict stays as it is."""
        snapshot = self._snapshot
        self._snapshot = None
        if isinstance(snapshot, bytes):
            with contextlib.suppress(Exception):  # objects of any class may raise anything
                self._current = pickle.loads(snapshot)
        elif snapshot is not None:
            self._current = snapshot


def _snapshot(memory: dict[Any, Any]) -> dict[Any, Any] | bytes:
    """Return enough of `memory` to restore it, as cheaply as its contents allow."""
    # This runs for each query. Nothing can change a plain value in place, so a shallow copy is
    # enough for such values. For other values, pickling is several times faster than
    # `copy.deepcopy`. The pickle is read only after a failure.
    if _ATOMIC.issuperset(map(type, memory.values())):
        return memory.copy()
    try:
        return pickle.dumps(memory, pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - objects of any class may raise anything
        return {key: _copy(value) for key, value in memory.items()}


def _copy(value: Any) -> Any:
    """Return a copy, or the value itself if it cannot be copied, such as a client or a lock."""
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - as above
        return value
