"""The reference says what the sources say: no more, and nothing is missing."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from runner.table import ChildState
from shared import errors
from shared.schema import AgentSection, ConnectionSection, RunnerSection, SupervisionSection, meanings
from tests.docs.markdown import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated

REFERENCE = ROOT / "docs" / "reference"
OURS = ("runner", "worker", "shared", "disco")
LEVELS = ("debug", "info", "warning", "error")

# Events whose name is put together, or handed on: where, and what they can be.
PUT_TOGETHER = {
    "worker_restarting": "runner/child.py",
    "worker_failed": "runner/child.py",
    "reloaded": "runner/reload.py",
    "reload_refused": "runner/reload.py",
    "reload_incomplete": "runner/reload.py",
    "printed": "worker/output.py",
    "ready": "worker/states.py",
    "backoff": "worker/states.py",
    "draining": "worker/states.py",
    "stopped": "worker/states.py",
    "starting": "runner/table.py",
    "agent_registered": "disco/journal.py",
    "agent_gone": "disco/journal.py",
    "agent_refused": "disco/journal.py",
}


def column(page: str, heading: str, number: int = 0) -> list[str]:
    """The codes in a column of the tables whose first heading is `heading`."""
    found: list[str] = []
    inside = False
    for line in (REFERENCE / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0].strip() == heading:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not set(line) <= set("|- "):
            found += re.findall(r"`([^`]+)`", cells[number]) or [cells[number].strip()]
    assert found, f"{page} has a table of {heading}"
    return found


def sources() -> Iterator[tuple[str, ast.AST]]:
    for package in OURS:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                yield str(file.relative_to(ROOT)), node


def test_every_state_is_explained() -> None:
    assert column("states.md", "state") == list(get_args(ChildState))


def test_every_log_event_is_explained_and_each_that_is_explained_exists() -> None:
    logged = {
        node.args[0].value
        for _, node in sources()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in LEVELS
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(logged) > 15
    assert set(column("log-events.md", "event")) == logged | set(PUT_TOGETHER)
    for event, file in PUT_TOGETHER.items():
        assert event.removeprefix("worker_") in (ROOT / file).read_text(), f"{file} has {event}"


def test_every_key_of_the_configuration_is_explained_once() -> None:
    for struct in (RunnerSection, ConnectionSection, SupervisionSection, AgentSection):
        told, keys = meanings(struct), set(struct.__struct_fields__)
        if struct is AgentSection:
            keys -= set(ConnectionSection.__struct_fields__)
        assert set(told) == keys
        assert all(meaning.endswith(".") for meaning in told.values())


def test_every_key_is_in_the_built_table_with_its_default() -> None:
    table = generated.section("supervision")
    assert "| `max_restarts` | a whole number from 0 to 1000 | `10` |" in table
    assert "| `name` | a string | required |" in generated.section("agent")
    assert '| `http` | a string | `"127.0.0.1:9600"` |' in generated.section("runner")


def test_every_generated_part_is_in_a_page() -> None:
    marked = [name for page in PAGES for name in generated.MARK.findall(page.read_text())]
    assert sorted(marked) == sorted(generated.PARTS)


def test_every_exit_status_is_explained() -> None:
    told = set(column("exit-statuses.md", "status"))
    assert {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")} <= told


def test_every_variable_of_ours_is_explained() -> None:
    named = {
        found
        for _, node in sources()
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in re.findall(r"\bEM_[A-Z_]+\b", node.value)
    }
    assert {"EM_DISCO_HOST", "EM_FILTER_JWT_TOKEN"} <= named
    told = {name for name in column("environment.md", "variable") if name.startswith("EM_")}
    assert told == named | {"EM_PYTHON"}


def test_every_metric_and_command_is_generated() -> None:
    table = generated.metrics_table()
    for name in set(re.findall(r'"(em_runner_\w+)"', (ROOT / "runner" / "metrics.py").read_text())):
        assert f"`{name}" in table
    text = generated.commands()
    for name in generated.command_names():
        assert f"Example: em-runner {name}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_only_keys_variables_and_commands_that_exist(page: Path) -> None:
    text = page.read_text()
    if "from-" not in page.name:  # those name what others have
        assert set(re.findall(r"\bEM_[A-Z]+_[A-Z_]+\b", text)) <= set(column("environment.md", "variable"))
    commands = {*generated.command_names()}
    assert {name for name in re.findall(r"(?:`|\$ )em-runner ([a-z]+)", text)} <= commands
    keys = {
        key
        for struct in (RunnerSection, ConnectionSection, SupervisionSection, AgentSection)
        for key in struct.__struct_fields__
    }
    if "from-" not in page.name:
        assert set(re.findall(r"`(?!em_runner_)(\w+_(?:ms|file|bytes|mb))`", text)) <= keys
