"""`runner.supervision._lineage`: a worker's counters while one process follows another."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from runner.supervision._lineage import Lineage
from shared.ipc import Counters, Outcome
from tests.unit.runner.supervision.processes import SPEC, ForkServer, Process, Router, incarnation

pytestmark = pytest.mark.anyio


def lineage(router: Any) -> Lineage:
    server: Any = ForkServer()
    return Lineage(SPEC, server, router)


async def test_counters_of_a_process_stay_included_while_it_is_reaped() -> None:
    processes = lineage(router := Router())
    current = incarnation(router, process := Process())
    process.reported = anyio.Event()
    current.counters = Counters()
    current.counters.direct_answers[Outcome.OK] = 5
    processes.current = current
    assert processes.counted.answered_direct == 5
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(processes.reap, current)
        await process.awaited.wait()
        assert processes.counted.answered_direct == 5
        process.reported.set()
    assert processes.counted.answered_direct == 5


async def test_successor_is_current_while_its_predecessor_is_reaped() -> None:
    processes = lineage(router := Router())
    old, new = incarnation(router, process := Process()), incarnation(router, Process())
    process.reported = anyio.Event()
    processes.current, old.successor = old, new
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(processes.reap, old)
        await process.awaited.wait()
        process.reported.set()
        assert processes.current is new
