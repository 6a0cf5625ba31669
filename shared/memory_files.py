"""Where agents' memories on disk are: one file for each agent at each node, whichever of its workers has that node."""

from __future__ import annotations

import contextlib
import re
from hashlib import sha256
from pathlib import Path
from typing import Final

from shared.nodes import NodeAddress

SIDE_FILES: Final = ("-wal", "-shm")
"""What SQLite keeps beside a file while it is open, and after a kill."""

_LONGEST: Final = 100
_SUFFIX: Final = ".sqlite"


def memory_name(agent: str, node: NodeAddress) -> str:
    """Return what the memory of an agent at a node is called, such as `echo@localhost_8080`."""
    place = re.sub(r"[^\w.-]", "_", node.authority)
    if len(place) > _LONGEST:  # a file's name has 255 bytes, a host's may have nearly as many
        place = f"{place[:_LONGEST]}-{sha256(node.authority.encode()).hexdigest()[:12]}"
    return f"{agent}@{place}"


def memory_file(state_dir: Path, name: str) -> Path:
    """Return the file of the memory of that name."""
    return state_dir / "memory" / f"{name}{_SUFFIX}"


def memory_files(state_dir: Path, agent: str) -> set[Path]:
    """Return the files of an agent's memories, those of nodes that it has no more too."""
    return set(memory_file(state_dir, "").parent.glob(f"{agent}@*{_SUFFIX}"))


def move_memory(old: Path, new: Path) -> bool:
    """Give a memory that nobody has open another name; False when there is none, or one of that name."""
    if not old.exists() or new.exists():
        return False
    for suffix in (*SIDE_FILES, ""):  # the file last: without its log it would be an older state of itself
        with contextlib.suppress(FileNotFoundError):
            old.with_name(old.name + suffix).rename(new.with_name(new.name + suffix))
    return True
