"""Rules for all modules: which modules each may import, and what no module may do."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import re
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("em_runner", "runner", "worker", "shared", "disco")
MAY_IMPORT = {
    "em_runner": {"em_runner", "worker", "shared", "disco"},
    "runner": {"runner", "shared", "disco"},
    "worker": {"worker", "shared"},
    "disco": {"disco", "shared"},
    "shared": {"shared"},
}
ENTRY_POINTS = "worker.entry"
"""The only module of a worker that the runner imports."""

DOCUMENTED = {"asyncio._enter_task", "asyncio._leave_task", "os._exit"}
"""Private names that Python's documentation describes."""


class Import(NamedTuple):
    """One import statement, at any place in a file."""

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
            # from . import x
            if node.level:
                folder = file.relative_to(ROOT).parts[: -node.level]
                module = ".".join(filter(None, [*folder, module]))
            yield Import(where, module, tuple(sorted(alias.name for alias in node.names)))
        elif isinstance(node, ast.Call) and dynamic(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(where, name.value, ())


def dynamic(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__", "find_spec")


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_the_packages_it_may(package: str) -> None:
    found = [one for file in files(package) for one in imports(file)]
    assert len(found) > 20, "the files of the package were found"
    crossing = [
        one for one in found if one.package in PACKAGES and one.package not in MAY_IMPORT[package]
    ]
    assert [one for one in crossing if (package, one.module) != ("runner", ENTRY_POINTS)] == []


def test_runner_imports_only_the_workers_entry_points() -> None:
    crossing = [one for file in files("runner") for one in imports(file) if one.package == "worker"]
    assert {one.module for one in crossing} == {ENTRY_POINTS}


@pytest.mark.parametrize("package", PACKAGES)
def test_private_module_is_imported_only_within_its_folder(package: str) -> None:
    found = [
        f"{one.file}: {module}"
        for file in files(package)
        for one in imports(file)
        for module in (one.module, *(f"{one.module}.{name}" for name in one.names))
        if one.package in PACKAGES
        and is_private(module.rpartition(".")[2])
        and module.rpartition(".")[0] != folder_of(one.file)
    ]
    assert found == []


def test_only_the_loader_of_handlers_imports_a_module_by_a_variable_name() -> None:
    pattern = re.compile(r"\b(import_module|__import__|exec_module|run_module|run_path)\((?!\")")
    found = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in files(package)
        if pattern.search(file.read_text())
    }
    assert found == {"worker/dispatching/handler.py"}


def folder_of(file: str) -> str:
    return ".".join(Path(file).with_suffix("").parts[:-1])


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_test_tools_import_pytest(package: str) -> None:
    found = {one.package for file in files(package) for one in imports(file)}
    assert "tests" not in found
    assert ("pytest" in found) == (package == "em_runner")


@pytest.mark.parametrize(
    "folder", [*PACKAGES, "tests", "benchmarks", "scripts", "docs", "examples"]
)
def test_no_file_uses_a_private_name_of_a_dependency(folder: str) -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files(folder)
        for name in private_names(file)
    }
    assert found == set()


def private_names(file: Path) -> Iterator[str]:
    """Yield the private names of libraries that a file imports, or uses from an imported module."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    for one in imports(file):
        if one.package in (*PACKAGES, "tests"):
            modules.discard(one.package)
            continue
        if is_private(*one.module.split("."), *one.names):
            yield f"{one.module} {' '.join(one.names)}"
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Attribute) or root_of(node) not in modules:
            continue
        if is_private(node.attr) and ast.unparse(node) not in DOCUMENTED:
            yield ast.unparse(node)


def is_private(*names: str) -> bool:
    return any(name.startswith("_") and not name.startswith("__") for name in names)


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


ENDS_ITS_PROCESS = {"runner.__main__", "worker.preload", "worker.preload_tracing"}
"""Modules that a test must not import, because they start a program or change the process."""

DOCUMENTED_ATTRIBUTES = {"_value_", "_asdict", "_make", "_replace", "_fields", "_field_defaults"}
"""Private names of enums and named tuples that Python's documentation describes."""


@pytest.mark.parametrize("package", PACKAGES)
def test_no_class_uses_a_private_name_of_a_foreign_base(package: str) -> None:
    found = set()
    for file in files(package):
        if name(file) in ENDS_ITS_PROCESS:
            continue
        module = import_quietly(name(file))
        for node in ast.walk(ast.parse(file.read_text())):
            one = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else None
            if inspect.isclass(one):
                used = private_names_of_self(node)
                found |= {f"{module.__name__}: {each}" for each in used & inherited_names(one)}
    assert found == set()


def import_quietly(module: str) -> ModuleType:
    # The libraries that it imports may warn of each other: their versions are not those that are
    # pinned when the lowest allowed versions are tested.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def private_names_of_self(node: ast.ClassDef) -> set[str]:
    """Return the private names that a class defines, or uses as attributes."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {each.name for each in ast.walk(node) if isinstance(each, defined)}
    names |= {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
    return {each for each in names - DOCUMENTED_ATTRIBUTES if is_private(each)}


def inherited_names(one: type) -> set[str]:
    """Return the names that the bases of a class from elsewhere define or assign."""
    found: set[str] = set()
    for base in one.__mro__[1:]:
        # A private name belongs to its folder.
        folder = base.__module__.rpartition(".")[0]
        if base.__module__ == "builtins" or folder == one.__module__.rpartition(".")[0]:
            continue
        found |= vars(base).keys()
        with contextlib.suppress(OSError, TypeError):  # a class written in C has no source
            found |= set(re.findall(r"\bself\.(_\w+)", inspect.getsource(base)))
    return found


def test_private_names_of_a_foreign_base_are_found() -> None:
    source = "class Own(Base):\n def read(self):\n  return self._secret"
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)

    class Base(threading.Thread):
        pass

    assert private_names_of_self(node) == {"_secret"}
    assert {"_target", "_bootstrap"} <= inherited_names(Base)


def test_modules_have_no_import_cycle() -> None:
    # Imports under TYPE_CHECKING and in functions count: they hide a cycle, but do not remove it.
    modules = {name(file): file for package in PACKAGES for file in files(package)}
    dependencies = {
        module: {target for one in imports(file) for target in targets(one, modules)} - {module}
        for module, file in modules.items()
    }
    assert sum(map(len, dependencies.values())) > 200, "the imports were found"
    in_a_cycle = [
        module for module in modules if module in reached_from(dependencies[module], dependencies)
    ]
    assert in_a_cycle == []


def name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def targets(one: Import, modules: dict[str, Path]) -> set[str]:
    """Return the modules that an import statement loads.

    An import of a module from its package does not count as an import of the package: each module
    would be in a cycle with its own package.
    """
    found = {f"{one.module}.{each}" for each in one.names} & modules.keys()
    return found or {one.module} & modules.keys()


def reached_from(start: set[str], dependencies: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    remaining = list(start)
    while remaining:
        module = remaining.pop()
        if module not in reached:
            reached.add(module)
            remaining += dependencies[module]
    return reached


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_docstring(package: str) -> None:
    modules = {file: ast.parse(file.read_text()) for file in files(package)}
    assert [str(file) for file, module in modules.items() if not ast.get_docstring(module)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_import_only_defines_names(package: str) -> None:
    found = [
        f"{name(file)}: {ast.unparse(node)}"
        for file in files(package)
        if name(file) not in ENDS_ITS_PROCESS
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
    ]
    assert found == []


def test_only_listed_modules_use_the_wall_clock() -> None:
    """A jump of the wall clock must not change a timeout.

    Only tokens, and what people read (names, headers, the time of an error), may use it.
    """
    pattern = re.compile(r"\btime\.time\(|datetime\.(now|utcnow)\(|time\.(gmtime|localtime)\(")
    found = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in files(package)
        if pattern.search(file.read_text(encoding="utf-8"))
    }
    assert found <= {
        "shared/config/tokens.py",
        "shared/ipc.py",
        "runner/table.py",
        "disco/_registry.py",
        "disco/_session.py",
    }


# An idiom of earlier texts of this project, over which readers stumbled.
IDIOM = (
    r"told|mend(s|ed)?|anew|afresh|once more|in good order|whoever|nobody|somebody|time-outs?",
    r"to be had|cannot be had|(how|where) (it|they) stands?|at the (most|least)|the begin",
    r"(for|after|of) so (many|long)|of (ours|our own|their own)|where there is one|if there is any",
    # At the end of a clause, "leaves" means that a process exits or a client disconnects.
    r"orderly|(agent|worker|process|client|node|runner)s? (leaves?|left)(?=[.,;:\")]|$)",
    # An error response, not "an answer that is none". `None` and "there is none" are fine.
    r"(?-i:(?<![Tt]here )(is|are) none)",
    # The subject first, not "Watched are the files".
    r"(?-i:[A-Z][a-z]+[^e]ed (is|are))",
)
TEXTS = ("*.py", "*.md", "*.toml", "*.sh", "*.js", "*.css", "*.html", "*.yml", "*.service")
FOLDERS = (*PACKAGES, "tests", "docs", "deploy", "scripts", "examples", "benchmarks")


@pytest.mark.parametrize("folder", [".", *FOLDERS])
def test_texts_are_free_of_the_old_idiom(folder: str) -> None:
    pattern = re.compile(rf"\b({'|'.join(IDIOM)})\b", re.IGNORECASE)
    found = []
    for kind in TEXTS:
        for file in (ROOT / folder).glob(kind if folder == "." else f"**/{kind}"):
            if file == Path(__file__):
                continue
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
