"""The reference matches the sources: it is complete, and has nothing that does not exist."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from runner.commands import client
from runner.supervision.restarts import RestartPolicy
from runner.table import ChildState
from runner.web.dashboard.routes import MAX_STREAMS
from shared import errors
from shared.config.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
)
from shared.http.errors import ErrorCode
from shared.http.limits import HttpLimits
from tests.docs.markdown import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated
import parts

REFERENCE = ROOT / "docs" / "reference"
SECTIONS = (RunnerSection, ConnectionSection, SupervisionSection, AgentSection)
PACKAGES = ("runner", "worker", "shared", "disco")
LEVELS = ("debug", "info", "warning", "error")

# Functions that log an argument as an event, by file: the position of the argument.
LOGS_ARGUMENT = {
    ("worker/node/client.py", "_on_state"): 0,
    ("worker/node/_connection.py", "_on_state"): 0,
    ("worker/main.py", "_report_state"): 0,
    ("worker/output.py", "_log"): 0,
    ("disco/_log.py", "_write"): 1,
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def column(page: str, heading: str, number: int = 0) -> list[str]:
    """Return the codes in a column of the tables whose first column has this heading."""
    found: list[str] = []
    inside = False
    for line in (REFERENCE / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        is_ruler = set(line) <= set("|- ")
        if cells[0] == heading:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not is_ruler:
            found += re.findall(r"`([^`]+)`", cells[number]) or [cells[number]]
    assert found, f"{page} has no table with the heading {heading}"
    return found


def one_line(page: str) -> str:
    """Return the text of a page in `docs/`, without line breaks."""
    return " ".join((ROOT / "docs" / page).read_text().split())


def nodes_of_sources() -> Iterator[tuple[str, ast.AST]]:
    """Yield every node of the sources' syntax trees, with its file."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                yield str(file.relative_to(ROOT)), node


def test_every_state_is_explained() -> None:
    assert column("states.md", "state") == list(get_args(ChildState))


def logged_by(file: str, call: ast.Call, function: ast.AST) -> set[str]:
    """Return the events that a call in a function logs."""
    called = call.func.body if isinstance(call.func, ast.IfExp) else call.func
    if isinstance(called, ast.Attribute):
        name = called.attr
        position = 0 if name in LEVELS else LOGS_ARGUMENT.get((file, name))
    else:
        name = getattr(called, "id", "")
        position = LOGS_ARGUMENT.get((file, name))
    if position is None or position >= len(call.args):
        return set()
    return values(call.args[position], function)


def values(expression: ast.expr, function: ast.AST) -> set[str]:
    """Return the texts that an expression can have.

    A variable has those that the function assigns to it or compares it with.
    """
    match expression:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return values(body, function) | values(orelse, function)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            starts, ends = values(left, function), values(right, function)
            return {start + end for start in starts for end in ends}
        case ast.Tuple(elts=elements):
            return {text for each in elements for text in values(each, function)}
        case ast.Name() | ast.Attribute():
            variable = ast.unparse(expression)
            return {
                text
                for node in ast.walk(function)
                for each in related(node, variable)
                for text in values(each, NO_FUNCTION)
            }
    return set()


NO_FUNCTION = ast.Pass()


def related(node: ast.AST, variable: str) -> list[ast.expr]:
    """Return the expressions that a node assigns to a variable or compares it with."""
    if isinstance(node, ast.Assign) and variable in map(ast.unparse, node.targets):
        return [node.value]
    if isinstance(node, ast.Compare) and ast.unparse(node.left) == variable:
        return node.comparators
    return []


def test_reference_has_exactly_the_log_events_of_the_sources() -> None:
    logged = {
        event
        for file, function in nodes_of_sources()
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for event in logged_by(file, call, function)
    }
    # One event of each way to log.
    assert {
        "worker_restarting",
        "reload_refused",
        "ready",
        "standby",
        "printed",
        "agent_gone",
    } <= logged
    assert set(column("log-events.md", "event")) == logged


@pytest.mark.parametrize("struct", SECTIONS)
def test_every_key_of_the_configuration_is_explained(struct: Any) -> None:
    explained = generated.meanings(struct)
    assert set(explained) == set(struct.__struct_fields__)
    assert all(meaning.endswith(".") for meaning in explained.values())


@pytest.mark.message_text
def test_every_key_is_in_the_built_table_with_its_default() -> None:
    table = generated.section("supervision")
    assert "| `max_restarts` | a whole number from 0 to 1000 | `10` |" in table
    assert "| `name` | a string | required |" in generated.section("agent")
    assert '| `http` | a string | `"127.0.0.1:9600"` |' in generated.section("runner")


def test_default_from_another_section_or_the_handler_names_its_origin() -> None:
    rows = [row.split(" | ") for row in generated.section("agent").splitlines()]
    defaults = {row[0]: row[2] for row in rows}
    assert defaults["| `handler_timeout_ms`"] == "that of `[supervision]`"
    assert defaults["| `nodes`"].endswith("else `localhost:8080`")
    assert defaults["| `capabilities`"] == "those that the handler names, else none"
    assert "none" not in defaults.values()


def test_pages_give_the_delays_of_the_restart_policy() -> None:
    policy = RestartPolicy()
    second, longest = f"{policy.second_delay_s * 1000:.0f} ms", f"{policy.max_delay_s:g} s"
    assert f"up for at least {policy.stable_s:g} s" in one_line("explanation/supervision.md")
    for page in ("explanation/supervision.md", "../README.md", "reference/states.md"):
        text = one_line(page)
        assert f"tried again after {policy.retry_s:g} s" in text, page
        assert f"waits {second}, " in text, page
        assert f"each later one twice as long, up to {longest}" in text, page


def test_reference_gives_the_limits_of_the_http_server() -> None:
    limits, page = HttpLimits(), one_line("reference/http.md")
    for text in (
        f"is idle after an answer | closes it after {limits.idle_timeout_s:g} s |",
        f"sends no request | closes it after {limits.header_timeout_s:g} s |",
        f"does not read its answer | closes the connection after {limits.write_timeout_s:g} s |",
        f"a head that does not arrive within {limits.header_timeout_s:g} s, "
        f"or a body within {limits.body_timeout_s:g} s | 408 |",
        f"there are {limits.max_connections} connections, ",
        f"more than {limits.max_unsent_bytes >> 20} MB in total",
        f"at most {MAX_STREAMS} at once",
        f"more than {MAX_STREAMS} streams",
        f"a head of more than {limits.max_header_bytes >> 10} KiB or {limits.max_headers} headers",
    ):
        assert text in page, text


def test_every_error_code_is_explained_with_its_status() -> None:
    text = (REFERENCE / "http.md").read_text()
    explained = re.findall(r"\| (\d+) \| `(\w+)` \|", text)
    assert sorted(explained) == sorted((str(code.status), code) for code in ErrorCode)


def test_every_generated_part_is_in_one_page() -> None:
    included = [name for page in PAGES for name in parts.names(page.read_text())]
    assert sorted(included) == sorted(generated.PARTS)


@pytest.mark.message_text
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_generated_and_included_parts_are_current(page: Path) -> None:
    text = page.read_text()
    assert parts.current(text, page) == text, "run scripts/docs.sh"


@pytest.mark.parametrize(
    "text",
    [
        "<!-- generated: commands -->\n",
        "<!-- /generated -->\n",
        "<!-- generated: commands -->\n<!-- /included -->\n",
        "<!-- generated: no-such-part -->\n<!-- /generated -->\n",
        '<!-- included: ../README.md, from "## No such heading" -->\n<!-- /included -->\n',
    ],
)
def test_invalid_mark_of_a_part_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"part|mark|line"):
        parts.current(text, ROOT / "docs" / "index.md")


@pytest.mark.message_text
def test_outdated_part_is_replaced() -> None:
    page = REFERENCE / "metrics.md"
    text = page.read_text()
    outdated = text.replace("| `em_runner_queries_total` |", "| `em_runner_wrong` |")
    assert outdated != text
    assert parts.current(outdated, page) == text


def test_every_exit_status_is_explained() -> None:
    statuses = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert statuses
    assert set(map(str, statuses)) <= set(column("exit-statuses.md", "status"))


def test_exit_status_of_a_refused_query_is_as_documented() -> None:
    assert {client.exit_status(status) for status in (401, 403, 504)} == {errors.EXIT_FAILED}
    assert (
        "| `query` | 1 | no runner is running, or another program answers; "
        "the runner refuses the request (401, 403), or does not answer in time |"
    ) in one_line("reference/exit-statuses.md")


def test_reference_has_exactly_the_environment_variables_of_the_sources() -> None:
    used = {
        variable
        for _, node in nodes_of_sources()
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for variable in re.findall(r"\bEM_[A-Z_]+\b", node.value)
    }
    assert {"EM_DISCO_HOST", "EM_FILTER_JWT_TOKEN"} <= used
    in_scripts = {"EM_PYTHON"}
    variables = column("environment.md", "variable")
    explained = {name for name in variables if name.startswith("EM_")}
    assert explained == used | in_scripts


def test_every_metric_is_in_the_generated_table() -> None:
    source = (ROOT / "runner" / "web" / "metrics.py").read_text()
    names = set(re.findall(r"['\"](em_runner_\w+)['\"]", source))
    assert names
    table = generated.metrics_table()
    assert {name for name in names if f"`{name}" not in table} == set()


def test_every_command_is_generated_with_its_example() -> None:
    text = generated.commands()
    for name in generated.command_names():
        assert f"Example: em-runner {name}" in text


# The pages `from-*.md` also name the variables and keys of other programs.
OWN_PAGES = [page for page in PAGES if "from-" not in page.name]


@pytest.mark.parametrize("page", OWN_PAGES, ids=name_of)
def test_every_variable_in_a_page_exists(page: Path) -> None:
    variables = re.findall(r"\bEM_[A-Z]+_[A-Z_]+\b", page.read_text())
    assert set(variables) <= set(column("environment.md", "variable"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_in_a_page_exists(page: Path) -> None:
    commands = re.findall(r"(?:`|\$ )em-runner ([a-z]+)", page.read_text())
    assert set(commands) <= set(generated.command_names())


@pytest.mark.parametrize("page", OWN_PAGES, ids=name_of)
def test_every_configuration_key_in_a_page_exists(page: Path) -> None:
    keys = re.findall(r"`(?!em_runner_)(\w+_(?:ms|file|bytes|mb))`", page.read_text())
    known = {key for struct in SECTIONS for key in struct.__struct_fields__}
    assert set(keys) <= known
