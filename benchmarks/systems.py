"""Starts the measured systems as separate processes, and stops them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from runner.state_dir import read_address

ROOT: Final = Path(__file__).resolve().parent.parent
TIMEOUT_S: Final = 60.0
HANDLERS: Final = f"{ROOT / 'benchmarks' / 'handlers.py'}"


class StartFailed(Exception):
    """A system did not start. The message is the end of its log."""


@contextmanager
def process(
    *arguments: str, log: Path, cores: set[int] | None = None, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in a new session. After the block, it and its descendants are stopped."""
    with log.open("ab") as sink:
        started = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
    family: set[int] = set()
    try:
        yield started
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = {child.pid for child in psutil.Process(started.pid).children(recursive=True)}
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], started: subprocess.Popen[bytes], log: Path) -> Any:
    """Return the first true value of `condition`.

    Raises:
        StartFailed: the process exited first, or TIMEOUT_S passed.
    """
    ends = time.monotonic() + TIMEOUT_S
    while not (value := condition()):
        if started.poll() is not None or time.monotonic() > ends:
            raise StartFailed(log.read_text(errors="replace")[-2000:])
        time.sleep(0.005)
    return value


class Runner:
    """A running em-runner, as its operator sees it."""

    def __init__(self, started: subprocess.Popen[bytes], state_dir: Path, log: Path) -> None:
        self.process = started
        self.log = log
        self._state_dir = state_dir

    @property
    def http(self) -> tuple[str, int]:
        """The address that the runner listens on."""

        def announced() -> Any:
            address = read_address(self._state_dir)
            return address if address is not None and address.pid == self.process.pid else None

        host, _, port = (
            wait_for(announced, self.process, self.log).http.removeprefix("http://").rpartition(":")
        )
        return host, int(port)

    def workers(self) -> list[psutil.Process]:
        """Return its workers' processes."""
        return [each for each in self._family() if each.name().startswith("em-worker")]

    def all_processes(self) -> list[psutil.Process]:
        """Return all its processes."""
        return [psutil.Process(self.process.pid), *self._family()]

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def em_runner(
    nodes: Sequence[str],
    *,
    handler: str = "echo",
    memory: str = "ram",
    cores: set[int] | None = None,
    agents: Sequence[tuple[str, str, str, Sequence[str]]] = (),
    settings: str = "",
    agent_settings: str = "",
) -> Iterator[Runner]:
    """Run em-runner with one agent at `nodes`, or with `agents`: (name, handler, memory, nodes)."""
    agents = agents or [("echo", f"{HANDLERS}:{handler}", memory, nodes)]
    with tempfile.TemporaryDirectory(prefix="em-bench-") as name:
        folder = Path(name)
        config = folder / "em-runner.toml"
        sections = [settings]
        for agent, where, kind, at in agents:
            sections.append(
                f'[[agent]]\nname = "{agent}"\nhandler = "{where}"\nmemory = "{kind}"\n'
                f"nodes = {json.dumps(list(at))}\n{agent_settings}"
            )
        config.write_text("\n".join(sections))
        config.chmod(0o600)
        command = (
            sys.executable,
            "-m",
            "runner",
            "run",
            "-c",
            str(config),
            "--http",
            "127.0.0.1:0",
        )
        state_dir, log = folder / "state", folder / "log"
        with process(*command, "--state-dir", str(state_dir), log=log, cores=cores) as started:
            try:
                yield Runner(started, state_dir, log)
            except Exception as exc:
                exc.add_note(log.read_text(errors="replace")[-3000:])
                raise


@contextmanager
def baseline(
    module: str, *arguments: str, cores: set[int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of `benchmarks.baselines`."""
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        log = Path(folder) / "log"
        command = (sys.executable, "-m", f"benchmarks.baselines.{module}", *arguments)
        with process(*command, log=log, cores=cores) as started:
            try:
                yield started
            except Exception as exc:
                exc.add_note(log.read_text(errors="replace")[-2000:])
                raise


@contextmanager
def http_baseline(module: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Run one of `benchmarks.baselines` that listens and writes its port to the file PORT_FILE."""
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        port_file = Path(folder) / "port"
        port_file.touch()
        with baseline(module, *_with_file(arguments, port_file)) as started:
            wait_for(port_file.read_text, started, port_file)
            yield "127.0.0.1", int(port_file.read_text())


def _with_file(arguments: Sequence[str], port_file: Path) -> list[str]:
    return [str(port_file) if each == "PORT_FILE" else each for each in arguments]
