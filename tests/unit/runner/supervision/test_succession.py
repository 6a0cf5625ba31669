"""`runner.supervision._succession`: which process is replaced, and the spec of its successor."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from runner.supervision._lineage import Lineage
from runner.supervision._succession import Replacement, Succession
from runner.supervision.restarts import Failure
from shared.config.nodes import parse_node
from shared.errors import StartError
from shared.ipc import Counters, Status
from tests.unit.runner.supervision.processes import SPEC, ForkServer, Process, Router, incarnation

pytestmark = pytest.mark.anyio

ELSEWHERE = msgspec.structs.replace(SPEC, node=parse_node("elsewhere"))


class Worker:
    """A worker's processes and their replacements."""

    def __init__(self) -> None:
        self.server: Any = ForkServer()
        self.router: Any = Router()
        self.lineage = Lineage(SPEC, self.server, self.router)
        self.succession = Succession(self.lineage, self.router)

    def run(self) -> None:
        self.lineage.current = incarnation(self.router, Process())

    def stand_by(self) -> None:
        newest = self.lineage.incarnation_count
        self.lineage.on_report(newest, Status("standby", "", Counters()))


async def test_worker_without_a_process_adopts_the_spec_and_restarts_now() -> None:
    worker = Worker()
    assert await worker.succession.replace(Replacement("configuration", "", ELSEWHERE)) is None
    assert worker.lineage.spec is ELSEWHERE
    assert worker.lineage.restart_now.is_set()
    assert not worker.server.forked


async def test_only_the_given_process_is_replaced() -> None:
    worker = Worker()
    worker.run()
    other = incarnation(worker.router, Process())
    assert await worker.succession.replace(Replacement("limit", "", instead_of=other)) is None
    assert not worker.server.forked


async def test_failed_start_of_a_successor_leaves_the_old_process_running() -> None:
    worker = Worker()
    worker.run()
    old = worker.lineage.current

    async def refuse(launch: Any) -> None:
        raise StartError("no memory")

    worker.server.spawn = refuse
    failure = await worker.succession.replace(Replacement("configuration", "", ELSEWHERE))
    assert failure == Failure("not_started", "no memory")
    assert worker.lineage.current is old
    assert worker.lineage.spec is SPEC


async def test_internal_error_of_a_replacement_reaches_no_caller() -> None:
    worker = Worker()
    worker.run()
    old = worker.lineage.current

    async def break_down(launch: Any) -> None:
        raise TypeError

    worker.server.spawn = break_down
    by_reload = await worker.succession.replace(Replacement("configuration", "", ELSEWHERE))
    worker.lineage.handler_version += 1  # so that the process is stale
    by_watcher = await worker.succession.replace_for_handler("its handler changed")
    assert by_reload is not None
    assert by_watcher is not None
    assert by_reload.kind == by_watcher.kind == "unknown"
    assert worker.lineage.current is old


@pytest.mark.parametrize("moves", [False, True])
async def test_restart_uses_the_new_node_unless_memory_must_move_first(
    moves: bool,
) -> None:
    worker = Worker()
    worker.run()
    replacement = Replacement("configuration", "", ELSEWHERE, moves_memory=moves)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.succession.replace, replacement)
        await anyio.wait_all_tasks_blocked()
        worker.run()  # the old process died and was restarted
        worker.stand_by()
        await anyio.wait_all_tasks_blocked()
        assert len(worker.server.forked) == 2, "the replacement is tried again"
        assert worker.lineage.spec is (SPEC if moves else ELSEWHERE)
        tasks.cancel_scope.cancel()
