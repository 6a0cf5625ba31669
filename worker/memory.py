"""An agent's memory: what one query leaves for the next.

`none` forgets, `ram` lives as long as the process. A handler that fails leaves the memory as it
was, also when it had begun to change the dict in place: that is what `rollback` is for.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any, Final, Protocol

from shared.schema import MemoryKind

_ATOMIC: Final = frozenset({str, bytes, int, float, bool, type(None)})


class Memory(Protocol):
    """One worker's memory. Every `checkout` is followed by one `commit` or one `rollback`."""

    def checkout(self) -> dict[Any, Any]:
        """Return the dict to hand to the handler."""

    def commit(self, new: dict[Any, Any]) -> None:
        """Keep `new` for the next query."""

    def rollback(self) -> None:
        """Bring back what `checkout` found."""


class NoMemory:
    """`memory = "none"`: every query gets `{}`, what it returns is dropped."""

    def checkout(self) -> dict[Any, Any]:
        """Return a new empty dict."""
        return {}

    def commit(self, new: dict[Any, Any]) -> None:
        """Drop it."""

    def rollback(self) -> None:
        """Nothing was kept."""


class RamMemory:
    """`memory = "ram"`: a dict in this process."""

    def __init__(self) -> None:
        self._current: dict[Any, Any] = {}
        self._before: dict[Any, Any] | bytes = {}

    def checkout(self) -> dict[Any, Any]:
        """Return the current dict, after taking a snapshot of it."""
        self._before = _snapshot(self._current)
        return self._current

    def commit(self, new: dict[Any, Any]) -> None:
        """Keep `new`, which may be the dict that `checkout` returned."""
        self._current = new

    def rollback(self) -> None:
        """Bring back the snapshot; a dict whose pickled contents cannot be read back stays as it is."""
        if not isinstance(self._before, bytes):
            self._current = self._before
            return
        with contextlib.suppress(Exception):  # objects of any class may refuse in any way
            self._current = pickle.loads(self._before)


def open_memory(kind: MemoryKind) -> Memory:
    """Return the memory that an agent asked for."""
    return NoMemory() if kind == "none" else RamMemory()


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


def _copy(value: Any) -> Any:
    """Copy what can be copied; a client or a lock that a handler keeps is shared, as it must be."""
    if type(value) in _ATOMIC:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - as above
        return value
