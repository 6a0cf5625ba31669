"""The reference says what the sources say: no more, and nothing is missing."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from runner import client
from runner.dashboard.routes import MAX_STREAMS
from runner.restarts import RestartPolicy
from runner.table import ChildState
from shared import errors
from shared.http_connection import HttpLimits
from shared.schema import AgentSection, ConnectionSection, RunnerSection, SupervisionSection, meanings
from tests.docs.markdown import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated

REFERENCE = ROOT / "docs" / "reference"
OURS = ("runner", "worker", "shared", "disco")
LEVELS = ("debug", "info", "warning", "error")

# Calls that have an event logged under the name that they are given, by file: what is called, and which argument it is.
HANDED_ON = {
    ("runner/child.py", "say"): 0,
    ("worker/connection.py", "_on_state"): 0,
    ("worker/main.py", "_tell"): 0,
    ("worker/output.py", "_tell"): 0,
    ("disco/journal.py", "_write"): 2,
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


def words_of(page: str) -> str:
    """A page of docs/ in one line."""
    return " ".join((ROOT / "docs" / page).read_text().split())


def sources() -> Iterator[tuple[str, ast.AST]]:
    for package in OURS:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                yield str(file.relative_to(ROOT)), node


def test_every_state_is_explained() -> None:
    assert column("states.md", "state") == list(get_args(ChildState))


def events(file: str, call: ast.Call, within: ast.AST) -> set[str]:
    """The events that a call logs, or has logged; `within` is the function that it stands in."""
    called = call.func.body if isinstance(call.func, ast.IfExp) else call.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    number = 0 if isinstance(called, ast.Attribute) and name in LEVELS else HANDED_ON.get((file, name))
    return set() if number is None or len(call.args) <= number else texts(call.args[number], within)


def texts(value: ast.expr, within: ast.AST) -> set[str]:
    """What an expression can be: itself, or what the function has assigned to it or compares it with."""
    match value:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp():
            return texts(value.body, within) | texts(value.orelse, within)
        case ast.BinOp(op=ast.Add()):
            return {a + b for a in texts(value.left, within) for b in texts(value.right, within)}
        case ast.Tuple():
            return {text for each in value.elts for text in texts(each, within)}
        case ast.Name() | ast.Attribute():
            named = ast.unparse(value)
            found: set[str] = set()
            for node in ast.walk(within):
                if isinstance(node, ast.Assign) and named in map(ast.unparse, node.targets):
                    found |= texts(node.value, ast.Pass())
                elif isinstance(node, ast.Compare) and ast.unparse(node.left) == named:
                    found |= {text for each in node.comparators for text in texts(each, ast.Pass())}
            return found
    return set()


def test_every_log_event_is_explained_and_each_that_is_explained_exists() -> None:
    logged = {
        event
        for file, function in sources()
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for event in events(file, call, function)
    }
    assert {"worker_restarting", "reload_refused", "ready", "standby", "printed", "agent_gone"} <= logged
    assert set(column("log-events.md", "event")) == logged


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


def test_key_that_takes_its_value_from_elsewhere_says_from_where() -> None:
    defaults = {row.split(" | ")[0]: row.split(" | ")[2] for row in generated.section("agent").splitlines()}
    assert defaults["| `handler_timeout_ms`"] == "that of `[supervision]`"
    assert defaults["| `nodes`"].endswith("else `localhost:8080`")
    assert defaults["| `capabilities`"] == "those that the handler names, else none"
    assert "none" not in defaults.values()


def test_restarts_are_told_with_the_times_that_they_have() -> None:
    policy = RestartPolicy()
    first, longest = f"{policy.first_delay_s * 1000:.0f} ms", f"{policy.max_delay_s:g} s"
    supervision = words_of("explanation/supervision.md")
    assert f"the next ones wait {first}, then twice as long each time, up to {longest}." in supervision
    assert f"A worker that was up for {policy.stable_s:g} s or longer" in supervision
    for page in ("explanation/supervision.md", "../README.md", "reference/states.md"):
        assert f"tried again after {policy.retry_s:g} s" in words_of(page), page
    for page in ("../README.md", "reference/states.md"):
        assert f"{first}, doubling up to {longest}" in words_of(page), page


def test_limits_of_connections_are_those_of_the_server() -> None:
    limits, page = HttpLimits(), words_of("reference/http.md")
    for told in (
        f"idle after an answer | closed after {limits.idle_timeout_s:g} s |",
        f"nothing was asked yet | closed after {limits.header_timeout_s:g} s |",
        f"reads nothing of its answer | cut after {limits.write_timeout_s:g} s |",
        f"in time ({limits.header_timeout_s:g} s, {limits.body_timeout_s:g} s) | 408 |",
        f"beyond {limits.max_connections}, ",
        f"answers of {limits.max_unsent_bytes >> 20} MB in all",
        f"at most {MAX_STREAMS} at once",
        f"more than {MAX_STREAMS} streams",
        f"a head of more than {limits.max_header_bytes >> 10} KiB or {limits.max_headers} headers",
    ):
        assert told in page, told


def test_every_generated_part_is_in_a_page() -> None:
    marked = [name for page in PAGES for name in generated.MARK.findall(page.read_text())]
    assert sorted(marked) == sorted(generated.PARTS)


def test_every_exit_status_is_explained() -> None:
    told = set(column("exit-statuses.md", "status"))
    assert {str(value) for name, value in vars(errors).items() if name.startswith("EXIT_")} <= told


def test_refused_query_ends_as_it_is_told() -> None:
    assert {client.exit_status(status) for status in (401, 403, 504)} == {errors.EXIT_FAILED}
    assert (
        "| `query` | 1 | there is no runner, what answers is none, it refuses (401, 403), or no answer in time |"
        in words_of("reference/exit-statuses.md")
    )


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
