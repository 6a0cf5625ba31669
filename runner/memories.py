"""What becomes of agents' memories when their nodes change. A memory belongs to an agent at a node.

On disk it is a file that is named by both; whoever has the node opens it, once nobody else has it open. In `ram` it
goes from a process to its successor at the same node. Where a node is replaced by one that is new, what was remembered
at the one goes to the other, of either kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from shared.config import WorkerSpec
from shared.logs import get_logger
from shared.memory_files import memory_file, memory_files, memory_name, move_memory
from shared.nodes import NodeAddress

_log: Final = get_logger("supervisor")
_DO: Final = "to go on with the memory of a node that the agent has no more, stop the runner and rename that file"

Place = tuple[str, NodeAddress]


def place_of(spec: WorkerSpec) -> Place:
    """Return whose memory a worker has: an agent's at a node."""
    return spec.agent.name, spec.node


def moves(before: Iterable[WorkerSpec], after: Iterable[WorkerSpec]) -> set[str]:
    """Return the names of the workers whose node is gone, and who have one that is new in its place."""
    had, has = {spec.name: place_of(spec) for spec in before}, {spec.name: place_of(spec) for spec in after}
    gone, new = set(had.values()) - set(has.values()), set(has.values()) - set(had.values())
    return {name for name, place in has.items() if place in new and had.get(name) in gone}


def move_file(old: WorkerSpec, new: WorkerSpec) -> None:
    """Have a memory on disk go along from a node that is gone to one that is new. Nobody may have it open."""
    if old.agent.memory == new.agent.memory == "disk":
        _move(_file(old), _file(new))


def bring_forward(specs: Iterable[WorkerSpec]) -> None:
    """Before the first worker starts: see to it that memories on disk are found, and tell of those that are not."""
    files: defaultdict[str, set[Path]] = defaultdict(set)
    for spec in specs:
        if spec.agent.memory == "disk":
            _move(memory_file(spec.state_dir, spec.name), _file(spec))  # as they were called once
            files[spec.agent.name].add(_file(spec))
    for agent, own in files.items():
        begin = sorted(file.name for file in own if not file.exists())
        others = sorted(file.name for file in memory_files(next(iter(own)).parent.parent, agent) - own)
        if begin and others:
            _log.info("memory_begins", agent=agent, files=begin, others=others, do=_DO)


def _file(spec: WorkerSpec) -> Path:
    return memory_file(spec.state_dir, memory_name(*place_of(spec)))


def _move(old: Path, new: Path) -> None:
    try:
        if move_memory(old, new):
            _log.info("memory_renamed", file=str(old), to=str(new))
    except OSError as exc:
        _log.error("memory_not_renamed", file=str(old), to=str(new), error=str(exc))
