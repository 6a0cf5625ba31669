"""`shared.memory_files`: the names of memories on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.config.nodes import parse_node
from shared.memory_files import SIDE_FILES, memory_file, memory_name


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


def test_longest_hosts_have_distinct_and_valid_file_names(tmp_path: Path) -> None:
    hosts = [".".join(["x" * 63, "y" * 63, "z" * 60, last * 50]) for last in "ab"]
    names = {memory_name("a" * 64, parse_node(f"{host}:65535")) for host in hosts}
    assert len(names) == 2
    for name in names:
        file = memory_file(tmp_path, name)
        file.parent.mkdir(exist_ok=True)
        for suffix in SIDE_FILES:
            file.with_name(file.name + suffix).touch()
