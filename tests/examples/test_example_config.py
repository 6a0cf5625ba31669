"""The file em-runner.example.toml is valid and has every key with its default."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from shared.config.load import load
from shared.config.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
    read_section,
)
from tests.examples.harness import ROOT

FILE = ROOT / "em-runner.example.toml"
SECTIONS = {
    "runner": RunnerSection,
    "connection": ConnectionSection,
    "supervision": SupervisionSection,
    "agent": AgentSection,
}


def test_check_accepts_the_example(tmp_path):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("EM_")}
    done = subprocess.run(
        [sys.executable, "-m", "runner", "check", "-c", FILE],
        cwd=tmp_path,
        env={**inherited, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "echo_server" in done.stdout


@pytest.mark.parametrize("name", SECTIONS)
def test_example_has_every_key(name):
    assert set(SECTIONS[name].__struct_fields__) <= keys_of(name)


@pytest.mark.parametrize("name", ["runner", "connection", "supervision"])
def test_values_in_the_example_are_the_defaults(name):
    values = tomllib.loads(FILE.read_text())[name]
    assert read_section(values, SECTIONS[name], name) == SECTIONS[name]()


def test_keys_that_the_example_comments_out_are_valid(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("http.token", "ca.pem", "echo.jwt", "disco.secret"):
        (tmp_path / name).write_text("x" * 32)
    # Of the keys that exclude each other, only one is kept.
    alternatives = ("http_token = ", "jwt_secret_file", "jwt_token = ")
    lines = [line for line in uncommented() if not line.startswith(alternatives)]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    config = load(tmp_path / "all.toml", environ={}, emergence_conf=tmp_path / "none.conf")
    assert [agent.name for agent in config.agents] == ["echo", "counter", "http_api", "html_links"]
    assert config.runner.http_token is not None


def uncommented() -> list[str]:
    """Return the file's lines, with the keys and tables in comments as TOML."""
    return [re.sub(r"^# (?=\w+ = |\[\[)", "", line) for line in FILE.read_text().splitlines()]


def keys_of(section: str) -> set[str]:
    """Return the keys of a section, including those in comments."""
    found: dict[str, set[str]] = {}
    heading = ""
    for line in uncommented():
        if match := re.match(r"\[+(\w+)\]", line):
            heading = match[1]
        elif match := re.match(r"(\w+) = ", line):
            found.setdefault(heading, set()).add(match[1])
    return found[section]
