"""`runner.supervision.memories`: the file of a memory is renamed for another node."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from runner.supervision.memories import move_file
from shared.config.load import WorkerSpec
from shared.config.nodes import parse_node
from shared.config.schema import RunnerOptions
from shared.memory_files import memory_file
from tests.unit.runner.supervision.processes import AGENT, SPEC


def on_disk(node: str, state_dir: Path) -> tuple[WorkerSpec, Path]:
    """Return the spec of a worker with a memory on disk, and the memory's file."""
    agent = msgspec.structs.replace(AGENT, memory="disk")
    runner = RunnerOptions(state_dir=state_dir)
    spec = msgspec.structs.replace(SPEC, agent=agent, node=parse_node(node), runner=runner)
    return spec, memory_file(state_dir, f"a@{spec.node.authority.replace(':', '_')}")


class Files(NamedTuple):
    """Three memories on disk: one to move, its new place, and another one."""

    old: WorkerSpec
    new: WorkerSpec
    other: WorkerSpec
    folder: Path

    def content(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in self.folder.iterdir()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Write the files of the old and the other memory."""
    old, old_file = on_disk("old", tmp_path)
    new, _ = on_disk("new", tmp_path)
    other, other_file = on_disk("other", tmp_path)
    old_file.parent.mkdir()
    old_file.write_text("old")
    old_file.with_name(f"{old_file.name}-wal").write_text("old log")
    other_file.write_text("other")
    return Files(old, new, other, old_file.parent)


def test_memory_moves_with_its_write_ahead_log(files: Files) -> None:
    move_file(files.old, files.new)
    assert files.content() == {
        "a@new_443.sqlite": "old",
        "a@new_443.sqlite-wal": "old log",
        "a@other_443.sqlite": "other",
    }


def test_memory_replaces_no_other_one(files: Files) -> None:
    before = files.content()
    move_file(files.old, files.other)
    assert files.content() == before


def test_missing_memory_is_not_moved(files: Files) -> None:
    before = files.content()
    move_file(files.new, files.old)
    assert files.content() == before


def test_first_memory_of_an_agent_may_be_missing(tmp_path: Path) -> None:
    old, _ = on_disk("old", tmp_path)
    new, new_file = on_disk("new", tmp_path)
    move_file(old, new)
    assert not new_file.exists()
