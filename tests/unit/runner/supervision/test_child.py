"""`runner.supervision._child`: when a process is restarted, and that none is left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from runner.supervision._child import Child
from runner.supervision.restarts import RestartPolicy
from shared.ipc import Counters, Status
from tests.unit.runner.supervision.processes import SPEC, ForkServer, Router

pytestmark = pytest.mark.anyio

POLICY = RestartPolicy(stable_s=1e-9, second_delay_s=60)
"""A worker that was up for any time is restarted at once, another one after a minute."""


@asynccontextmanager
async def running(router: Any, server: Any) -> AsyncIterator[Child]:
    child = Child(SPEC, POLICY, server, router)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.run)
            await anyio.wait_all_tasks_blocked()
            yield child
            child.kill()


async def test_delays_do_not_start_over_while_no_process_loads_its_handler() -> None:
    server = ForkServer()
    async with running(Router(), server) as child:
        for process in range(2):
            server.forked[process].kill()
            await anyio.wait_all_tasks_blocked()
        assert len(server.forked) == 2, "the second restart is immediate, too"
        assert child.row.state == "restarting"


async def test_delays_start_over_after_a_process_that_was_up() -> None:
    router, server = Router(), ForkServer()
    async with running(router, server) as child:
        for process in range(3):
            router.on_report(process + 1, Status("ready", "", Counters()))
            server.forked[process].kill()
            await anyio.wait_all_tasks_blocked()
        assert len(server.forked) == 4
        assert child.row.state == "starting"


async def test_successor_that_exits_with_its_worker_is_released() -> None:
    router: Any = Router()
    server: Any = ForkServer()
    child = Child(SPEC, RestartPolicy(), server, router)
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.run)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(child.replace_for_handler, "its handler changed")
            await anyio.wait_all_tasks_blocked()
            first, second = server.forked
            for process in server.forked:
                process.reported = anyio.Event()  # its exit is noticed before its status
            tasks.start_soon(child.drain, 1.0)
            try:
                with anyio.move_on_after(20):
                    await first.awaited.wait()
                    await second.awaited.wait()
                first.reported.set()
                await anyio.wait_all_tasks_blocked()  # the worker has exited
            finally:
                for process in server.forked:
                    process.reported.set()
    assert [process.released for process in server.forked] == [True, True]
