"""`runner.supervision._incarnation`: a silent process is killed, unless the runner was delayed."""

from __future__ import annotations

import time

import anyio
import anyio.lowlevel
import pytest

from runner.supervision._incarnation import Incarnation
from runner.supervision.restarts import Failure
from shared import ipc
from shared.ipc import Counters, Status
from tests.unit.runner.supervision.processes import Process, Router, incarnation

pytestmark = pytest.mark.anyio

LIVENESS_S = 0.2


def report(worker: Incarnation, state: ipc.WorkerState) -> None:
    worker.on_message(Status(state, "", Counters()))


async def failure_of_a_silent_worker() -> Failure:
    worker = incarnation(Router(), Process())
    report(worker, "ready")
    with anyio.fail_after(60):
        await worker.watch_until_ended(60, LIVENESS_S)
    assert worker.failure is not None
    return worker.failure


async def test_silent_worker_is_killed_and_the_reason_is_kept() -> None:
    assert (await failure_of_a_silent_worker()).kind == "silent"


@pytest.mark.message_text
async def test_message_for_a_silent_worker_gives_the_time() -> None:
    assert (await failure_of_a_silent_worker()).reason == "it sent nothing for 200 ms"


async def test_worker_that_sends_is_not_killed() -> None:
    router, process = Router(), Process()
    router.alive = True
    worker = incarnation(router, process)
    report(worker, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.watch_until_ended, 60, LIVENESS_S)
        with anyio.fail_after(60):
            while router.reads < 8:  # noqa: ASYNC110 - a read sets no event
                await anyio.sleep(0.01)
        process.kill()
    assert worker.failure is None


async def test_blocked_event_loop_resets_the_liveness_timer() -> None:
    router, process = Router(), Process()
    router.alive = True
    worker = incarnation(router, process)
    report(worker, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.watch_until_ended, 60, LIVENESS_S)
        with anyio.fail_after(60):
            while router.reads < 1:  # noqa: ASYNC110 - as above
                await anyio.sleep(0.001)
        router.alive = False
        before = router.resets
        time.sleep(3 * LIVENESS_S)  # noqa: ASYNC251 - blocks the loop
        with anyio.fail_after(60):
            while router.reads < 2:  # noqa: ASYNC110 - as above
                await anyio.sleep(0.001)
        assert router.resets == before + 1
        assert worker.failure is None, "the runner caused the delay"
        router.alive = True
        process.kill()


async def test_silence_after_a_reset_is_counted_again() -> None:
    router, process = Router(), Process()
    worker = incarnation(router, process)
    report(worker, "ready")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.watch_until_ended, 60, LIVENESS_S)
        await anyio.lowlevel.checkpoint()
        time.sleep(2 * LIVENESS_S)  # noqa: ASYNC251 - as above
    assert worker.failure is not None
    assert worker.failure.kind == "silent"


async def test_worker_that_does_not_start_is_killed_despite_heartbeats() -> None:
    router, process = Router(), Process()
    router.alive = True
    worker = incarnation(router, process)
    with anyio.fail_after(60):
        await worker.watch_until_ended(0.05, LIVENESS_S)
    assert worker.failure is not None
    assert worker.failure.kind == "not_up"


async def test_worker_needs_no_heartbeats_while_it_imports_its_handler() -> None:
    router, process = Router(), Process()
    worker = incarnation(router, process)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.watch_until_ended, 60, 0.02)
        await anyio.sleep(0.1)
        assert router.reads == 0
        process.kill()
    assert worker.failure is None
