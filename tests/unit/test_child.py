"""`runner.child`: what is counted of a worker while one process follows another."""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel
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


class Forked(EndedProcess):
    """A process that the child has had forked, and whether it was let go of."""

    def __init__(self) -> None:
        super().__init__()
        self.told.set()
        self.released = False

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def release(self) -> None:
        self.released = True


class ForkServer:
    def __init__(self) -> None:
        self.forked: list[Forked] = []

    async def spawn(self, launch: Launch) -> Forked:
        self.forked.append(Forked())
        return self.forked[-1]


class WholeRouter(ChildsRouter):
    endpoint = ""

    def expect(self, launch: Launch, listener: Any) -> None:
        pass

    def drain(self, launch: Launch, *, hand_over: bool) -> bool:
        return False

    def retire(self, name: str) -> None:
        pass

    def endings_of(self, name: str) -> dict[Any, int]:
        return {}


async def test_successor_that_ends_together_with_its_worker_is_let_go_of() -> None:
    router: Any = WholeRouter()
    server: Any = ForkServer()
    child = Child(incarnation(router, Process()).launch.spec, RestartPolicy(), server, router)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.run)
            await anyio.wait_all_tasks_blocked()
            assert child.current is not None
            child.current.ask_for_successor("a limit is reached")
            await anyio.wait_all_tasks_blocked()
            first, second = server.forked
            for process in server.forked:
                process.told = anyio.Event()  # the news of an end comes sooner than how it was
            tasks.start_soon(child.drain, 1.0)
            try:
                with anyio.move_on_after(2):
                    await first.asked.wait()
                    await second.asked.wait()
                first.told.set()
                await anyio.wait_all_tasks_blocked()  # the worker is over
            finally:
                for process in server.forked:
                    process.told.set()
    assert [process.released for process in server.forked] == [True, True]


async def test_worker_whose_process_is_replaced_is_never_said_to_have_none() -> None:
    router: Any = WholeRouter()
    child = Child(incarnation(router, Process()).launch.spec, RestartPolicy(), ForkServer(), router)  # type: ignore[arg-type]
    old, new = incarnation(router, process := EndedProcess()), incarnation(router, Forked())
    child.current, old.successor = old, new
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child.bury, old)
        await process.asked.wait()
        process.told.set()
        assert child.current is new
        assert child.row.state == new.state
