"""The fixture `run_agent`, which pytest finds wherever em-runner is installed.

pytest imports this in every project that shares the environment. Nothing else of em-runner is
imported before a test requests the fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from em_runner.testing import RunAgent


@pytest.fixture
def run_agent(request: pytest.FixtureRequest) -> Iterator[RunAgent]:
    """Run handlers at embedded nodes until the test ends: `run_agent("agents.py:handle")`.

    Files and modules are looked for in the folder of the test's file. Each memory on disk is in its
    own temporary folder.
    """
    from em_runner.testing import RunAgent

    with ExitStack() as running_agents:
        yield RunAgent(request, running_agents)
