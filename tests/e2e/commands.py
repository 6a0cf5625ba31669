"""Runs `em-runner` commands to their end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anyio

from tests.cluster import ROOT

EM_RUNNER = (sys.executable, "-m", "runner")
TIMEOUT_S = 120


async def run(
    command: list[str | bytes], cwd: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with these environment variables, and return its output as text."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            command,
            cwd=cwd,
            env=env,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT_S,
        )
    )


async def em_runner(
    *arguments: str | bytes, cwd: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `em-runner` with these arguments."""
    return await run([*EM_RUNNER, *arguments], cwd, **environ)


async def shell(line: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash. The variable PYTHON has the path of the running Python."""
    return await run(["bash", "-c", line], cwd, PYTHON=sys.executable, **environ)
