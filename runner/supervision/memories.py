"""Moves agents' memories when processes are replaced and nodes change.

A memory belongs to an agent at a node. On disk it is a file named after both, which the worker of
that node opens as soon as no other process has it open. In `ram` a process sends it to its
successor at the same node. If a new node takes the place of an old one, a memory of either kind
moves to the new node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from shared.config.load import WorkerSpec
from shared.ipc import Handover, Launch
from shared.logs.logger import get_logger
from shared.memory_files import SIDE_FILES, memory_file, memory_name

_log: Final = get_logger()


def hand_over(
    old: Launch,
    after: WorkerSpec,
    handover: Handover | None,
    *,
    moves: bool,
) -> bytes | None:
    """Move the memory of a process that has ended to its successor.

    Args:
        old: the process that has ended.
        after: the successor's spec.
        handover: what the old process sent.
        moves: whether the memory moves to another node.

    Returns:
        What to send to the successor; None if it starts from its file, or with an empty memory.
    """
    before = old.spec
    if moves:
        move_file(before, after)
    if {before.agent.memory, after.agent.memory} != {"ram"}:
        return None
    if handover is None:
        reason = "the old process sent no memory"
    elif moves or before.node == after.node or handover.memory is None:
        # None if the old process could not pickle its memory. It has logged that itself.
        return handover.memory
    else:
        reason = "the memory belongs to the worker's former node"
    _log.error(
        "memory_not_handed_over",
        reason=f"{reason}; the agent starts with an empty memory",
        **old.log_context,
    )
    return None


def move_file(before: WorkerSpec, after: WorkerSpec) -> None:
    """Rename a memory on disk for another node. No process may have it open.

    An existing memory of that node is kept, and used instead.
    """
    if not before.agent.memory == after.agent.memory == "disk":
        return
    old = _file(before)
    new = _file(after)
    if new.exists() or not old.exists():
        return
    try:
        # The database comes last, because the runner may be killed between two renames. A database
        # without its write-ahead file opens as an older state of itself, and no one would notice.
        # A write-ahead file without its database is an error that the worker logs
        # (`memory_moved_aside`).
        for suffix in (*SIDE_FILES, ""):
            source = old.with_name(old.name + suffix)
            with suppress(FileNotFoundError):
                source.rename(new.with_name(new.name + suffix))
    except OSError as exc:
        _log.error(
            "memory_not_renamed",
            file=str(old),
            to=str(new),
            error=str(exc),
        )
    else:
        _log.info("memory_renamed", file=str(old), to=str(new))


def report_unused_memories(specs: Iterable[WorkerSpec]) -> None:
    """Log which agents start with an empty memory on disk although files of other nodes exist."""
    files: defaultdict[str, set[Path]] = defaultdict(set)
    for spec in specs:
        if spec.agent.memory == "disk":
            files[spec.agent.name].add(_file(spec))
    for agent, own in files.items():
        new = [file for file in own if not file.exists()]
        folder = next(iter(own)).parent
        existing = set(folder.glob(f"{agent}@*.sqlite"))
        unused = existing - own
        if new and unused:
            _log.info(
                "memory_starts_empty",
                agent=agent,
                files=_names(new),
                others=_names(unused),
                hint="to use the memory of a former node, stop the runner and rename its file",
            )


def _file(spec: WorkerSpec) -> Path:
    return memory_file(spec.runner.state_dir, memory_name(spec.agent.name, spec.node))


def _names(files: Iterable[Path]) -> list[str]:
    return sorted(file.name for file in files)
