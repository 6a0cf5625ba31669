"""A real runner with real workers, started by a test and gone after it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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

from runner.state_dir import read_address

ROOT = Path(__file__).parent.parent
POLL_S = 0.005
LIMIT_S = 30.0
ON_THE_WAY = ("starting", "standby", "connecting", "registering")

COUNTER = """
def handle(body, memory):
    count = memory.get("count", 0) + 1
    return {"type": "count", "properties": {"count": count, "body": body}}, {"count": count}
"""


async def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """Return the first true value of `condition`, which may be a coroutine function."""
    ends = time.monotonic() + limit_s
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < ends, f"not within {limit_s} s: {what}"
        await anyio.sleep(POLL_S)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not reaped does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


class Cluster:
    """A running runner, as its operator and its clients see it."""

    def __init__(self, process: subprocess.Popen[bytes], state_dir: Path, log: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self.log_path = log
        self.seen: set[int] = set()
        self.http: httpx.AsyncClient

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines whose event is `name`."""
        return [line for line in map(_json, self.log.splitlines()) if line.get("event") == name]

    def note_processes(self) -> set[int]:
        """Remember every process that the runner has now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid)
            self.seen |= {family.pid, *(child.pid for child in family.children(recursive=True))}
        return self.seen

    async def rows(self) -> dict[str, dict[str, Any]]:
        answer = await self.http.get("/workers")
        return {row["name"]: row for row in answer.json()["workers"]}

    async def row(self, worker: str) -> dict[str, Any]:
        return (await self.rows())[worker]

    async def ready(self) -> bool:
        return (await self.http.get("/ready")).status_code == 200

    async def wait_state(self, worker: str, state: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
        async def reached() -> dict[str, Any] | None:
            row = await self.row(worker)
            return row if row["state"] == state else None

        return await until(reached, f"{worker} is {state}\n{self.log[-2000:]}", limit_s)

    async def wait_up(self, worker: str) -> dict[str, Any]:
        """Wait until a worker takes queries, whatever its node does."""

        async def up() -> dict[str, Any] | None:
            row = await self.row(worker)
            return row if row["state"] in ("connecting", "registering", "ready", "backoff") else None

        return await until(up, f"{worker} is up")

    async def wait_ready(self) -> None:
        """Wait until every agent has a ready worker, and none of its workers is still on its first way to its node."""

        async def settled() -> bool:
            rows = (await self.rows()).values()
            return await self.ready() and not any(row["state"] in ON_THE_WAY and not row["reconnects"] for row in rows)

        await until(settled, f"all agents are ready\n{self.log[-2000:]}")
        self.note_processes()

    async def ask(self, query: str, **named: str) -> httpx.Response:
        return await self.http.post("/agent/query", json={"query": query, **named})

    async def results(self, query: str, **named: str) -> Any:
        answer = await self.ask(query, **named)
        assert answer.status_code == 200, answer.text
        return answer.json()["results"]

    async def stop(self, number: int = signal.SIGTERM, limit_s: float = LIMIT_S) -> int:
        """Signal the runner and return its exit status."""
        self.note_processes()
        if self.process.poll() is None:
            self.process.send_signal(number)
        await until(lambda: self.process.poll() is not None, f"the runner has ended\n{self.log[-3000:]}", limit_s)
        return int(self.process.returncode)

    async def gone(self, limit_s: float = LIMIT_S) -> None:
        """Wait until no process of this cluster is left."""
        await until(lambda: not [pid for pid in self.seen if alive(pid)], "all processes are gone", limit_s)

    async def worker_pid(self, worker: str) -> int:
        pid = (await self.row(worker))["pid"]
        assert isinstance(pid, int)
        return pid


def _json(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


@asynccontextmanager
async def launched(
    folder: Path,
    *arguments: str,
    environ: dict[str, str] | None = None,
    output: Path | None = None,
    http: str = "127.0.0.1:0",
    errors: int | None = None,
) -> AsyncIterator[Cluster]:
    """Start `em-runner` with these arguments, plus a free port (or `http`) and a state folder below `folder`.

    Its output goes to the log, or to the file named by `output`, and what goes to standard error to `errors`.
    """
    state_dir, log = folder / "state", folder / "runner.log"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("EM_DISCO", "EM_FILTER"))}
    env |= {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | (environ or {})
    with log.open("ab") as sink, (output or log).open("ab") as out:
        process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [sys.executable, "-m", "runner", *arguments, "--http", http, "--state-dir", str(state_dir)],
            cwd=folder,
            env=env,
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
        cluster.note_processes()
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            with anyio.CancelScope(shield=True):
                await until(lambda: process.poll() is not None, "the runner has ended", 10)
        finally:
            for pid in cluster.seen:  # only what this test started, and only if it is still there
                if alive(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()


@asynccontextmanager
async def _client(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    def announced() -> Any:
        assert cluster.process.poll() is None, f"the runner has ended early:\n{cluster.log}"
        address = read_address(cluster.state_dir)
        return address if address is not None and address.pid == cluster.process.pid else None

    address = await until(announced, "the runner listens")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address.http, timeout=60, limits=limits, trust_env=False) as client:
        yield client


def agent(name: str, nodes: list[str], *, handler: str = "handlers.py:handle", **options: Any) -> str:
    """One `[[agent]]` of a configuration."""
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
    http: str = "127.0.0.1:0",
    options: tuple[str, ...] = (),
    errors: int | None = None,
) -> AsyncIterator[Cluster]:
    """Run these agents, with `handlers` as `handlers.py` beside the configuration."""
    (folder / "handlers.py").write_text(handlers)
    (folder / "em-runner.toml").write_text(
        f"[runner]\n{runner}\n[connection]\n{connection}\n[supervision]\n{supervision}\n" + "\n".join(agents)
    )
    (folder / "em-runner.toml").chmod(0o600)
    arguments = ("run", "-c", str(folder / "em-runner.toml"), *options)
    async with launched(folder, *arguments, environ=environ, http=http, errors=errors) as running:
        yield running


@asynccontextmanager
async def direct(running: Cluster) -> AsyncIterator[Callable[[str], Awaitable[Any]]]:
    """One keep-alive connection for queries, a hundred times lighter than httpx: for load."""
    url = running.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)

    async def ask(query: str) -> Any:
        body = json.dumps({"query": query}).encode()
        head = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        answer = await reader.readexactly(length)
        assert head.startswith(b"HTTP/1.1 200"), head + answer
        return json.loads(answer)["results"]

    try:
        yield ask
    finally:
        writer.close()
