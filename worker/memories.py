"""Chooses an agent's memory."""

from __future__ import annotations

from pathlib import Path

from shared.schema import MemoryKind
from worker.disk_memory import DiskMemory
from worker.memory import Memory, NoMemory, RamMemory


def memory_for(kind: MemoryKind, worker: str, state_dir: Path) -> Memory:
    """Return the memory that an agent asked for, not yet open; on disk it is a file of the worker's own."""
    if kind == "disk":
        return DiskMemory(state_dir / "memory" / f"{worker}.sqlite")
    return NoMemory() if kind == "none" else RamMemory()
