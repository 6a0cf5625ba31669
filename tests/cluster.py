"""Runs a real runner with real workers for a test, and kills what is left after it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil

from disco import Node
from runner.state_dir import read_address

ROOT = Path(__file__).parent.parent
POLL_S = 0.005
TIMEOUT_S = 45.0
"""How long a condition may take.

It is far longer than any takes, even on a busy machine. It is shorter than a minute, after which
em-runner gives up a start or an import, and tries a failed worker again.
"""

COMMAND_TIMEOUT_S = 120.0
"""How long a command may take that ends by itself."""

NOT_CONNECTED_YET = ("starting", "standby", "connecting", "registering")
ACCEPTS_QUERIES = ("connecting", "registering", "ready", "backoff")
_FREE_PORT = "127.0.0.1:0"
_IN_FLIGHT = re.compile(r'^em_runner_queries_in_flight\{.*source="direct".*\} (\S+)$', re.MULTILINE)

COUNTER = """
def handle(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "count", "properties": {"count": count, "body": body}}, {"count": count}
"""


async def until(condition: Callable[[], Any], what: str, timeout_s: float = TIMEOUT_S) -> Any:
    """Poll a condition until it holds.

    Args:
        condition: a function or a coroutine function.
        what: names the condition in the error.
        timeout_s: how long to wait.

    Returns:
        The first true value of `condition`.

    Raises:
        AssertionError: if the condition does not hold within `timeout_s`.
    """
    ends = time.monotonic() + timeout_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < ends, f"not within {timeout_s} s: {what}"
        await anyio.sleep(POLL_S)


async def outlive(node: Node, name: str, duration_s: float) -> None:
    """Wait until one connection of an agent has lasted for this time.

    On a busy machine a ping may be too late for a short timeout. Then the time starts again.
    """
    connection, since_s = None, 0.0

    def has_lasted() -> bool:
        nonlocal connection, since_s
        if node.registry.connection(name) is not connection:
            connection, since_s = node.registry.connection(name), time.monotonic()
        return connection is not None and time.monotonic() - since_s > duration_s

    await until(has_lasted, f"a connection of {name} lasts for {duration_s} s")


def alive(pid: int) -> bool:
    """Return whether a process runs. A process that has exited but is not reaped does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


class Cluster:
    """A running runner, with the interfaces of its operator and its clients.

    Attributes:
        http: a client for the runner's address.
        process_ids: the processes that `record_processes` has found.
    """

    def __init__(self, process: subprocess.Popen[bytes], state_dir: Path, log: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self.log_path = log
        self.process_ids: set[int] = set()
        self.http: httpx.AsyncClient

    @property
    def log(self) -> str:
        """What the runner has written to standard output and standard error."""
        return self.log_path.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log lines with this event, as dicts."""
        return [line for line in map(_json, self.log.splitlines()) if line.get("event") == name]

    def record_processes(self) -> set[int]:
        """Record the runner's current processes, and return the ids of all recorded processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            runner = psutil.Process(self.process.pid)
            descendants = runner.children(recursive=True)
            self.process_ids |= {process.pid for process in (runner, *descendants)}
        return self.process_ids

    async def rows(self) -> dict[str, dict[str, Any]]:
        """Return the table of workers, by the workers' names."""
        response = await self.http.get("/workers")
        return {row["name"]: row for row in response.json()["workers"]}

    async def row(self, worker: str) -> dict[str, Any]:
        return (await self.rows())[worker]

    async def ready(self) -> bool:
        return (await self.http.get("/ready")).status_code == 200

    async def wait_state(
        self, worker: str, state: str, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            row = await self.row(worker)
            return row if row["state"] == state else None

        return await until(reached, f"{worker} is {state}\n{self.log[-2000:]}", timeout_s)

    async def wait_up(self, worker: str) -> dict[str, Any]:
        """Wait until a worker accepts direct queries. For them it does not need its node."""

        async def up() -> dict[str, Any] | None:
            row = await self.row(worker)
            return row if row["state"] in ACCEPTS_QUERIES else None

        return await until(up, f"{worker} accepts queries")

    async def wait_ready(self) -> None:
        """Wait until every agent has a ready worker, and no worker is in its first connection."""

        async def settled() -> bool:
            rows = (await self.rows()).values()
            return await self.ready() and not any(
                row["state"] in NOT_CONNECTED_YET and not row["connection_failures"] for row in rows
            )

        await until(settled, f"all agents are ready\n{self.log[-2000:]}")
        self.record_processes()

    async def wait_in_flight(self, count: int) -> None:
        """Wait until so many direct queries are in flight: the runner has read them."""

        async def reached() -> bool:
            exposed = (await self.http.get("/metrics")).text
            return sum(map(float, _IN_FLIGHT.findall(exposed))) == count

        await until(reached, f"{count} direct queries are in flight")

    async def ask(self, query: str, **target: str) -> httpx.Response:
        """Send a direct query to an `agent` or a `worker`, and return the response."""
        return await self.http.post("/agent/query", json={"query": query, **target})

    async def results(self, query: str, **target: str) -> Any:
        """Send a direct query, and return the results of its successful response."""
        response = await self.ask(query, **target)
        assert response.status_code == 200, response.text
        return response.json()["results"]

    async def stop(self, signum: int = signal.SIGTERM, timeout_s: float = TIMEOUT_S) -> int:
        """Send the runner a signal, wait until it exits, and return its exit status."""
        self.record_processes()
        if self.process.poll() is None:
            self.process.send_signal(signum)
        await until(
            lambda: self.process.poll() is not None,
            f"the runner has exited\n{self.log[-3000:]}",
            timeout_s,
        )
        return int(self.process.returncode)

    async def wait_exited(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until every recorded process has exited."""

        def exited() -> bool:
            return not any(alive(pid) for pid in self.process_ids)

        await until(exited, "all processes have exited", timeout_s)

    async def worker_pid(self, worker: str) -> int:
        """Return a worker's process id.

        A worker can register at its node before the runner's event loop has read its process id.
        """

        async def current() -> int | None:
            return (await self.row(worker))["pid"]

        pid = await until(current, f"{worker} has a process")
        assert isinstance(pid, int)
        return pid


def _json(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@asynccontextmanager
async def launch(
    folder: Path,
    *arguments: str,
    environ: dict[str, str] | None = None,
    output: Path | None = None,
    http: str = _FREE_PORT,
    errors: int | None = None,
) -> AsyncIterator[Cluster]:
    """Run `em-runner` until the end of the block.

    Args:
        folder: is its current folder and its home folder, and holds its log and its state folder.
        arguments: its arguments, without `--http` and `--state-dir`.
        environ: environment variables to set.
        output: the file for its standard output; its log by default.
        http: the address that it listens on; a free port by default.
        errors: the file descriptor for its standard error; its log by default.
    """
    state_dir, log = folder / "state", folder / "runner.log"
    options = ("--http", http, "--state-dir", str(state_dir))
    config_variables = ("EM_DISCO", "EM_FILTER")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(config_variables)
    }
    defaults = {"HOME": str(folder), "PYTHONPATH": str(ROOT)}
    with log.open("ab") as sink, (output or log).open("ab") as out:
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [sys.executable, "-m", "runner", *arguments, *options],
            cwd=folder,
            env=inherited | defaults | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=sink if errors is None else errors,
            start_new_session=True,
        )
    cluster = Cluster(process, state_dir, log)
    try:
        async with _client(cluster) as cluster.http:
            yield cluster
    finally:
        cluster.record_processes()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            with anyio.CancelScope(shield=True):
                await until(lambda: process.poll() is not None, "the runner has exited")
        finally:
            for pid in cluster.process_ids:  # only processes that this test started
                if alive(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()


@asynccontextmanager
async def _client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    def listening() -> Any:
        assert cluster.process.poll() is None, f"the runner has exited early:\n{cluster.log}"
        address = read_address(cluster.state_dir)
        # A runner that was killed leaves its address behind.
        return address if address is not None and address.pid == cluster.process.pid else None

    address = await until(listening, "the runner listens")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=address.http, timeout=60, limits=limits, trust_env=False
    ) as client:
        yield client


def agent(
    name: str, nodes: list[str], *, handler: str = "handlers.py:handle", **options: Any
) -> str:
    """Return an `[[agent]]` table of a configuration."""
    lines = [f'[[agent]]\nname = "{name}"\nhandler = "{handler}"\nnodes = {json.dumps(nodes)}']
    lines += [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


@asynccontextmanager
async def cluster(
    folder: Path,
    *agents: str,
    handlers: str = COUNTER,
    runner: str = "",
    connection: str = "reconnect_interval_ms = 100",
    supervision: str = "",
    environ: dict[str, str] | None = None,
    http: str = _FREE_PORT,
    options: tuple[str, ...] = (),
    errors: int | None = None,
) -> AsyncIterator[Cluster]:
    """Run a runner with a configuration until the end of the block.

    Args:
        folder: where the configuration and `handlers.py` are written; see `launch`.
        agents: the `[[agent]]` tables, from `agent`.
        handlers: the source of `handlers.py`.
        runner: the lines of the section `[runner]`.
        connection: the lines of the section `[connection]`.
        supervision: the lines of the section `[supervision]`.
        environ: environment variables to set.
        http: the address that the runner listens on.
        options: more options for `em-runner run`.
        errors: the file descriptor for its standard error.
    """
    (folder / "handlers.py").write_text(handlers)
    config = folder / "em-runner.toml"
    config.write_text(
        f"[runner]\n{runner}\n[connection]\n{connection}\n[supervision]\n{supervision}\n"
        + "\n".join(agents)
    )
    config.chmod(0o600)
    arguments = ("run", "-c", str(config), *options)
    async with launch(folder, *arguments, environ=environ, http=http, errors=errors) as running:
        yield running


@asynccontextmanager
async def keep_alive_connection(
    running: Cluster,
) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """Yield a function that sends direct queries on one keep-alive connection.

    It is for load: it costs a hundredth of a query with httpx.
    """
    url = running.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    start = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ncontent-length: "

    async def ask(query: str) -> Any:
        body = json.dumps({"query": query}).encode()
        writer.write(b"%b%d\r\n\r\n%b" % (start, len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        response = await reader.readexactly(length)
        assert head.startswith(b"HTTP/1.1 200"), head + response
        return json.loads(response)["results"]

    try:
        yield ask
    finally:
        writer.close()
