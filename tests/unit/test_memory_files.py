"""`shared.memory_files`: what a memory on disk is called, and how it gets another name."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.memory_files import SIDE_FILES, memory_file, memory_files, memory_name, move_memory
from shared.nodes import parse_node


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("localhost:8080", "echo@localhost_8080"),
        ("wss://disco.example.com:443", "echo@disco.example.com_443"),
        ("[::1]:8080", "echo@___1__8080"),
    ],
)
def test_memory_is_named_by_agent_and_node(node: str, name: str) -> None:
    assert memory_name("echo", parse_node(node)) == name


def test_name_of_the_longest_host_is_a_files_name_and_no_other_hosts(tmp_path: Path) -> None:
    hosts = [".".join(["x" * 63, "y" * 63, "z" * 60, last * 50]) for last in "ab"]
    names = {memory_name("a" * 64, parse_node(f"{host}:65535")) for host in hosts}
    assert len(names) == 2
    for name in names:
        file = memory_file(tmp_path, name)
        file.parent.mkdir(exist_ok=True)
        for suffix in SIDE_FILES:
            file.with_name(file.name + suffix).touch()


def test_memory_moves_with_its_log_and_onto_no_other(tmp_path: Path) -> None:
    old, new, other = (memory_file(tmp_path, f"a@{node}") for node in ("old", "new", "other"))
    old.parent.mkdir()
    assert not move_memory(old, new), "there is none"
    for file in (old, old.with_name(f"{old.name}-wal"), other):
        file.write_text(file.name)
    assert not move_memory(old, other)
    assert other.read_text() == other.name
    assert move_memory(old, new)
    assert sorted(file.name for file in old.parent.iterdir()) == ["a@new.sqlite", "a@new.sqlite-wal", "a@other.sqlite"]
    assert memory_files(tmp_path, "a") == {new, other}
    assert memory_files(tmp_path, "b") == set()
