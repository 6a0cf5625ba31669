"""The fixture `run_agent`, which pytest finds wherever em-runner is installed.

pytest imports this in every project that shares the environment, also where that has a `worker` or `shared` of its own:
nothing of em-runner's is imported before a test asks for the fixture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from worker.pytest_plugin import RunAgent

PACKAGES: Final = ("worker", "shared", "disco")


@pytest.fixture
def run_agent(request: pytest.FixtureRequest) -> Iterator[RunAgent]:
    """Run handlers at embedded nodes until the end of the test: `agent = run_agent("agents.py:handle")`.

    Files and modules are looked for beside the test's own file; a memory on disk is in the test's `tmp_path`, for each
    agent its own.
    """
    for name in PACKAGES:
        if (found := _taken_by(name)) is not None:
            pytest.fail(
                f"run_agent needs em-runner's own package {name!r}, but Python finds {found} by that name; "
                "rename that, or run these tests from a folder where it is not found",
                pytrace=False,
            )
    from worker.pytest_plugin import agents_of

    yield from agents_of(request)


def _taken_by(name: str) -> str | None:
    """Return what Python finds in the place of a package of em-runner's, which lies beside this file."""
    ours = Path(__file__).resolve().parent / name / "__init__.py"
    if name in sys.modules:
        found = getattr(sys.modules[name], "__file__", None)
    else:
        spec = find_spec(name)
        found = None if spec is None else spec.origin
    return None if found is not None and Path(found).resolve() == ours else found or "nothing"
