"""`runner.service_manager`: what systemd is told, and when."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from runner import service_manager
from runner.service_manager import ServiceManager
from tests.unit.test_status import row

pytestmark = pytest.mark.anyio


@pytest.fixture
def line(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "notify"))
        line.setblocking(False)
        yield line


def environ(line: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": line.getsockname(), "OTHER": "kept", **more}


def heard(line: socket.socket) -> list[str]:
    lines = []
    while True:
        try:
            lines += line.recv(4096).decode().split("\n")
        except BlockingIOError:
            return lines


async def hear(line: socket.socket, what: str, count: int = 1) -> list[str]:
    lines: list[str] = []
    with anyio.fail_after(5):
        while lines.count(what) < count:
            lines += heard(line)
            await anyio.sleep(0.001)
    return lines


async def test_ready_is_told_once_every_agent_is_up_or_has_tried(
    line: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "LOOK_S", 0.001)
    rows = [row("a_server"), row("b_server", "connecting", agent="b"), row("b_server_2", "starting", agent="b")]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(environ(line)).report, lambda: rows)
        assert "READY=1" not in await hear(line, "STATUS=1 of 3 workers ready")
        rows[1] = row("b_server", "backoff", agent="b")
        await anyio.sleep(0.02)
        assert heard(line) == [], "its other worker has not tried"
        rows[1] = row("b_server", "connecting", agent="b")  # again: it has tried
        rows[2] = row("b_server_2", "failed", agent="b")
        await hear(line, "READY=1")
        tasks.cancel_scope.cancel()


async def test_one_ready_worker_is_enough_for_its_agent(line: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        rows = [row("a_server"), row("a_server_2", "connecting")]
        tasks.start_soon(ServiceManager(environ(line)).report, lambda: rows)
        await hear(line, "READY=1")
        tasks.cancel_scope.cancel()


async def test_watchdog_is_fed_twice_in_its_time(line: socket.socket) -> None:
    found = environ(line, WATCHDOG_USEC="20000", WATCHDOG_PID=str(os.getpid()))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(found).report, lambda: [row()])
        began_s = anyio.current_time()
        await hear(line, "WATCHDOG=1", 11)
        assert anyio.current_time() - began_s >= 10 * 0.01 * 0.9, "and not more often"
        tasks.cancel_scope.cancel()
    assert found == {"OTHER": "kept"}, "none of it is for a worker"


async def test_watchdog_of_another_process_is_not_fed(line: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        manager = ServiceManager(environ(line, WATCHDOG_USEC="20000", WATCHDOG_PID="1"))
        tasks.start_soon(manager.report, lambda: [row()])
        lines = await hear(line, "READY=1")
        manager.leave()
        lines += await hear(line, "STOPPING=1")
        assert "WATCHDOG=1" not in lines
        tasks.cancel_scope.cancel()


async def test_nothing_is_said_to_nobody_and_a_line_that_is_gone_is_no_failure(tmp_path: Path) -> None:
    await ServiceManager({}).report(lambda: [row()])
    ServiceManager({}).leave()
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).leave()
    ServiceManager({"NOTIFY_SOCKET": "@em-runner-nobody"}).leave()
