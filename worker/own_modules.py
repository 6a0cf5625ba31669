"""A folder's modules, to themselves while a test runs its handler: other folders have some of the same names.

A worker is a process of its own and imports one agent's modules. A user's tests are one process, and import them all.
"""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from shared.handlers import OUR_PACKAGES
from worker.handler import file_of

_TESTS: Final = re.compile(r"tests?|conftest|test_.*|.*_test")
_INSTALLED: Final = frozenset({"site-packages", "dist-packages"})
_PYTHONS: Final = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
_OURS: Final = tuple(Path(__file__).resolve().parents[1] / name for name in OUR_PACKAGES)


@contextmanager
def own_modules(folder: Path) -> Iterator[None]:
    """Have imports look in a folder first, as a worker's would; at the end all is as it was before.

    What was imported from there already stays: a test may have changed it for the handler. Another folder's module of
    a name that this one has too is set aside meanwhile, unless it is Python's, installed or em-runner's own.
    """
    home, entry, before = folder.resolve(), str(folder), dict(sys.modules)
    names = {file.stem for file in home.glob("*.py")} | {file.parent.name for file in home.glob("*/__init__.py")}
    names = {name for name in names if not _TESTS.fullmatch(name)}  # those that run are not to find others' instead
    aside = {name: module for name, module in before.items() if name in names and _is_another(module, home, name)}
    aside |= {name: module for name, module in before.items() if name.partition(".")[0] in aside}
    for name in aside:
        del sys.modules[name]
    importlib.invalidate_caches()  # its files may be as new as the test
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
        for name, module in list(sys.modules.items()):
            if before.get(name) is not module and _is_of(module, home):
                del sys.modules[name]
                aside |= {name: before[name]} if name in before else {}
        for name, module in aside.items():
            sys.modules.setdefault(name, module)


def _is_of(module: ModuleType, home: Path) -> bool:
    file = file_of(module)
    return file is not None and file.is_relative_to(home) and not _is_everybodys(file)


def _is_another(module: ModuleType, home: Path, name: str) -> bool:
    """Return whether a module is of a file that an import of that name from the folder would not find."""
    file, own = file_of(module), {(home / each).resolve() for each in (f"{name}.py", f"{name}/__init__.py")}
    return file is not None and file not in own and not _is_everybodys(file)


def _is_everybodys(file: Path) -> bool:
    return bool(_INSTALLED & set(file.parts)) or any(file.is_relative_to(folder) for folder in (*_PYTHONS, *_OURS))
