"""One worker and its successive processes: started, watched, started again, replaced in good order, drained."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Any

import anyio
from anyio.abc import TaskGroup

from runner.incarnation import Incarnation
from runner.lines import Ending
from runner.metrics import Sample
from runner.process import ForkServer, SpawnError
from runner.recent import Recent
from runner.restarts import RestartHistory, RestartPolicy, RestartReason
from runner.router import Router
from runner.succession import START_TIMEOUT_S, Succession
from runner.table import ChildState, WorkerRow, last_errors
from shared import ipc
from shared.config import WorkerSpec
from shared.ipc import KEY_BYTES, Counters, Launch, Mishap
from shared.logs import get_logger


class Child:
    """One worker and its successive processes."""

    def __init__(self, spec: WorkerSpec, policy: RestartPolicy, fork_server: ForkServer, router: Router) -> None:
        self.spec = spec
        self._fork_server = fork_server
        self._router = router
        self._history = RestartHistory(policy)
        self._state: ChildState = "starting"
        self._last_end: Mishap | None = None
        self.current: Incarnation | None = None
        self._incarnations: dict[int, Incarnation] = {}
        self.numbers = 0
        self._restarts: Counter[RestartReason] = Counter()
        self._cause: RestartReason = "unknown"
        self._before = Counters()
        self._recent = Recent(time.monotonic())
        self.hurry = anyio.Event()
        self.stopping = anyio.Event()
        self._ended = anyio.Event()
        self._log = get_logger("supervisor").bind(worker=spec.name, agent=spec.agent.name)
        self.succession = Succession(self, router, self._log)

    @property
    def row(self) -> WorkerRow:
        """The worker as operators see it now."""
        current, counted = self.current, self.counted
        errors = last_errors(counted.handler_error, counted.connection_error, self._last_end)
        return WorkerRow(
            name=self.spec.name,
            agent=self.spec.agent.name,
            node=str(self.spec.node),
            state=self._state if current is None else current.state,
            detail=self._detail if current is None else current.detail,
            pid=current.process.pid if current is not None else None,
            incarnation=self.numbers if current is None else current.launch.incarnation,
            uptime_s=round(time.monotonic() - current.started_s, 3) if current is not None else 0.0,
            restarts=self._restarts.total(),
            queries=counted.queries_node + counted.queries_http,
            queries_node=counted.queries_node,
            queries_http=counted.queries_http,
            queries_per_s=round(self._recent.rate, 3),
            p50_s=self._recent.quantile(0.5),
            p99_s=self._recent.quantile(0.99),
            errors=counted.errors,
            reconnects=counted.reconnects,
            ignored=counted.ignored,
            unanswered=self._unanswered,
            last_error=errors[0].error if errors else "",
            last_errors=errors,
        )

    @property
    def counted(self) -> Counters:
        """What all its processes counted together: it goes on where a dead one's ended."""
        counted = Counters()
        counted.add(self._before)
        if self.current is not None and self._is_counted(self.current):
            counted.add(self.current.counters)
            counted.in_flight_node = self.current.counters.in_flight_node
        return counted

    def _is_counted(self, incarnation: Incarnation) -> bool:
        """Return whether what a process counts is of the node that the worker has now."""
        return incarnation.launch.spec.node == self.spec.node

    def adopt(self, spec: WorkerSpec) -> None:
        """Have another spec from now on. At another node nothing has been counted yet."""
        if spec.node != self.spec.node:
            self._before = Counters()
            self._last_end = None
            self._recent = Recent(time.monotonic())
            self._restarts.clear()
            self.succession.replacements.clear()
        self.spec = spec

    def which(self, incarnation: int) -> dict[str, Any]:
        """Return what tells one of its processes from others in the log."""
        return {"node": str(self.spec.node), "incarnation": incarnation}

    @property
    def rates(self) -> list[float]:
        """Its queries a second in the last five minutes, see `Recent`."""
        return self._recent.rates

    def note(self, now_s: float) -> None:
        """End a step of what is remembered of the last five minutes."""
        self._recent.note(now_s, self.counted)

    @property
    def sample(self) -> Sample:
        """The worker as monitoring sees it now."""
        current = self.current
        silent_s = 0.0 if current is None else current.silent_s
        name = self.spec.name
        return Sample(
            self.row,
            self.counted,
            self._restarts,
            self._router.in_flight_at(name),
            silent_s,
            self._router.endings_of(name),
            self.succession.replacements,
        )

    @property
    def _unanswered(self) -> int:
        endings = self._router.endings_of(self.spec.name)
        return sum(endings.get(ending, 0) for ending in (Ending.TIMED_OUT, Ending.WORKER_GONE, Ending.REFUSED))

    @property
    def _detail(self) -> str:
        return self._last_end.words if self._last_end and self._state in ("restarting", "failed") else ""

    async def run(self) -> None:
        """Keep the worker running until it is told to stop."""
        try:
            async with anyio.create_task_group() as tasks:
                while not self.stopping.is_set():
                    began_s = time.monotonic()
                    how = await self._live(tasks)
                    if self.stopping.is_set():
                        break
                    await self._pause(how, time.monotonic() - began_s)
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):  # a successor that was still starting
                for left in list(self._incarnations.values()):
                    left.process.kill()
                    await left.process.ended()
                    await self.bury(left)
            self._state = "stopped"
            self._router.retire(self.spec.name)
            self._ended.set()

    async def _live(self, tasks: TaskGroup) -> str:
        """Run a process, and whoever succeeds it in good order, to an end that nobody planned; return how it ended."""
        try:
            current: Incarnation | None = await self.fork(self.spec, standby=False)
        except SpawnError as exc:
            self._cause = "not_started"
            return str(exc)
        how = ""
        while current is not None:
            self.current = current
            if self.succession.is_stale(current, self.spec):
                why = "its configuration or its handler changed while it was being started"
                tasks.start_soon(self.succession.recycle, why, "configuration", True)
            async with anyio.create_task_group() as looking:
                looking.start_soon(self.succession.on_request, current, tasks)
                await current.ended(START_TIMEOUT_S, self.spec.liveness_timeout_ms / 1000)
                looking.cancel_scope.cancel()
            how = await self.bury(current)
            current = current.successor
        return how

    async def fork(self, spec: WorkerSpec, *, standby: bool) -> Incarnation:
        """Start a process; on standby it waits until it is told to take a place.

        Raises:
            SpawnError: when there is no process to be had.
        """
        self.numbers += 1
        launch = Launch(
            spec=spec,
            incarnation=self.numbers,
            endpoint=self._router.endpoint,
            key=secrets.token_bytes(KEY_BYTES),
            standby=standby,
        )
        self._router.expect(launch, self)
        if not standby:
            self._state = "starting"
        renewals = self.succession.renewals
        try:
            process = await self._fork_server.spawn(launch)
        except SpawnError as exc:
            self._router.drop(launch, str(exc))
            raise
        incarnation = Incarnation(launch, process, self._router, renewals)
        self._incarnations[launch.incarnation] = incarnation
        self._log.info("worker_started", pid=process.pid, node=str(spec.node), incarnation=launch.incarnation)
        if self.stopping.is_set():  # told to while it was being forked
            process.kill()
        return incarnation

    async def bury(self, incarnation: Incarnation) -> str:
        """Let go of an ended process, and answer for what it still had; return how it ended."""
        self._incarnations.pop(incarnation.launch.incarnation, None)
        if self._is_counted(incarnation):
            # Together with the next line: whoever looks finds it in one of the two.
            self._before.add(incarnation.counters)
        if self.current is incarnation:
            self.current = incarnation.successor  # at once: there is a worker all the time
            self._state = "crashed" if self.current is None else self._state
        self._router.drop(
            incarnation.launch,
            "the worker had to end before it was done" if incarnation.draining else "the worker died",
        )
        with anyio.CancelScope(shield=True):  # what is begun here is ended: nobody else knows of the process any more
            ended = await incarnation.process.how()
        how = incarnation.failure or f"the process ended: {ended}"
        self._cause = incarnation.cause or _cause(ended)
        incarnation.process.release()
        return how

    async def _pause(self, how: str, up_s: float) -> None:
        """Decide about a death, and wait as long as that says."""
        decision = self._history.died(time.monotonic(), up_s)
        self._restarts[self._cause] += 1
        self._last_end = Mishap.now(how)
        self._state = "failed" if decision.failed else "restarting"
        if decision.failed:
            self._router.retire(self.spec.name)
        say = self._log.error if decision.failed else self._log.warning
        say("worker_" + self._state, why=how, again_in_s=decision.delay_s, **self.which(self.numbers))
        self.hurry = anyio.Event()
        if not self.stopping.is_set():
            with anyio.move_on_after(decision.delay_s):
                await self.hurry.wait()

    # --- what the worker says (router.Listener) ---

    def on_status(self, incarnation: int, status: ipc.Status) -> None:
        """Take a state change or a heartbeat."""
        if (heard := self._incarnations.get(incarnation)) is not None:
            heard.hear(status)

    def on_failed(self, incarnation: int, reason: str) -> None:
        """Take the reason why a worker cannot go on; its process ends by itself."""
        if (heard := self._incarnations.get(incarnation)) is not None:
            heard.failure, heard.cause = reason, "gave_up"

    def on_recycle(self, incarnation: int, reason: str) -> None:
        """Take a worker's wish for a successor."""
        if (heard := self._incarnations.get(incarnation)) is not None:
            heard.ask_for_successor(reason)

    def on_legacy(self, incarnation: int, memory: bytes) -> None:
        """Take what a draining worker leaves to its successor."""
        if (heard := self._incarnations.get(incarnation)) is not None:
            heard.legacy = memory

    def judge_by(self, policy: RestartPolicy) -> None:
        """Decide about deaths by another policy from now on."""
        self._history.policy = policy

    # --- the end ---

    def retire(self) -> None:
        """Let the worker's next end be its last."""
        self.stopping.set()
        self.hurry.set()

    async def drain(self, timeout_s: float) -> None:
        """Have the worker finish what is in flight and leave; kill it when it takes longer than `timeout_s`."""
        self.retire()
        current = self.current
        for incarnation in list(self._incarnations.values()):
            if incarnation is not current and (current is None or current.successor is not incarnation):
                incarnation.kill()
        if current is not None:
            current.successor = None
            await current.drain(timeout_s)
        for incarnation in list(self._incarnations.values()):
            incarnation.kill()
        await self._ended.wait()

    def kill(self) -> None:
        """End the worker at once."""
        self.retire()
        for incarnation in list(self._incarnations.values()):
            incarnation.kill()


def _cause(ended: str) -> RestartReason:
    """Return in a word how a process ended that said nothing of it before."""
    if ended.startswith("killed"):
        return "killed"
    return "exited" if ended.startswith("exit") else "unknown"
