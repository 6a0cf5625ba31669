"""Everything that the pages tell a reader to do, done: what they show is what is printed."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
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
def test_every_block_is_something_that_can_be_checked(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where
        check(block, tmp_path)


def check(block: Block, folder: Path) -> None:
    """Have whoever a block is for read it, where no reader runs it."""
    if block.language == "console":
        assert block.commands, block.where
    elif block.language == "toml" and block.file is None:
        check_fragment(block, folder)
    elif block.language == "python":
        compile(block.text, block.where, "exec")
        assert block.file is not None, f"{block.where}: its first line names its file"
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text), block.where
        if "scrape_configs" in block.text and shutil.which("promtool"):
            prometheus = folder / "prometheus.yml"
            prometheus.write_text(block.text)
            subprocess.run(
                ["promtool", "check", "config", "--syntax-only", prometheus], check=True, capture_output=True
            )
    elif block.language == "ini":
        configparser.ConfigParser(interpolation=None).read_string(block.text)
        if "[em_disco]" in block.text:
            conf = folder / "emergence.conf"
            conf.write_text(block.text)
            file = folder / "em-runner.toml"
            file.write_text(AGENT.replace("nodes", "# nodes"))
            (folder / "agents.py").touch()
            assert load(file, environ={}, emergence_conf=conf).agents[0].nodes, block.where


AGENT = '[[agent]]\nname = "shout"\nhandler = "agents.py:handle"\nnodes = ["localhost:8080"]\n'


def check_fragment(block: Block, folder: Path) -> None:
    """Load a piece of a configuration, with the rest that a reader has: an agent, and the files that it names."""
    whole = block.text if "[[agent]]" in block.text else block.text + AGENT
    for system in ("/etc/em-runner", "/var/lib/em-runner"):
        whole = whole.replace(system, str(folder))
    for named in re.findall(r'^\w+_file = "(.+)"', whole, re.MULTILINE):
        secret = folder / named
        secret.write_text("a-secret-of-more-than-thirty-two-bytes")
        secret.chmod(0o600)
    for handler in re.findall(r'^handler = "(\w+\.py):', whole, re.MULTILINE):
        (folder / handler).touch()
    file = folder / "em-runner.toml"
    file.write_text(whole)
    file.chmod(0o600)
    assert load(file, environ={}, emergence_conf=folder / "none").agents, block.where
    table: dict[str, Any] = tomllib.loads(block.text)
    assert table, block.where
    check_keys(table, (*SECTIONS, "agent"), block.where)
    for section, struct in SECTIONS.items():
        if section in table:
            read_section(table[section], struct, f"{block.where} {section}")
    for agent in table.get("agent", ()):
        read_section({"name": "x", "handler": "x:y"} | agent, AgentSection, f"{block.where} agent")


SOURCES = "/usr/local/src/em-runner"

# What no test can do, and why: each stands here and in its page.
NOT_RUN: dict[str, list[str]] = {
    "it asks a package index": ["pip install pytest", "pip install pytest"],
    "it needs a reverse proxy": ["nginx"],
    "it needs another machine": ["ssh -L 9600:127.0.0.1:9600 agents.example.com"],
    "it needs systemd, and the unit installed": [
        "systemd-analyze security em-runner",
        "systemd-analyze verify /etc/systemd/system/em-runner.service",
    ],
    "it needs root": [
        "git clone URL /usr/local/src/em-runner",
        "python3 -m venv /opt/em-runner-0.1.0/.venv",
        f"/opt/em-runner-0.1.0/.venv/bin/pip install -c {SOURCES}/constraints.txt {SOURCES}",
        "ln -sfn em-runner-0.1.0 /opt/em-runner",
        "useradd --system --home-dir /var/lib/em-runner --shell /usr/sbin/nologin em-runner",
        "install -d /etc/em-runner",
        "install -m 600 -o em-runner -g em-runner em-runner.toml http.token disco.secret /etc/em-runner/",
        "runuser -u em-runner -- /opt/em-runner/.venv/bin/em-runner check -c /etc/em-runner/em-runner.toml",
        "cp /usr/local/src/em-runner/deploy/em-runner.service /etc/systemd/system/",
        "systemctl daemon-reload",
        "systemctl enable --now em-runner",
        "git -C /usr/local/src/em-runner pull",
        "python3 -m venv /opt/em-runner-0.2.0/.venv",
        f"/opt/em-runner-0.2.0/.venv/bin/pip install -c {SOURCES}/constraints.txt {SOURCES}",
        "runuser -u em-runner -- /opt/em-runner-0.2.0/.venv/bin/em-runner check -c /etc/em-runner/em-runner.toml",
        "cp /usr/local/src/em-runner/deploy/em-runner.service /etc/systemd/system/",
        "systemctl daemon-reload",
        "ln -sfn em-runner-0.2.0 /opt/em-runner",
        "systemctl restart em-runner",
        "/opt/em-runner/.venv/bin/em-runner status --state-dir /var/lib/em-runner",
        '/opt/em-runner/.venv/bin/em-runner query "hello" --url http://127.0.0.1:9600',
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
