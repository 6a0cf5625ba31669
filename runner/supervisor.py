"""One supervised child for each worker: started, watched, started again, drained.

Children are independent: what happens to one is never a reason to touch another.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Final, Literal

import anyio
import msgspec
import structlog

from runner.process import ForkServer, SpawnError, WorkerProcess
from runner.restarts import RestartHistory, RestartPolicy
from runner.router import Router
from shared import ipc
from shared.config import WorkerSpec
from shared.ipc import KEY_BYTES, Counters, Launch

ChildState = Literal[
    "starting",
    "connecting",
    "registering",
    "ready",
    "backoff",
    "draining",
    "stopped",
    "crashed",
    "restarting",
    "failed",
]
KILL_GRACE_S: Final = 0.5
"""How much longer than its own time for draining a worker gets before it is killed."""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of workers, as operators see it; `uptime_s` is its process's, 0 without one."""

    name: str
    agent: str
    node: str
    state: ChildState
    detail: str
    pid: int | None
    incarnation: int
    uptime_s: float
    restarts: int
    queries: int
    queries_node: int
    queries_http: int
    errors: int
    reconnects: int
    ignored: dict[str, int]
    last_error: str


class Child:
    """One worker and its successive processes."""

    def __init__(self, spec: WorkerSpec, policy: RestartPolicy, fork_server: ForkServer, router: Router) -> None:
        self.spec = spec
        self.state: ChildState = "starting"
        self._detail = ""
        self._last_error = ""
        self._failure = ""
        self._history = RestartHistory(policy)
        self._fork_server = fork_server
        self._router = router
        self._incarnation = 0
        self._restarts = 0
        self._started_s = 0.0
        self._launch: Launch | None = None
        self._process: WorkerProcess | None = None
        self._before = Counters()
        self._now = Counters()
        self._stopping = anyio.Event()
        self._log = structlog.get_logger("supervisor").bind(worker=spec.name)

    @property
    def row(self) -> WorkerRow:
        """The worker as operators see it now. Counters go on where a dead process's ended."""
        before, now = self._before, self._now
        alive = self._process is not None
        node, http = before.queries_node + now.queries_node, before.queries_http + now.queries_http
        return WorkerRow(
            name=self.spec.name,
            agent=self.spec.agent.name,
            node=str(self.spec.node),
            state=self.state,
            detail=self._detail,
            pid=self._process.pid if self._process is not None else None,
            incarnation=self._incarnation,
            uptime_s=round(time.monotonic() - self._started_s, 3) if alive else 0.0,
            restarts=self._restarts,
            queries=node + http,
            queries_node=node,
            queries_http=http,
            errors=before.errors + now.errors,
            reconnects=before.reconnects + now.reconnects,
            ignored=_sum(before.ignored, now.ignored),
            last_error=self._last_error,
        )

    async def run(self) -> None:
        """Keep the worker running until it is told to stop."""
        while not self._stopping.is_set():
            began_s = time.monotonic()
            how = await self._live()
            self._add_up()
            if self._stopping.is_set():
                break
            decision = self._history.died(time.monotonic(), time.monotonic() - began_s)
            self._restarts += 1
            self._last_error = self._failure or f"the process ended: {how}"
            self._set("failed" if decision.failed else "restarting", self._last_error)
            say = self._log.error if decision.failed else self._log.warning
            say("worker_" + self.state, why=self._last_error, again_in_s=decision.delay_s)
            with anyio.move_on_after(decision.delay_s):
                await self._stopping.wait()
        self._set("stopped", "")

    async def _live(self) -> str:
        """Run one process from its start to its end; return how it ended."""
        self._incarnation += 1
        self._failure = ""
        launch = Launch(
            spec=self.spec,
            incarnation=self._incarnation,
            endpoint=self._router.endpoint,
            key=secrets.token_bytes(KEY_BYTES),
        )
        self._set("starting", "")
        self._router.expect(launch, self)
        try:
            self._process = process = await self._fork_server.spawn(launch)
        except SpawnError as exc:
            self._router.drop(launch, str(exc))
            self._failure = str(exc)
            return str(exc)
        self._launch = launch
        self._started_s = time.monotonic()
        self._log.info("worker_started", pid=process.pid, node=str(self.spec.node), incarnation=self._incarnation)
        try:
            if self._stopping.is_set():  # told to while it was being forked
                process.kill()
            await process.ended()
        finally:
            self._process = self._launch = None
            self._set("crashed", "")
            self._router.drop(launch, "the worker died")
        how = await process.how()
        process.release()
        return how

    def _add_up(self) -> None:
        for name in ("queries_node", "queries_http", "errors", "late", "reconnects"):
            setattr(self._before, name, getattr(self._before, name) + getattr(self._now, name))
        self._before.ignored = _sum(self._before.ignored, self._now.ignored)
        self._now = Counters()

    # --- what the worker says (router.Listener) ---

    def on_status(self, incarnation: int, status: ipc.Status) -> None:
        """Take a state change or a heartbeat."""
        if incarnation != self._incarnation or self._process is None:
            return
        self._now = status.counters
        self._last_error = status.counters.last_error or self._last_error
        self._set(status.state, status.detail)

    def on_failed(self, incarnation: int, reason: str) -> None:
        """Take the reason why the worker cannot start; its process ends by itself."""
        if incarnation == self._incarnation:
            self._failure = reason

    def _set(self, state: ChildState, detail: str) -> None:
        self.state, self._detail = state, detail

    # --- the end ---

    def retire(self) -> None:
        """Let the worker's next end be its last."""
        self._stopping.set()

    async def drain(self, timeout_s: float) -> None:
        """Have the worker finish what is in flight and leave; kill it when it takes longer than `timeout_s`."""
        self.retire()
        process, launch = self._process, self._launch
        if process is None or launch is None:
            return
        if self._router.drain(launch):
            with anyio.move_on_after(timeout_s):
                await process.ended()
                return
            self._log.warning("drain_timed_out", pid=process.pid)
        process.kill()

    def kill(self) -> None:
        """End the worker at once."""
        self.retire()
        if self._process is not None:
            self._process.kill()


class Supervisor:
    """All the children.

    Args:
        specs: one for each worker.
        policy: when they are started again.
        shutdown_timeout_s: how long a drain may take.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        policy: RestartPolicy,
        fork_server: ForkServer,
        router: Router,
        shutdown_timeout_s: float,
    ) -> None:
        self.children = [Child(spec, policy, fork_server, router) for spec in specs]
        self._shutdown_timeout_s = shutdown_timeout_s

    @property
    def rows(self) -> list[WorkerRow]:
        """The table of workers."""
        return [child.row for child in self.children]

    async def run(self) -> None:
        """Keep every worker running until `drain` or `kill`; returns when all have ended."""
        async with anyio.create_task_group() as tasks:
            for child in self.children:
                tasks.start_soon(child.run)

    def retire(self) -> None:
        """Start no worker again: a signal to the whole process group reaches them before their drain does."""
        for child in self.children:
            child.retire()

    async def drain(self) -> None:
        """Drain all workers at once."""
        async with anyio.create_task_group() as tasks:
            for child in self.children:
                tasks.start_soon(child.drain, self._shutdown_timeout_s + KILL_GRACE_S)

    def kill(self) -> None:
        """End all workers at once."""
        for child in self.children:
            child.kill()


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one.keys() | other.keys()}
