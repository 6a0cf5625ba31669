"""em-runner.example.toml: it runs as it is, and nothing is missing from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from shared.config import load
from shared.schema import AgentSection, ConnectionSection, RunnerSection, SupervisionSection, read_section
from tests.examples.harness import ROOT

FILE = ROOT / "em-runner.example.toml"
SECTIONS = {
    "runner": RunnerSection,
    "connection": ConnectionSection,
    "supervision": SupervisionSection,
    "agent": AgentSection,
}


def test_check_accepts_the_example(tmp_path):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("EM_")}
    done = subprocess.run(
        [sys.executable, "-m", "runner", "check", "-c", FILE],
        cwd=tmp_path,
        env={**ours, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "echo_server" in done.stdout


@pytest.mark.parametrize("name", SECTIONS)
def test_the_example_has_every_key(name):
    # A key of [connection] may stand in an [[agent]] too; it is explained once.
    expected = set(SECTIONS[name].__struct_fields__)
    if name == "agent":
        expected -= set(ConnectionSection.__struct_fields__)
    assert expected <= keys_of(name)


@pytest.mark.parametrize("name", ["runner", "connection", "supervision"])
def test_what_the_example_sets_is_the_default(name):
    written = tomllib.loads(FILE.read_text())[name]
    assert read_section(written, SECTIONS[name], name) == SECTIONS[name]()


def test_what_the_example_comments_out_is_valid_too(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("http.token", "ca.pem", "echo.jwt", "disco.secret"):
        (tmp_path / name).write_text("x" * 32)
    # One of the keys that exclude each other, and all else.
    alternatives = ("http_token = ", "jwt_secret_file", "jwt_token = ")
    lines = [line for line in uncommented() if not line.startswith(alternatives)]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    config = load(tmp_path / "all.toml", environ={}, emergence_conf=tmp_path / "none.conf")
    assert [agent.name for agent in config.agents] == ["echo", "counter", "http_api", "html_links"]
    assert config.http_token is not None


def uncommented() -> list[str]:
    """The file's lines, with what is TOML in its comments brought to life."""
    return [re.sub(r"^# (?=\w+ = |\[\[)", "", line) for line in FILE.read_text().splitlines()]


def keys_of(section: str) -> set[str]:
    """The keys that stand below a section's heading, commented out or not."""
    found: dict[str, set[str]] = {}
    heading = ""
    for line in uncommented():
        if match := re.match(r"\[+(\w+)\]", line):
            heading = match[1]
        elif match := re.match(r"(\w+) = ", line):
            found.setdefault(heading, set()).add(match[1])
    return found[section]
