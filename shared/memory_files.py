"""Where agents' memories on disk are: one file for each agent at each node."""

from __future__ import annotations

import re
from hashlib import sha256
from pathlib import Path
from typing import Final

from shared.config.nodes import NodeAddress

SIDE_FILES: Final = ("-wal", "-shm")
"""The suffixes of SQLite's files beside a database while it is open, and after a kill."""

_MAX_NODE_CHARS: Final = 100


def memory_name(agent: str, node: NodeAddress) -> str:
    """Return the name of an agent's memory at a node, such as `echo@localhost_8080`."""
    # Not the worker's name: whichever of the agent's workers has this node opens this memory.
    place = re.sub(r"[^\w.-]", "_", node.authority)
    # A file name has at most 255 bytes, and a host name may have almost as many.
    if len(place) > _MAX_NODE_CHARS:
        digest = sha256(node.authority.encode()).hexdigest()[:12]
        place = f"{place[:_MAX_NODE_CHARS]}-{digest}"
    return f"{agent}@{place}"


def memory_file(state_dir: Path, name: str) -> Path:
    """Return the file of the memory with that name."""
    return state_dir / "memory" / f"{name}.sqlite"
