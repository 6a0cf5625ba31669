"""Everything that the pages tell a reader to do, done: what they show is what is printed."""

from __future__ import annotations

import configparser
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import load
from shared.schema import AgentSection, ConnectionSection, RunnerSection, SupervisionSection, check_keys, read_section
from tests.docs.markdown import PAGES, ROOT, Block, blocks
from tests.docs.reader import BIN, reading

SECTIONS = {"runner": RunnerSection, "connection": ConnectionSection, "supervision": SupervisionSection}
LANGUAGES = {
    "console",
    "toml",
    "python",
    "json",
    "ini",
    "text",
    "nginx",
    "yaml",
    "erlang",
    "",
    "stop",
    "checkout",
    "{toctree}",
}
RUN = [page for page in PAGES if any(block.language == "console" or block.file for block in blocks(page))]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", RUN, ids=name)
def test_page_does_what_it_says(page: Path, home: Path) -> None:
    assert (BIN / "em-runner").exists(), "em-runner is installed beside this Python"
    with reading(home) as reader:
        for block in blocks(page):
            reader.take(block)
            if block.file is not None and block.language == "toml":
                assert load(reader.written(block.file), environ={}).agents, block.where
    left = [command for block in blocks(page) if block.not_run for command in block.commands_if_console]
    assert len(reader.ran) + len(left) == len(re.findall(r"^\$ ", page.read_text(), re.MULTILINE)), "all are run"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_something_that_can_be_checked(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where
        check(block)


def check(block: Block) -> None:
    """Read a block that no reader runs as what it is."""
    if block.language == "console":
        assert block.commands, block.where
    elif block.language == "toml" and block.file is None:
        check_fragment(block)
    elif block.language == "python":
        compile(block.text, block.where, "exec")
        assert block.file is not None, f"{block.where}: its first line names its file"
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text), block.where
    elif block.language == "ini":
        configparser.ConfigParser(interpolation=None).read_string(block.text)


def check_fragment(block: Block) -> None:
    """Check a piece of a configuration against the schema, as if the rest were there."""
    table: dict[str, Any] = tomllib.loads(block.text)
    assert table, block.where
    check_keys(table, (*SECTIONS, "agent"), block.where)
    for section, struct in SECTIONS.items():
        if section in table:
            read_section(table[section], struct, f"{block.where} {section}")
    for agent in table.get("agent", ()):
        read_section({"name": "x", "handler": "x:y"} | agent, AgentSection, f"{block.where} agent")


# What no test can do, and why: each stands here and in its page.
NOT_RUN: dict[str, list[str]] = {
    "it asks a package index": ["pip install pytest", "pip install pytest"],
    "it needs a reverse proxy": ["nginx"],
    "it needs another machine": ["ssh -L 9600:127.0.0.1:9600 agents.example.com"],
    "it needs systemd, and the unit installed": [
        "systemd-analyze security em-runner",
        "systemd-analyze verify /etc/systemd/system/em-runner.service",
    ],
    "it needs the network": ["git clone URL em-runner"],
    "they check, load and measure em-runner for minutes": [
        "scripts/docs.sh                      # builds the documentation",
        "scripts/test.sh                      # what CI runs: ruff, mypy, pytest",
        "scripts/test.sh tests/examples -x    # pytest alone, with these arguments",
        "scripts/soak.sh 15                   # a quarter of an hour of load, kills and cuts",
        "scripts/bench.sh --quick             # what it takes, beside others; without --quick, half an hour",
    ],
}


def test_what_is_not_run_is_known() -> None:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.not_run is not None:
                assert len(block.not_run) > 8, f"{block.where}: say why"
                said = [command.text for command in block.commands_if_console] or [block.language]
                found.setdefault(block.not_run, []).extend(said)
    assert {why: sorted(each) for why, each in found.items()} == {why: sorted(each) for why, each in NOT_RUN.items()}
