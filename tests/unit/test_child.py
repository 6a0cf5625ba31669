"""`runner.child`: what is counted of a worker while one process follows another."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from runner.child import Child
from runner.restarts import RestartPolicy
from shared.config import WorkerSpec
from shared.ipc import Counters, Launch, Outcome
from tests.unit.test_incarnation import Process, Router, incarnation

pytestmark = pytest.mark.anyio


class EndedProcess(Process):
    """A process whose status arrives later than the news of its end."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.told = anyio.Event(), anyio.Event()

    async def how(self) -> str:
        self.asked.set()
        await self.told.wait()
        return "killed by SIGKILL"

    def release(self) -> None:
        pass


class ChildsRouter(Router):
    def drop(self, launch: Launch, why: str) -> None:
        pass


async def test_what_a_process_counted_is_never_missing_while_its_end_is_looked_into() -> None:
    router: Any = ChildsRouter()
    process = EndedProcess()
    current = incarnation(router, process)
    spec: WorkerSpec = current.launch.spec
    child = Child(spec, RestartPolicy(), None, router)  # type: ignore[arg-type]
    current.counters = Counters()
    current.counters.http[Outcome.OK] = 5
    child.current = current
    assert child.counted.queries_http == 5
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child.bury, current)
        await process.asked.wait()
        assert child.counted.queries_http == 5
        process.told.set()
    assert child.counted.queries_http == 5
