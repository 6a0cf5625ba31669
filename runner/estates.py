"""Memories follow their node: a reload that gives a worker another node's place has it take over what is there.

A memory belongs to an agent at a node. Workers are named by a node's place in the list, so when that changes, what one
worker leaves is another's to go on with. Where a node is replaced by one that is new, what was remembered at the one
goes to the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import anyio
import msgspec

from shared.config import WorkerSpec
from shared.logs import get_logger
from shared.memory_files import memory_file, memory_files, memory_name, move_memory
from shared.nodes import NodeAddress

_log: Final = get_logger("supervisor")
_DO: Final = "to go on with the memory of a node that the agent has no more, stop the runner and rename that file"


class Estate:
    """What is remembered at a node, on its way from the worker that had the node to the one that has it now."""

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._left = anyio.Event()

    def leave(self, memory: bytes | None) -> None:
        """Have the heir go on. Only the first to say so counts; on disk, nothing is to be handed over."""
        if not self._left.is_set():
            self._memory = memory
            self._left.set()

    async def inherit(self) -> bytes | None:
        """Wait until it is left, and return it."""
        await self._left.wait()
        return self._memory


class Passing(msgspec.Struct, frozen=True):
    """What a worker whose node changes leaves to another one, and what it gets from one; None where there is none."""

    leaves: Estate | None = None
    inherits: Estate | None = None

    def __bool__(self) -> bool:
        return self.leaves is not None or self.inherits is not None

    def give_up(self) -> None:
        """Leave nothing, unless something has been left."""
        if self.leaves is not None:
            self.leaves.leave(None)


Place = tuple[str, NodeAddress]


def place_of(spec: WorkerSpec) -> Place:
    """Return whose memory a worker has: an agent's at a node."""
    return spec.agent.name, spec.node


def passings(before: Iterable[WorkerSpec], after: Iterable[WorkerSpec]) -> dict[str, Passing]:
    """Return, by the workers' names, what passes between them when they come to have other nodes."""
    had, has = {place_of(spec): spec.name for spec in before}, {place_of(spec): spec.name for spec in after}
    moving = {place: Estate() for place in had if place in has and has[place] != had[place]}
    leaves = {had[place]: estate for place, estate in moving.items()}
    inherits = {has[place]: estate for place, estate in moving.items()}
    return {name: Passing(leaves.get(name), inherits.get(name)) for name in {*leaves, *inherits}}


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
