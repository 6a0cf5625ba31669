"""`runner.supervision._child`: a worker that has exited leaves no process behind."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from runner.supervision._child import Child
from runner.supervision.restarts import RestartPolicy
from tests.unit.runner.supervision.processes import SPEC, ForkServer, Router

pytestmark = pytest.mark.anyio


async def test_successor_that_exits_with_its_worker_is_released() -> None:
    router: Any = Router()
    server: Any = ForkServer()
    child = Child(SPEC, RestartPolicy(), server, router)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.run)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(child.renew, "its handler changed")
            await anyio.wait_all_tasks_blocked()
            first, second = server.forked
            for process in server.forked:
                process.reported = anyio.Event()  # its exit is noticed before its status
            tasks.start_soon(child.drain, 1.0)
            try:
                with anyio.move_on_after(2):
                    await first.awaited.wait()
                    await second.awaited.wait()
                first.reported.set()
                await anyio.wait_all_tasks_blocked()  # the worker has exited
            finally:
                for process in server.forked:
                    process.reported.set()
    assert [process.released for process in server.forked] == [True, True]
