"""Chooses an agent's memory."""

from __future__ import annotations

from pathlib import Path

from shared.config.schema import MemoryKind
from shared.memory_files import memory_file
from worker.memory._disk import DiskMemory
from worker.memory.base import Memory, RamMemory


def create_memory(
    kind: MemoryKind,
    name: str,
    state_dir: Path,
) -> Memory:
    """Return a memory that is not open yet. `name` is that of its file, if it is on disk."""
    if kind == "disk":
        path = memory_file(state_dir, name)
        return DiskMemory(path)
    return RamMemory() if kind == "ram" else Memory()
