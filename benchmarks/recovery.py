"""The time from kill -9 of a worker until a new process answers, for several supervisors.

All systems run at the same time with one worker each. One worker at a time is killed. The other
supervisors' worker is a minimal HTTP server without a connection to a node, so it has less to do
than em-runner's worker. Each supervisor has its default settings, except that em-runner's limit on
restarts is raised, because a hundred kills in a row would reach it. The limits of the others have
no effect here.

The largest factor is how a supervisor notices a death. em-runner and gunicorn are woken by it.
uvicorn checks every 0.5 s, and circus every 5 s (its `check_delay`). supervisord restarts a dead
program in the next iteration of its loop, a second later. Each kill comes at a random moment in
that interval. A worker younger than LIFE_S is not killed: em-runner would delay its restart, and
supervisord would assume that the program cannot start.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from benchmarks import raw_http
from benchmarks.load_node import LoadNode
from benchmarks.measure import Figure, quantile
from benchmarks.raw_http import Address
from benchmarks.systems import ROOT, em_runner, process, wait_for

SUITE: Final = "recovery"
ANSWERING: Final = "kill -9 to answering"
REGISTERED: Final = "kill -9 to registered"
PATH: Final = "/agent/query"
SUPERVISION: Final = "[supervision]\nmax_restarts = 1000\n"
KILLS: Final = (100, 20)
QUICK_KILLS: Final = (10, 3)
"""The kills of em-runner's worker, and of each other worker, which takes a second to restart."""

LIFE_S: Final = 1.2
ASK_EVERY_S: Final = 0.001
TIMEOUT_S: Final = 30.0
SEED: Final = 1


class NotRecovered(Exception):
    """No new worker answered after a kill."""


@dataclass
class Supervised:
    """A running supervisor with one worker.

    Attributes:
        supervisor: the pid of the supervisor.
        checks_every_s: how often it checks its worker, or 0 if it is woken by a death.
        node: the node at which the worker registers, if any.
        up_s: when the current worker first answered, by `time.perf_counter`.
        found_ms: the recovery times of the kills, by quantity.
    """

    name: str
    address: Address
    supervisor: int
    checks_every_s: float = 0.0
    node: LoadNode | None = None
    up_s: float = field(default_factory=time.perf_counter)
    found_ms: dict[str, list[float]] = field(default_factory=dict)

    def kill_once(self, wait: random.Random) -> None:
        """Kill the worker, and record the time until a new one answers."""
        earliest_s = max(self.up_s + LIFE_S, time.perf_counter())
        kill_at_s = earliest_s + wait.uniform(0.0, self.checks_every_s)
        while (left := kill_at_s - time.perf_counter()) > 0:
            self._wait([], left)
        pid = _pid(raw_http.ask(self.address, PATH, "pid").body)
        if self.supervisor not in {parent.pid for parent in psutil.Process(pid).parents()}:
            raise NotRecovered(f"{self.name}: the process {pid} answers, which is not its worker")
        killed_s = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        for name, until_s in self._recover(pid, killed_s).items():
            self.found_ms.setdefault(name, []).append((until_s - killed_s) * 1000)
        self.up_s = time.perf_counter()

    def _recover(self, killed: int, killed_s: float) -> dict[str, float]:
        """Wait until a new process answers and, if there is a node, registers. Return the times."""
        found: dict[str, float] = {}
        wanted = 1 if self.node is None else 2
        with Asking(self.address) as asking:
            while len(found) < wanted:
                if ANSWERING not in found and asking.step() not in (None, killed):
                    found[ANSWERING] = time.perf_counter()
                if (registered_s := self._registered_after(killed_s)) is not None:
                    found[REGISTERED] = registered_s
                if time.perf_counter() > killed_s + TIMEOUT_S:
                    raise NotRecovered(
                        f"{self.name} did not recover within {TIMEOUT_S:g} s; "
                        f"reached: {list(found)}"
                    )
                self._wait(asking.sockets, ASK_EVERY_S)
        return found

    def _registered_after(self, killed_s: float) -> float | None:
        peers = () if self.node is None else self.node.peers
        return next(
            (peer.registered_s for peer in peers if (peer.registered_s or 0.0) > killed_s), None
        )

    def _wait(self, sockets: Sequence[socket.socket], seconds: float) -> None:
        readable = [sock.fileno() for sock in sockets]
        if self.node is not None:
            readable.append(self.node.fileno())
        select.select(readable, (), (), seconds)
        if self.node is not None:
            self.node.serve()


class Asking:
    """Sends the same query repeatedly, each over a new connection. Use as a context manager."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._request = raw_http.request(address, PATH, "pid")
        self._data = b""
        self._next_s = 0.0
        self.sockets: list[socket.socket] = []

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *exc: object) -> None:
        self._disconnect()

    def step(self) -> int | None:
        """Proceed without waiting. Return the pid of the process that answered, or None."""
        try:
            if not self.sockets and time.perf_counter() >= self._next_s:
                self._next_s = time.perf_counter() + ASK_EVERY_S
                # On loopback this does not wait: without a listener it is refused immediately.
                self.sockets.append(raw_http.connect(self._address))
                self.sockets[0].sendall(self._request)
                self.sockets[0].setblocking(False)
            if not self.sockets:
                return None
            data = self.sockets[0].recv(raw_http.READ_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            self._disconnect()
            return None
        self._data += data
        answer = raw_http.parse(self._data)
        if answer is None and data:
            return None
        self._disconnect()
        return _pid(answer.body) if answer is not None and answer.status == 200 else None

    def _disconnect(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()
        self._data = b""


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Kill the workers in turn, and return a figure whose `runs` are the single kills.

    The number of kills does not depend on the argument `runs`.
    """
    kills, others_kills = QUICK_KILLS if quick else KILLS
    wait = random.Random(SEED)
    with contextlib.ExitStack() as stack:
        first, *others = [
            stack.enter_context(start())
            for start in (_em_runner, _uvicorn, _gunicorn, _circus, _supervisord)
        ]
        every = kills // others_kills
        for kill in range(kills):
            first.kill_once(wait)
            if kill % every == every - 1 and kill < every * others_kills:
                for other in others:
                    other.kill_once(wait)
                last = ", ".join(
                    f"{each.name} {each.found_ms[ANSWERING][-1]:,.4g} ms"
                    for each in (first, *others)
                )
                report(f"  {kill + 1}/{kills} {last}")
        _summarize(report, (first, *others))
        return [
            Figure(suite=SUITE, name=name, system=each.name, unit="ms", runs=found_ms)
            for each in (first, *others)
            for name, found_ms in each.found_ms.items()
        ]


def _summarize(report: Callable[[str], None], systems: Sequence[Supervised]) -> None:
    for each in systems:
        for name, found_ms in each.found_ms.items():
            median, p95 = statistics.median(found_ms), quantile(found_ms, 0.95)
            figures = f"median {median:,.4g}, p95 {p95:,.4g}, max {max(found_ms):,.4g} ms"
            report(f"  {each.name}: {name}: {figures} of {len(found_ms)} kills")


def _pid(body: bytes) -> int:
    return int(json.loads(body)["results"]["pid"])


@contextmanager
def _em_runner() -> Iterator[Supervised]:
    with (
        LoadNode() as node,
        em_runner(node.addresses, handler="pid", settings=SUPERVISION) as runner,
    ):
        node.wait_registered()
        yield Supervised("em-runner", runner.http, runner.process.pid, node=node)


@contextmanager
def _uvicorn() -> Iterator[Supervised]:
    port = _free_port()
    with _running(
        "uvicorn --workers", port, 0.5, "-m", "benchmarks.baselines.uvicorn_workers", str(port)
    ) as supervised:
        yield supervised


@contextmanager
def _gunicorn() -> Iterator[Supervised]:
    port = _free_port()
    arguments = (
        "--workers",
        "1",
        "--no-control-socket",
        "--bind",
        f"127.0.0.1:{port}",
        "benchmarks.baselines.http_worker:wsgi",
    )
    with _running("gunicorn", port, 0.0, "-m", "gunicorn", *arguments) as supervised:
        yield supervised


@contextmanager
def _circus() -> Iterator[Supervised]:
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        config = Path(folder) / "circus.ini"
        config.write_text(
            "[circus]\n"
            f"endpoint = ipc://{folder}/endpoint\n"
            f"pubsub_endpoint = ipc://{folder}/pubsub\n"
            "[watcher:worker]\n"
            f"cmd = {sys.executable}\n"
            f"args = -m benchmarks.baselines.http_worker {port}\n"
            f"working_dir = {ROOT}\n"
            "copy_env = True\n"
            "numprocesses = 1\n"
        )
        with _running("circus", port, 5.0, "-m", "circus.circusd", str(config)) as supervised:
            yield supervised


@contextmanager
def _supervisord() -> Iterator[Supervised]:
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        config = Path(folder) / "supervisord.conf"
        config.write_text(
            "[supervisord]\n"
            "nodaemon = true\n"
            f"logfile = {folder}/log\n"
            f"pidfile = {folder}/pid\n"
            f"childlogdir = {folder}\n"
            "[program:worker]\n"
            f"command = {sys.executable} -m benchmarks.baselines.http_worker {port}\n"
            f"directory = {ROOT}\n"
            "autorestart = true\n"
        )
        with _running(
            "supervisord", port, 1.0, "-m", "supervisor.supervisord", "-c", str(config)
        ) as supervised:
            yield supervised


@contextmanager
def _running(name: str, port: int, checks_every_s: float, *arguments: str) -> Iterator[Supervised]:
    """Run a supervisor during the block, which starts when its worker answers."""
    address = ("127.0.0.1", port)
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        log = Path(folder) / "log"
        with process(sys.executable, *arguments, log=log) as started, Asking(address) as asking:
            wait_for(asking.step, started, log)
            yield Supervised(name, address, started.pid, checks_every_s)


def _free_port() -> int:
    """Return a port that is free now, for programs that do not report the port they listen on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
