"""`runner.reload`: a fault of em-runner's own at a reload is told, and ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from runner.reload import Reloader
from runner.state_dir import Reloaded
from shared.config import Agent, Config
from shared.handlers import HandlerRef
from shared.nodes import parse_node
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio


class Parts:
    """All that a reload has to do with; `fails` is what raises."""

    def __init__(self, fails: str, *, leaving: bool = False) -> None:
        self.fails = fails
        self.leaving = leaving
        self.told: list[Reloaded] = []
        self.heard = anyio.Event()

    def __getattr__(self, name: str) -> Any:
        def part(*_: Any, **__: Any) -> Any:
            if name == self.fails:
                raise ZeroDivisionError

        return part

    def tell_reload(self, outcome: Reloaded) -> None:
        self.told.append(outcome)
        self.heard.set()


async def outcome_of(parts: Any) -> Reloaded:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    config = Config(agents=(Agent(name="a", handler=handler, nodes=(parse_node("h"),)),))
    reloader = Reloader(lambda: config, config, parts, parts, parts, parts, parts, parts.make_room)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reloader.run)
        for _ in range(2):  # the second shows that the first has ended nothing
            parts.heard = anyio.Event()
            reloader.ask()
            with anyio.fail_after(5):
                await parts.heard.wait()
        tasks.cancel_scope.cancel()
    assert len(parts.told) == 2
    outcome: Reloaded = parts.told[-1]
    return outcome


@pytest.mark.parametrize(
    ("fails", "changed", "words"),
    [("make_room", False, "nothing was changed"), ("rename", True, "it is not known what was changed")],
)
async def test_fault_is_told_for_what_it_is_and_the_next_reload_is_done(fails: str, changed: bool, words: str) -> None:
    with capture_logs() as logs:
        outcome = await outcome_of(Parts(fails))
    assert (outcome.done, outcome.changed) == (False, changed)
    assert words in outcome.message
    assert "ZeroDivisionError" in outcome.message
    assert "reload_fault" in [line["event"] for line in logs]


async def test_runner_that_is_ending_reloads_nothing() -> None:
    with capture_logs():
        outcome = await outcome_of(Parts("rename", leaving=True))
    assert (outcome.done, outcome.changed) == (False, False)
    assert "the runner is ending" in outcome.message
