"""`runner.incarnation`: who is silent for too long is ended, unless it was the runner that did not listen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from runner.incarnation import Incarnation
from shared import ipc
from shared.config import Agent, HandlerRef, WorkerSpec
from shared.ipc import Counters, Launch, Status
from shared.nodes import parse_node

pytestmark = pytest.mark.anyio

LIVENESS_S = 0.2


class Process:
    """A process that ends when it is killed, and says when that was."""

    pid = 1

    def __init__(self) -> None:
        self._ended = anyio.Event()

    def kill(self) -> None:
        self._ended.set()

    async def ended(self) -> None:
        await self._ended.wait()

    async def how(self) -> str:
        return "killed by SIGKILL"


class Router:
    """Hears a worker, or not; its own delays are those of the loop that it runs on."""

    def __init__(self) -> None:
        self.heard_s = time.monotonic()
        self.looks = 0
        self.pardons = 0
        self.alive = False

    def silent_for_s(self, launch: Launch) -> float:
        self.looks += 1
        if self.alive:
            self.heard_s = time.monotonic()
        return time.monotonic() - self.heard_s

    def pardon(self, launch: Launch) -> None:
        self.pardons += 1
        self.heard_s = time.monotonic()


def incarnation(router: Any, process: Any) -> Incarnation:
    agent = Agent(name="a", handler=HandlerRef("worker.echo", None, "handle", Path("/")), nodes=(parse_node("h"),))
    spec = WorkerSpec(name="a_server", agent=agent, node=agent.nodes[0], index=1)
    return Incarnation(Launch(spec=spec, incarnation=1, endpoint="", key=b""), process, router)


def say(found: Incarnation, state: ipc.WorkerState) -> None:
    found.hear(Status(state, "", Counters()))


async def test_silent_worker_is_ended_and_why_is_kept() -> None:
    router, process = Router(), Process()
    found = incarnation(router, process)
    say(found, "ready")
    with anyio.fail_after(5):
        await found.ended(60, LIVENESS_S)
    assert found.failure == "nothing was heard of it for 200 ms"


async def test_worker_that_is_heard_is_left_alone() -> None:
    router, process = Router(), Process()
    router.alive = True
    found = incarnation(router, process)
    say(found, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.ended, 60, LIVENESS_S)
        with anyio.fail_after(5):
            while router.looks < 8:  # noqa: ASYNC110 - there is no event for a look
                await anyio.sleep(0.01)
        process.kill()
    assert found.failure == ""


async def test_runner_that_was_held_up_pardons_what_it_did_not_hear() -> None:
    router, process = Router(), Process()
    router.alive = True
    found = incarnation(router, process)
    say(found, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.ended, 60, LIVENESS_S)
        with anyio.fail_after(5):
            while router.looks < 1:  # noqa: ASYNC110 - as above
                await anyio.sleep(0.001)
        router.alive = False
        before = router.pardons
        time.sleep(3 * LIVENESS_S)  # noqa: ASYNC251 - the loop is held up, and the worker silent meanwhile
        with anyio.fail_after(5):
            while router.looks < 2:  # noqa: ASYNC110 - as above
                await anyio.sleep(0.001)
        assert router.pardons == before + 1
        assert found.failure == "", "it was the runner's own delay"
        router.alive = True
        process.kill()


async def test_silence_after_a_pardon_counts_again() -> None:
    router, process = Router(), Process()
    found = incarnation(router, process)
    say(found, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.ended, 60, LIVENESS_S)
        await anyio.lowlevel.checkpoint()
        time.sleep(2 * LIVENESS_S)  # noqa: ASYNC251 - as above
    assert "nothing was heard" in found.failure


async def test_worker_that_does_not_come_up_is_ended_whatever_its_heartbeats() -> None:
    router, process = Router(), Process()
    router.alive = True
    found = incarnation(router, process)
    with anyio.fail_after(5):
        await found.ended(0.05, LIVENESS_S)
    assert "not up within" in found.failure


async def test_worker_that_imports_its_handler_is_not_held_to_its_heartbeats() -> None:
    router, process = Router(), Process()
    found = incarnation(router, process)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.ended, 60, 0.02)
        await anyio.sleep(0.1)
        assert router.looks == 0
        process.kill()
    assert found.failure == ""
