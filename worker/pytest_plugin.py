"""What the fixture `run_agent` does, and its type. For users' own tests; pytest finds it by `em_runner_pytest`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from shared.schema import MemoryKind

if TYPE_CHECKING:
    from worker.testing import AgentUnderTest, Handles


class RunAgent(Protocol):
    """What `run_agent` is; see `worker.testing.running` for the arguments."""

    def __call__(
        self,
        handler: str | Callable[..., Any] | type | Handles,
        *,
        memory: MemoryKind = "ram",
        folder: Path | None = None,
        state_dir: Path | None = None,
        timeout_s: float = 5.0,
        setup_timeout_s: float = 30.0,
    ) -> AgentUnderTest:
        """Run a handler at an embedded node until the end of the test."""


def agents_of(request: pytest.FixtureRequest) -> Iterator[RunAgent]:
    """Run handlers at embedded nodes until the end of the test that requests it."""
    from worker.testing import running

    numbers = count(1)
    with ExitStack() as agents:

        def run(
            handler: str | Callable[..., Any] | type | Handles,
            *,
            memory: MemoryKind = "ram",
            folder: Path | None = None,
            state_dir: Path | None = None,
            timeout_s: float = 5.0,
            setup_timeout_s: float = 30.0,
        ) -> AgentUnderTest:
            if memory == "disk" and state_dir is None:
                state_dir = request.getfixturevalue("tmp_path") / f"agent_{next(numbers)}"  # no two share a memory
            where = folder or request.path.parent
            agent = running(
                handler,
                memory=memory,
                folder=where,
                state_dir=state_dir,
                timeout_s=timeout_s,
                setup_timeout_s=setup_timeout_s,
            )
            return agents.enter_context(agent)

        yield run
