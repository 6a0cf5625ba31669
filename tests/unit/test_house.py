"""The import rules of DESIGN.md, and files that a reader sees whole on a few screens."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("runner", "worker", "shared", "disco")
MAY_IMPORT = {
    "runner": {"runner", "shared", "disco"},
    "worker": {"worker", "shared"},
    "disco": {"disco", "shared"},
    "shared": {"shared"},
}
ENTRY_POINT = ("runner/process.py", "worker.entry", ("probe", "run", "trial"))
FOR_USERS_TESTS = ("worker/testing.py", "disco")  # no worker imports that file
PYTEST_PLUGIN = ("worker/pytest_plugin.py", "pytest")  # nor that one
MAX_LINES = 450


class Import(NamedTuple):
    """One import statement, wherever in the file it stands."""

    file: str
    module: str
    names: tuple[str, ...]

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> Iterator[Import]:
    where = str(file.relative_to(ROOT))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(where, alias.name, ())
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # from . import x
                module = ".".join(filter(None, [*file.relative_to(ROOT).parts[: -node.level], module]))
            yield Import(where, module, tuple(sorted(alias.name for alias in node.names)))
        elif isinstance(node, ast.Call) and dynamic(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(where, name.value, ())


def dynamic(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__", "find_spec")


@pytest.mark.parametrize("package", OURS)
def test_package_imports_only_those_of_ours_that_it_may(package: str) -> None:
    found = [one for file in files(package) for one in imports(file)]
    assert len(found) > 20, "the package was walked"
    crossing = [one for one in found if one.package in OURS and one.package not in MAY_IMPORT[package]]
    assert [one for one in crossing if one != Import(*ENTRY_POINT) and (one.file, one.package) != FOR_USERS_TESTS] == []


def test_runner_names_the_worker_in_one_line_alone() -> None:
    crossing = [one for file in files("runner") for one in imports(file) if one.package == "worker"]
    assert crossing == [Import(*ENTRY_POINT)]


@pytest.mark.parametrize("package", OURS)
def test_package_imports_no_test(package: str) -> None:
    found = [one for file in files(package) for one in imports(file) if one.package in ("tests", "pytest")]
    assert [one for one in found if (one.file, one.package) != PYTEST_PLUGIN] == []


@pytest.mark.parametrize("package", OURS)
def test_no_file_is_too_long_to_be_seen_whole(package: str) -> None:
    long = {str(file.relative_to(ROOT)): lines for file in files(package) if (lines := count(file)) > MAX_LINES}
    assert long == {}


@pytest.mark.parametrize("package", OURS)
def test_every_module_says_what_lives_in_it(package: str) -> None:
    assert [str(file) for file in files(package) if not ast.get_docstring(ast.parse(file.read_text()))] == []


def count(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_no_time_out_depends_on_the_clock_on_the_wall() -> None:
    """A clock that jumps must change no deadline: only tokens, and what people read (names, headers, when
    an error was) may ask it."""
    asks = re.compile(r"\btime\.time\(|datetime\.(now|utcnow)\(|time\.(gmtime|localtime)\(")
    found = {
        str(file.relative_to(ROOT))
        for package in OURS
        for file in files(package)
        if asks.search(file.read_text(encoding="utf-8"))
    }
    assert found <= {"shared/tokens.py", "shared/ipc.py", "runner/table.py", "disco/registry.py", "disco/session.py"}
