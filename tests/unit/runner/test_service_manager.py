"""`runner.service_manager`: what is sent to systemd, and when."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from runner import service_manager
from runner.service_manager import ServiceManager
from runner.table import WorkerRow
from tests.unit.runner.commands.test_status import row

pytestmark = pytest.mark.anyio


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        yield systemd


def environ(systemd: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": systemd.getsockname(), "OTHER": "kept", **more}


def receive(systemd: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages += systemd.recv(4096).decode().split("\n")
        except BlockingIOError:
            return messages


async def wait_for(systemd: socket.socket, message: str, count: int = 1) -> list[str]:
    messages: list[str] = []
    with anyio.fail_after(60):
        while messages.count(message) < count:
            messages += receive(systemd)
            await anyio.sleep(0.001)
    return messages


class Table:
    """A table of workers that counts how often it is read."""

    def __init__(self, *rows: WorkerRow) -> None:
        self.rows = list(rows)
        self.reads = 0

    def read(self) -> list[WorkerRow]:
        self.reads += 1
        return self.rows

    async def wait_for_checks(self) -> None:
        """Wait until the current rows were checked."""
        # One check reads the table twice, and a check may be running now.
        enough = self.reads + 4
        with anyio.fail_after(60):
            while self.reads < enough:  # noqa: ASYNC110 - a read sets no event
                await anyio.sleep(0.001)


async def test_ready_is_sent_once_every_agent_is_up_or_has_tried(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "CHECK_INTERVAL_S", 0.001)
    table = Table(
        row("a_server"),
        row("b_server", "connecting", agent="b"),
        row("b_server_2", "starting", agent="b"),
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(environ(systemd)).report, table.read)
        await table.wait_for_checks()
        table.rows[1] = row("b_server", "backoff", agent="b")
        await table.wait_for_checks()
        assert "READY=1" not in receive(systemd), "b_server_2 has not tried to connect"
        # b_server connects again. It has tried once, and that counts.
        table.rows[1] = row("b_server", "connecting", agent="b")
        table.rows[2] = row("b_server_2", "failed", agent="b")
        await wait_for(systemd, "READY=1")
        tasks.cancel_scope.cancel()


async def test_ready_is_sent_again_if_systemd_did_not_receive_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "CHECK_INTERVAL_S", 0.001)
    address = str(tmp_path / "notify")
    table = Table(row())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager({"NOTIFY_SOCKET": address}).report, table.read)
        await table.wait_for_checks()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.bind(address)
            systemd.setblocking(False)
            await wait_for(systemd, "READY=1")
        tasks.cancel_scope.cancel()


async def test_same_status_is_sent_once(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_manager, "CHECK_INTERVAL_S", 0.001)
    table = Table(row("a_server", "connecting"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(environ(systemd)).report, table.read)
        await table.wait_for_checks()
        assert len(receive(systemd)) == 1
        tasks.cancel_scope.cancel()


@pytest.mark.message_text
async def test_status_counts_the_ready_workers(systemd: socket.socket) -> None:
    rows = [row("a_server"), row("b_server", "starting", agent="b")]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(environ(systemd)).report, lambda: rows)
        await wait_for(systemd, "STATUS=1 of 2 workers ready")
        tasks.cancel_scope.cancel()


async def test_one_ready_worker_is_enough_for_its_agent(systemd: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        rows = [row("a_server"), row("a_server_2", "connecting")]
        tasks.start_soon(ServiceManager(environ(systemd)).report, lambda: rows)
        await wait_for(systemd, "READY=1")
        tasks.cancel_scope.cancel()


async def test_watchdog_is_notified_twice_per_interval(systemd: socket.socket) -> None:
    found = environ(systemd, WATCHDOG_USEC="20000", WATCHDOG_PID=str(os.getpid()))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ServiceManager(found).report, lambda: [row()])
        started_s = anyio.current_time()
        await wait_for(systemd, "WATCHDOG=1", 11)
        assert anyio.current_time() - started_s >= 10 * 0.01 * 0.9, "it is notified more often"
        tasks.cancel_scope.cancel()


async def test_workers_do_not_inherit_the_variables_of_systemd(systemd: socket.socket) -> None:
    found = environ(systemd, WATCHDOG_USEC="20000", WATCHDOG_PID=str(os.getpid()))
    ServiceManager(found)
    assert found == {"OTHER": "kept"}


async def test_watchdog_of_another_process_is_not_notified(systemd: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        manager = ServiceManager(environ(systemd, WATCHDOG_USEC="20000", WATCHDOG_PID="1"))
        tasks.start_soon(manager.report, lambda: [row()])
        messages = await wait_for(systemd, "READY=1")
        manager.report_stopping()
        messages += await wait_for(systemd, "STOPPING=1")
        assert "WATCHDOG=1" not in messages
        tasks.cancel_scope.cancel()


async def test_missing_notify_socket_raises_nothing(tmp_path: Path) -> None:
    await ServiceManager({}).report(lambda: [row()])
    ServiceManager({}).report_stopping()
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")}).report_stopping()
    ServiceManager({"NOTIFY_SOCKET": "@em-runner-missing"}).report_stopping()
