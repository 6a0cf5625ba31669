"""Every step in the pages works, and every command prints what its page shows."""

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

from shared.config.load import load
from shared.config.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
    check_keys,
    read_section,
)
from tests.docs.markdown import PAGES, ROOT, Block, blocks, own_text
from tests.docs.reader import BIN, reading

SECTIONS = {
    "runner": RunnerSection,
    "connection": ConnectionSection,
    "supervision": SupervisionSection,
}
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


def has_steps(page: Path) -> bool:
    return any(block.language == "console" or block.file for block in blocks(page))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.message_text
@pytest.mark.parametrize("page", [*filter(has_steps, PAGES)], ids=name)
def test_steps_of_a_page_work_as_shown(page: Path, home: Path) -> None:
    assert (BIN / "em-runner").exists(), "em-runner is not installed beside this Python"
    with reading(home) as reader:
        for block in blocks(page):
            reader.take(block)
            if block.file is not None and block.language == "toml":
                config = load(reader.written(block.file), environ={})
                assert config.agents, block.where
    not_run = [command for block in blocks(page) if block.not_run for command in block.commands]
    in_page = re.findall(r"^\$ ", own_text(page), re.MULTILINE)
    assert len(reader.ran) + len(not_run) == len(in_page), "a command was skipped"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_valid_in_its_language(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.where
        check(block, tmp_path)


def check(block: Block, folder: Path) -> None:
    """Parse a block with the program that would read it."""
    match block.language:
        case "console":
            assert block.commands, block.where
        case "toml" if block.file is None:
            check_fragment(block, folder)
        case "python":
            compile(block.text, block.where, "exec")
            assert block.file is not None, f"{block.where}: the first line does not name the file"
        case "json":
            json.loads(block.text)
        case "yaml":
            assert yaml.safe_load(block.text), block.where
            if "scrape_configs" in block.text:
                check_prometheus_config(block.text, folder)
        case "ini":
            configparser.ConfigParser(interpolation=None).read_string(block.text)
            if "[em_disco]" in block.text:
                check_emergence_conf(block, folder)


def check_prometheus_config(text: str, folder: Path) -> None:
    if shutil.which("promtool") is None:
        return
    file = folder / "prometheus.yml"
    file.write_text(text)
    command = ["promtool", "check", "config", "--syntax-only", file]
    subprocess.run(command, check=True, capture_output=True)


def check_emergence_conf(block: Block, folder: Path) -> None:
    """Load a configuration whose agent gets its nodes from the block."""
    conf = folder / "emergence.conf"
    conf.write_text(block.text)
    file = folder / "em-runner.toml"
    file.write_text(AGENT.replace("nodes", "# nodes"))
    (folder / "agents.py").touch()
    config = load(file, environ={}, emergence_conf=conf)
    assert config.agents[0].nodes, block.where


AGENT = '[[agent]]\nname = "shout"\nhandler = "agents.py:handle"\nnodes = ["localhost:8080"]\n'


def check_fragment(block: Block, folder: Path) -> None:
    """Load a part of a configuration, and check its keys.

    An agent and the files that the part mentions are added.
    """
    text = block.text if "[[agent]]" in block.text else block.text + AGENT
    for system in ("/etc/em-runner", "/var/lib/em-runner"):
        text = text.replace(system, str(folder))
    for path in re.findall(r'^\w+_file = "(.+)"', text, re.MULTILINE):
        secret = folder / path
        secret.write_text("a-secret-of-more-than-thirty-two-bytes")
        secret.chmod(0o600)
    for handler in re.findall(r'^handler = "(\w+\.py):', text, re.MULTILINE):
        (folder / handler).touch()
    file = folder / "em-runner.toml"
    file.write_text(text)
    file.chmod(0o600)
    assert load(file, environ={}, emergence_conf=folder / "none").agents, block.where
    table: dict[str, Any] = tomllib.loads(block.text)
    assert table, block.where
    check_keys(table, (*SECTIONS, "agent"), block.where)
    for section, struct in SECTIONS.items():
        if section in table:
            read_section(table[section], struct, f"{block.where} {section}")
    for agent in table.get("agent", ()):
        read_section(
            {"name": "x", "handler": "x:y"} | agent,
            AgentSection,
            f"{block.where} agent",
            also_known=ConnectionSection.__struct_fields__,
        )


OPT = "/opt/em-runner"
ETC = "/etc/em-runner"
SOURCES = "/usr/local/src/em-runner"
COPY_THE_UNIT = f"cp {SOURCES}/deploy/em-runner.service /etc/systemd/system/"
AS_THE_SERVICE = "runuser -u em-runner --"
INSTALL_AS_THE_SERVICE = "install -m 600 -o em-runner -g em-runner"
SECRETS = "em-runner.toml http.token disco.secret"

NOT_RUN: dict[str, list[str]] = {
    "it asks a package index": ["pip install pytest", "pip install pytest"],
    "it needs a reverse proxy": ["nginx"],
    "it needs another machine": ["ssh -L 9600:127.0.0.1:9600 agents.example.com"],
    "it needs systemd, and the unit installed": [
        "systemd-analyze security em-runner",
        "systemd-analyze verify /etc/systemd/system/em-runner.service",
    ],
    "it needs root": [
        f"git clone URL {SOURCES}",
        f"python3 -m venv {OPT}-0.1.0/.venv",
        f"{OPT}-0.1.0/.venv/bin/pip install -c {SOURCES}/constraints.txt {SOURCES}",
        f"ln -sfn em-runner-0.1.0 {OPT}",
        "useradd --system --home-dir /var/lib/em-runner --shell /usr/sbin/nologin em-runner",
        f"install -d {ETC}",
        f"{INSTALL_AS_THE_SERVICE} {SECRETS} {ETC}/",
        f"{AS_THE_SERVICE} {OPT}/.venv/bin/em-runner check -c {ETC}/em-runner.toml",
        COPY_THE_UNIT,
        "systemctl daemon-reload",
        "systemctl enable --now em-runner",
        f"git -C {SOURCES} pull",
        f"python3 -m venv {OPT}-0.2.0/.venv",
        f"{OPT}-0.2.0/.venv/bin/pip install -c {SOURCES}/constraints.txt {SOURCES}",
        f"{AS_THE_SERVICE} {OPT}-0.2.0/.venv/bin/em-runner check -c {ETC}/em-runner.toml",
        COPY_THE_UNIT,
        "systemctl daemon-reload",
        f"ln -sfn em-runner-0.2.0 {OPT}",
        "systemctl restart em-runner",
        f"{OPT}/.venv/bin/em-runner status --state-dir /var/lib/em-runner",
        f'{OPT}/.venv/bin/em-runner query "hello" --url http://127.0.0.1:9600',
    ],
    "it needs the network": ["git clone URL em-runner"],
    "these commands take minutes": [
        "scripts/docs.sh                      # builds the documentation",
        "scripts/test.sh                      # ruff, mypy, pytest",
        "scripts/test.sh tests/examples -x    # only pytest, with these arguments",
        "scripts/soak.sh 15                   # 15 minutes of load, kills and cut connections",
        "scripts/bench.sh --quick             # performance, compared with alternatives; "
        "without --quick, half an hour",
    ],
}
"""The commands that no test can run, by the reason that their page gives."""


def test_commands_that_are_not_run_are_known() -> None:
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.not_run is not None:
                assert len(block.not_run) > 8, f"{block.where}: the reason is missing"
                commands = [command.text for command in block.commands] or [block.language]
                found.setdefault(block.not_run, []).extend(commands)
    assert sorted(found) == sorted(NOT_RUN)
    for reason, commands in found.items():
        assert sorted(commands) == sorted(NOT_RUN[reason]), reason
