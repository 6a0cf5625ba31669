"""An agent's memory: what one query leaves for the next.

`none` forgets, `ram` lives as long as the process. A handler that fails leaves the memory as it
was, also when it had begun to change the dict in place: that is what `rollback` is for.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any, Final, Protocol, cast

_ATOMIC: Final = frozenset({str, bytes, int, float, bool, type(None)})


class MemoryFault(Exception):
    """A memory cannot be opened, kept or written; the text says which file and why."""


class MemoryBusy(MemoryFault):
    """Another process has the memory open; it has not let go of it yet."""


class Memory(Protocol):
    """One worker's memory. Every `checkout` is followed by one `commit` or one `rollback`.

    A `durable` memory must be flushed before the answers of its commits may leave.
    """

    durable: bool

    def open(self, legacy: bytes | None = None) -> None:
        """Get ready for the first query; `legacy` is what the predecessor's `legacy` returned.

        Raises:
            MemoryFault: when the memory cannot be had.
        """

    def legacy(self) -> bytes | None:
        """Return what a successor in another process needs to go on, or None when it needs nothing.

        Raises:
            MemoryFault: when that cannot be made.
        """

    def checkout(self) -> dict[Any, Any]:
        """Return the dict to hand to the handler."""

    def peek(self) -> dict[Any, Any]:
        """Return a copy of what was committed last, for whoever looks on. On any thread, a query's midst too."""

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new` for the next query; return the commit's number.

        Raises:
            MemoryFault: when it cannot be kept; the memory is as `checkout` found it then.
        """

    def kept(self, number: int) -> bool:
        """Return whether a commit is durable. One that is not was taken back, or is still to be flushed."""

    def rollback(self) -> None:
        """Bring back what `checkout` found."""

    def flush(self) -> None:
        """Make the last commit durable.

        Raises:
            MemoryFault: when it cannot be written; the memory is what was last flushed then.
        """

    def close(self) -> None:
        """Let go of what the memory holds open."""


class NoMemory:
    """`memory = "none"`: every query gets `{}`, what it returns is dropped."""

    durable = False

    def open(self, legacy: bytes | None = None) -> None:
        """Nothing is needed."""

    def legacy(self) -> None:
        """Nothing is left."""

    def checkout(self) -> dict[Any, Any]:
        """Return a new empty dict."""
        return {}

    def peek(self) -> dict[Any, Any]:
        """Return an empty dict."""
        return {}

    def commit(self, new: dict[Any, Any]) -> int:
        """Drop it."""
        return 0

    def kept(self, number: int) -> bool:
        """Nothing is durable."""
        return False

    def rollback(self) -> None:
        """Nothing was kept."""

    def flush(self) -> None:
        """Nothing is durable."""

    def close(self) -> None:
        """Nothing is open."""


class RamMemory:
    """`memory = "ram"`: a dict in this process."""

    durable = False

    def __init__(self) -> None:
        self._current: dict[Any, Any] = {}
        self._before: dict[Any, Any] | bytes | None = None  # the snapshot, while a query has the dict
        self._turn = 0

    def open(self, legacy: bytes | None = None) -> None:
        """Begin with what the predecessor left, or with nothing.

        Raises:
            MemoryFault: when what it left cannot be read.
        """
        if legacy is None:
            return
        try:
            self._current = pickle.loads(legacy)
        except Exception as exc:  # objects of any class may refuse in any way
            raise MemoryFault(f"what the predecessor remembered cannot be read: {exc}") from exc

    def legacy(self) -> bytes | None:
        """Return the dict, pickled: it goes to a process of the same user that runs the same handler.

        Raises:
            MemoryFault: when it holds what cannot be pickled.
        """
        try:
            return pickle.dumps(self._current, pickle.HIGHEST_PROTOCOL)
        except Exception as exc:
            raise MemoryFault(f"the memory cannot be handed over: {exc}") from exc

    def checkout(self) -> dict[Any, Any]:
        """Return the current dict, after taking a snapshot of it."""
        self._before = _snapshot(self._current)
        self._turn += 1
        return self._current

    def peek(self) -> dict[Any, Any]:
        """Return a copy of what was committed last; what cannot be copied in it is shared."""
        while True:
            turn, before = self._turn, self._before
            found = self._current if before is None else before
            try:
                copied = _copied(found, self._current)
            except Exception:  # objects of any class may refuse in any way, and a query may have begun to change it
                if turn == self._turn:
                    raise
                continue
            if turn == self._turn:  # else it may be half of what it was and half of what a query makes of it
                return copied

    def commit(self, new: dict[Any, Any]) -> int:
        """Keep `new`, which may be the dict that `checkout` returned."""
        self._current = new
        self._before = None
        return 0

    def kept(self, number: int) -> bool:
        """Nothing is durable."""
        return False

    def rollback(self) -> None:
        """Bring back the snapshot; a dict whose pickled contents cannot be read back stays as it is."""
        before, self._before = self._before, None
        if not isinstance(before, bytes):
            self._current = self._current if before is None else before
            return
        with contextlib.suppress(Exception):  # objects of any class may refuse in any way
            self._current = pickle.loads(before)

    def flush(self) -> None:
        """Nothing is durable."""

    def close(self) -> None:
        """Nothing is open."""


def _snapshot(memory: dict[Any, Any]) -> dict[Any, Any] | bytes:
    """Return enough of `memory` to bring it back, as cheaply as its contents allow.

    A flat dict of plain values is copied. Anything else is pickled, which is several times
    faster than `copy.deepcopy`; it is unpickled only after a failure, in this process.
    """
    for value in memory.values():
        if type(value) not in _ATOMIC:
            break
    else:
        return memory.copy()
    try:
        return pickle.dumps(memory, pickle.HIGHEST_PROTOCOL)
    except Exception:  # noqa: BLE001 - objects of any class may refuse in any way
        return {key: _copy(value) for key, value in memory.items()}


def _copied(memory: dict[Any, Any] | bytes, live: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dict of its own for a dict or a snapshot; of `live`, where what is pickled cannot be read back."""
    snapshot = memory if isinstance(memory, bytes) else _snapshot(memory)
    if not isinstance(snapshot, bytes):
        return snapshot
    try:
        return cast(dict[Any, Any], pickle.loads(snapshot))
    except Exception:  # noqa: BLE001 - objects of any class may refuse in any way
        return {key: _copy(value) for key, value in live.items()}


def _copy(value: Any) -> Any:
    """Copy what can be copied; a client or a lock that a handler keeps is shared, as it must be."""
    if type(value) in _ATOMIC:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - as above
        return value
