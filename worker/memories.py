"""Chooses an agent's memory."""

from __future__ import annotations

from pathlib import Path

from shared.memory_files import memory_file
from shared.schema import MemoryKind
from worker.disk_memory import DiskMemory
from worker.memory import Memory, NoMemory, RamMemory


def memory_for(kind: MemoryKind, name: str, state_dir: Path) -> Memory:
    """Return the memory that an agent asked for, not yet open; on disk it is a file of that name."""
    if kind == "disk":
        return DiskMemory(memory_file(state_dir, name))
    return NoMemory() if kind == "none" else RamMemory()
