"""One worker and its successive processes: started, watched, started again, replaced in good order, drained."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Any, Final

import anyio
from anyio.abc import TaskGroup

from runner.incarnation import Incarnation
from runner.lines import Ending
from runner.metrics import Sample
from runner.process import ForkServer, SpawnError
from runner.recent import Recent
from runner.restarts import ReplacementReason, RestartHistory, RestartPolicy, RestartReason
from runner.router import Router
from runner.table import ChildState, WorkerRow, last_errors
from shared import ipc
from shared.config import WorkerSpec
from shared.handlers import HandlerRef
from shared.ipc import KEY_BYTES, Counters, Launch, Mishap
from shared.logs import get_logger

START_TIMEOUT_S: Final = 60.0
"""How long a worker may take to load its handler and set it up."""

_LATE: Final = f"it was not up within {START_TIMEOUT_S:.0f} s of its start"

KILL_GRACE_S: Final = 0.5
"""How much longer than its own time for draining a worker gets before it is killed."""


class Child:
    """One worker and its successive processes."""

    def __init__(self, spec: WorkerSpec, policy: RestartPolicy, fork_server: ForkServer, router: Router) -> None:
        self.spec = spec
        self._fork_server = fork_server
        self._router = router
        self._history = RestartHistory(policy)
        self._state: ChildState = "starting"
        self._last_end: Mishap | None = None
        self._current: Incarnation | None = None
        self._incarnations: dict[int, Incarnation] = {}
        self._numbers = 0
        self._restarts: Counter[RestartReason] = Counter()
        self._cause: RestartReason = "unknown"
        self._before = Counters()
        self._recent = Recent(time.monotonic())
        self._renewals = 0
        self._hurry = anyio.Event()
        self._stopping = anyio.Event()
        self._ended = anyio.Event()
        self._outdated = anyio.Event()
        self._starting: WorkerSpec | None = None
        self._handover = anyio.Lock()
        self._replacements: Counter[ReplacementReason] = Counter()
        self._log = get_logger("supervisor").bind(worker=spec.name, agent=spec.agent.name)

    @property
    def row(self) -> WorkerRow:
        """The worker as operators see it now."""
        current, counted = self._current, self.counted
        errors = last_errors(counted.handler_error, counted.connection_error, self._last_end)
        return WorkerRow(
            name=self.spec.name,
            agent=self.spec.agent.name,
            node=str(self.spec.node),
            state=self._state if current is None else current.state,
            detail=self._detail if current is None else current.detail,
            pid=current.process.pid if current is not None else None,
            incarnation=self._numbers if current is None else current.launch.incarnation,
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
        if self._current is not None and self._is_counted(self._current):
            counted.add(self._current.counters)
            counted.in_flight_node = self._current.counters.in_flight_node
        return counted

    def _is_counted(self, incarnation: Incarnation) -> bool:
        """Return whether what a process counts is of the node that the worker has now."""
        return incarnation.launch.spec.node == self.spec.node

    def _adopt(self, spec: WorkerSpec) -> None:
        """Have another spec from now on. At another node nothing has been counted yet."""
        if spec.node != self.spec.node:
            self._before = Counters()
            self._last_end = None
            self._recent = Recent(time.monotonic())
            self._restarts.clear()
            self._replacements.clear()
        self.spec = spec

    def _which(self, incarnation: int) -> dict[str, Any]:
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
        current = self._current
        silent_s = 0.0 if current is None else current.silent_s
        name = self.spec.name
        return Sample(
            self.row,
            self.counted,
            self._restarts,
            self._router.in_flight_at(name),
            silent_s,
            self._router.endings_of(name),
            self._replacements,
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
                while not self._stopping.is_set():
                    began_s = time.monotonic()
                    how = await self._live(tasks)
                    if self._stopping.is_set():
                        break
                    await self._pause(how, time.monotonic() - began_s)
                tasks.cancel_scope.cancel()
        finally:
            self._state = "stopped"
            self._router.retire(self.spec.name)
            self._ended.set()

    async def _live(self, tasks: TaskGroup) -> str:
        """Run a process, and whoever succeeds it in good order, to an end that nobody planned; return how it ended."""
        try:
            current: Incarnation | None = await self._fork(self.spec, standby=False)
        except SpawnError as exc:
            self._cause = "not_started"
            return str(exc)
        how = ""
        while current is not None:
            self._current = current
            if self._is_stale(current, self.spec):
                why = "its configuration or its handler changed while it was being started"
                tasks.start_soon(self._recycle, why, "configuration", True)
            async with anyio.create_task_group() as looking:
                looking.start_soon(self._recycle_on_request, current, tasks)
                await current.ended(START_TIMEOUT_S, self.spec.liveness_timeout_ms / 1000)
                looking.cancel_scope.cancel()
            how = await self._bury(current)
            current = current.successor
        return how

    async def _fork(self, spec: WorkerSpec, *, standby: bool) -> Incarnation:
        self._numbers += 1
        launch = Launch(
            spec=spec,
            incarnation=self._numbers,
            endpoint=self._router.endpoint,
            key=secrets.token_bytes(KEY_BYTES),
            standby=standby,
        )
        self._router.expect(launch, self)
        if not standby:
            self._state = "starting"
        renewals = self._renewals
        try:
            process = await self._fork_server.spawn(launch)
        except SpawnError as exc:
            self._router.drop(launch, str(exc))
            raise
        incarnation = Incarnation(launch, process, self._router, renewals)
        self._incarnations[launch.incarnation] = incarnation
        self._log.info("worker_started", pid=process.pid, node=str(spec.node), incarnation=launch.incarnation)
        if self._stopping.is_set():  # told to while it was being forked
            process.kill()
        return incarnation

    async def _bury(self, incarnation: Incarnation) -> str:
        """Let go of an ended process, and answer for what it still had; return how it ended."""
        self._incarnations.pop(incarnation.launch.incarnation, None)
        if self._is_counted(incarnation):
            self._before.add(
                incarnation.counters
            )  # together with the next line: whoever looks finds it in one of the two
        if self._current is incarnation:
            self._current = None
            self._state = "crashed"
        self._router.drop(
            incarnation.launch,
            "the worker had to end before it was done" if incarnation.draining else "the worker died",
        )
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
        say("worker_" + self._state, why=how, again_in_s=decision.delay_s, **self._which(self._numbers))
        self._hurry = anyio.Event()
        if not self._stopping.is_set():
            with anyio.move_on_after(decision.delay_s):
                await self._hurry.wait()

    # --- one process takes another's place ---

    async def renew(self, why: str) -> str:
        """Have a process that loads the handler afresh take over; one that waits to be started is started now.

        Returns why the new one did not come up and the old one stays, and leaves it to the caller to say so; else "".
        """
        self._renewals += 1
        self._hurry.set()
        return await self._replace(None, why, "handler", if_stale=True)

    async def replace(
        self, spec: WorkerSpec | None, why: str, reason: ReplacementReason, *, if_stale: bool = False
    ) -> bool:
        """Have a new process take over from the running one, without a query lost and with its memory.

        The new one has loaded its handler and waits before the old one lets go. Without a running one,
        `spec` holds from the next start on; None is the one that it has. With `if_stale` a process that was
        started since is left alone. Returns whether there is a worker by the new spec, or will be; False when the
        new process did not come up and the old one stays.
        """
        if problem := await self._replace(spec, why, reason, if_stale):
            self._log.error("replacement_failed", why=problem, **self._which(self._numbers))
        return not problem

    async def _replace(self, spec: WorkerSpec | None, why: str, reason: ReplacementReason, if_stale: bool) -> str:
        async with self._handover:
            spec = spec or self.spec  # as it is now: another replacement may just have changed it
            while True:
                old = self._current
                if old is None or self._stopping.is_set() or (if_stale and not self._is_stale(old, spec)):
                    self._adopt(spec)
                    return ""
                problem = await self._replace_once(old, spec, why, reason)
                if problem is not None:
                    return problem
                if_stale = True

    def _is_stale(self, incarnation: Incarnation, spec: WorkerSpec) -> bool:
        return incarnation.launch.spec != spec or incarnation.renewals != self._renewals

    async def _replace_once(
        self, old: Incarnation, spec: WorkerSpec, why: str, reason: ReplacementReason
    ) -> str | None:
        """Try to replace a running process, and return why that failed or "".

        None means that it is to be tried again: the old process ended meanwhile, and another one runs or will; or the
        handler was written anew while a new configuration's successor was starting with it.
        """
        self._outdated, self._starting = anyio.Event(), spec
        try:
            new = await self._fork(spec, standby=True)
            up = await self._comes_up(new)
        except SpawnError as exc:
            return str(exc)
        finally:
            self._starting = None
        if up and self._current is old and not self._stopping.is_set():
            await self._hand_over(old, new, why, reason)
            return ""
        if not up:
            late = "its handler was written anew meanwhile" if self._outdated.is_set() else _LATE
            new.failure = new.failure or ("" if new.process.has_ended else late)
        new.process.kill()
        await new.process.ended()
        await new.hear_out()
        found = await self._bury(new)
        if self._stopping.is_set():
            return ""
        if up:
            self._adopt(spec)  # whoever is started next has it; who has been started without it is replaced
            return None
        return None if self._outdated.is_set() and reason == "configuration" else found

    async def _comes_up(self, new: Incarnation) -> bool:
        """Wait until a successor stands by; False when it ends, takes too long, or is out of date before that."""
        up = False

        async def wait() -> None:
            nonlocal up
            up = await new.reached("standby")
            tasks.cancel_scope.cancel()

        with anyio.move_on_after(START_TIMEOUT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await self._outdated.wait()
                tasks.cancel_scope.cancel()
        return up

    def outdate(self, handler: HandlerRef) -> None:
        """Wait no longer for a successor that is still starting with a handler that has been written anew meanwhile."""
        if self._starting is not None and self._starting.agent.handler == handler:
            self._outdated.set()

    async def _hand_over(self, old: Incarnation, new: Incarnation, why: str, reason: ReplacementReason) -> None:
        which = self._which(old.launch.incarnation)
        self._log.info("worker_replaced", why=why, pid=old.process.pid, by=new.process.pid, **which)
        old.successor = new
        spec = new.launch.spec
        self._adopt(spec)
        self._replacements[reason] += 1
        # What has begun may go on for its own time, not only for that of a shutdown: nobody is in a hurry.
        longest_ms = max(spec.shutdown_timeout_ms, old.launch.spec.agent.handler_timeout_ms)
        await old.drain(longest_ms / 1000 + KILL_GRACE_S, hand_over=True)
        if old.legacy is None and spec.agent.memory == "ram" == old.launch.spec.agent.memory:
            why = "the worker left nothing; the agent starts with an empty one"
            self._log.error("memory_not_handed_over", why=why, **which)
        self._router.promote(new.launch, old.legacy or None)  # empty: it has said itself why there is nothing

    async def _recycle_on_request(self, incarnation: Incarnation, tasks: TaskGroup) -> None:
        while True:
            while not incarnation.wants_successor:
                await incarnation.changed.wait()
            # In the child's own group: this task ends with the incarnation that is being replaced.
            tasks.start_soon(self._recycle, incarnation.wants_successor, "limit")
            incarnation.wants_successor = ""

    async def _recycle(self, why: str, reason: ReplacementReason, if_stale: bool = False) -> None:
        try:
            await self.replace(None, why, reason, if_stale=if_stale)
        except Exception as exc:  # noqa: BLE001 - a fault of ours here must not end the worker that still runs
            self._log.error("replacement_failed", exc_info=exc, **self._which(self._numbers))

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

    def adopt(self, policy: RestartPolicy) -> None:
        """Decide about deaths by another policy from now on."""
        self._history.policy = policy

    # --- the end ---

    def retire(self) -> None:
        """Let the worker's next end be its last."""
        self._stopping.set()
        self._hurry.set()

    async def drain(self, timeout_s: float) -> None:
        """Have the worker finish what is in flight and leave; kill it when it takes longer than `timeout_s`."""
        self.retire()
        current = self._current
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
