"""What `deploy/` promises: a real runner tells a service manager how it stands; the unit is one that systemd takes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from disco import NodeSettings, serve
from tests.cluster import ROOT, agent, cluster, until

pytestmark = pytest.mark.anyio

ENVIRONMENT = """
import os
def handle(body, memory):
    return sorted(os.environ), memory
"""
UNIT = ROOT / "deploy" / "em-runner.service"


async def test_runner_tells_its_service_manager_how_it_stands(tmp_path: Path, anyio_backend: object) -> None:
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(str(tmp_path / "notify"))
        line.setblocking(False)

        def hears(what: str) -> bool:
            try:
                while True:
                    heard.extend(line.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return what in heard

        environ = {"NOTIFY_SOCKET": line.getsockname(), "WATCHDOG_USEC": "200000"}
        async with serve(NodeSettings(port=0)) as node:
            async with cluster(tmp_path, agent("a", [node.url]), handlers=ENVIRONMENT, environ=environ) as running:
                await until(lambda: hears("READY=1"), "it is ready")
                assert await running.ready()
                await until(lambda: hears("STATUS=1 of 1 workers ready"), "it says how it stands")
                heard.clear()
                await until(lambda: hears("WATCHDOG=1"), "it lives")
                inherited = await running.results("which variables are there?")
                assert "PATH" in inherited
                assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(inherited), "that is none of its business"
                assert await running.stop() == 0
                assert hears("STOPPING=1")


def test_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = UNIT.read_text()
    for line in ("Type=notify", "WatchdogSec=", "ExecReload=", "KillMode=mixed", "NoNewPrivileges=yes"):
        assert line in text
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        # Where em-runner is installed is the operator's to say.
        copy = tmp_path / UNIT.name
        copy.write_text(text.replace("/opt/em-runner/.venv/bin/em-runner", shutil.which("true") or "/bin/true"))
        found = subprocess.run([analyze, "verify", copy], capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, "")


def test_wheel_has_every_file_of_the_packages(tmp_path: Path) -> None:
    """What is installed without a checkout is all there: the page, its style and script, the types' marks."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if "No matching distribution" in done.stderr or "connection" in done.stderr.lower():
        pytest.skip("what builds wheels cannot be had here")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    packages = ("runner", "worker", "shared", "disco")
    wanted = {
        str(file.relative_to(ROOT))
        for package in packages
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert wanted <= found
    assert {name.partition("/")[0] for name in found if ".dist-info" not in name} == {*packages, "em_runner_pytest.py"}
