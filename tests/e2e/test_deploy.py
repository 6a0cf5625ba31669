"""The files in `deploy/` and the wheel: notifications to systemd, the unit, the installed files."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from disco import Node
from tests.cluster import ROOT, agent, cluster, until

pytestmark = pytest.mark.anyio

VARIABLES = """
import os
def handle(body, memory):
    return sorted(os.environ), memory
"""
UNIT = ROOT / "deploy" / "em-runner.service"
PACKAGES = ("em_runner", "runner", "worker", "shared", "disco")


class ServiceManager:
    """Receives notifications as systemd does (sd_notify(3)).

    Attributes:
        environ: the variables that systemd would set for the runner.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received: list[str] = []
        self.environ = {"NOTIFY_SOCKET": sock.getsockname(), "WATCHDOG_USEC": "200000"}

    def received(self, pattern: str) -> bool:
        """Return whether a notification matches the pattern."""
        try:
            while True:
                message = self._sock.recv(4096).decode()
                self._received += message.split("\n")
        except BlockingIOError:
            return any(re.match(pattern, each) for each in self._received)

    def forget(self) -> None:
        """Ignore the notifications received so far."""
        self._received.clear()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield ServiceManager(sock)


async def test_runner_notifies_its_service_manager(
    tmp_path: Path, node: Node, manager: ServiceManager
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), environ=manager.environ) as running:
        await until(lambda: manager.received("READY=1"), "it is ready")
        assert await running.ready()
        await until(lambda: manager.received(r"STATUS=1 \w+ 1 \w+"), "it reports its status")
        manager.forget()
        await until(lambda: manager.received("WATCHDOG=1"), "it feeds the watchdog")
        assert await running.stop() == 0
        assert manager.received("STOPPING=1")


async def test_workers_do_not_inherit_the_service_managers_variables(
    tmp_path: Path, node: Node, manager: ServiceManager
) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=VARIABLES, environ=manager.environ
    ) as running:
        await running.wait_ready()
        names = await running.results("which variables are set?")
        assert "PATH" in names
        assert not set(manager.environ) & set(names)


@pytest.mark.parametrize(
    "setting",
    ["Type=notify", "WatchdogSec=", "ExecReload=", "KillMode=mixed", "NoNewPrivileges=yes"],
)
def test_unit_has_the_setting(setting: str) -> None:
    assert setting in UNIT.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    # systemd-analyze requires that the command exists.
    command = shutil.which("true") or "/bin/true"
    text = UNIT.read_text().replace("/opt/em-runner/.venv/bin/em-runner", command)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """Apart from modules, the packages have the status page, its assets and `py.typed` files."""
    options = ["--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    if "No matching distribution" in done.stderr or "connection" in done.stderr.lower():
        pytest.skip("the build backend is unavailable without a package index")
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    installed = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name]
    files = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files <= set(installed)
    assert {name.partition("/")[0] for name in installed} == set(PACKAGES)
