"""One worker: restarts its process after an unexpected end, and has it replaced or drained."""

from __future__ import annotations

import time
from math import inf

import anyio
from anyio.abc import TaskGroup

from runner.routing.peers import UNSERVED
from runner.routing.router import Router
from runner.supervision._lineage import Lineage
from runner.supervision._succession import START_TIMEOUT_S, Replacement, Succession
from runner.supervision.fork_server import ForkServer
from runner.supervision.restarts import Failure, RestartHistory, RestartPolicy
from runner.supervision.sample import Sample
from runner.table import ChildState, WorkerRow, last_errors
from shared.config.handlers import HandlerRef
from shared.config.load import WorkerSpec
from shared.errors import StartError
from shared.ipc import LastError


class Child:
    """One worker, across all its processes."""

    def __init__(
        self,
        spec: WorkerSpec,
        policy: RestartPolicy,
        fork_server: ForkServer,
        router: Router,
    ) -> None:
        self._lineage = Lineage(spec, fork_server, router)
        self._succession = Succession(self._lineage, router)
        self._history = RestartHistory(policy)
        self._router = router
        self._state: ChildState = "starting"  # while no process is current
        self._ended = anyio.Event()

    @property
    def spec(self) -> WorkerSpec:
        """The spec of the worker's next process."""
        return self._lineage.spec

    # --- what operators and monitoring see ---

    @property
    def row(self) -> WorkerRow:
        """The worker as operators see it now."""
        lineage = self._lineage
        spec = lineage.spec
        record = lineage.record
        counted = lineage.counted
        failure = record.last_failure
        current = lineage.current
        state: ChildState
        if current is not None:
            state = current.state
            reason = current.reason
            pid = current.process.pid
            incarnation = current.launch.incarnation
            uptime_s = time.monotonic() - current.started_s
        else:
            state = self._state
            pid = None
            uptime_s = 0.0
            # A new process that is still being forked has nothing to do with the last failure.
            is_down = state in ("restarting", "failed")
            reason = failure.error if failure and is_down else ""
            incarnation = lineage.incarnation_count
        errors = last_errors(
            counted.handler_error,
            counted.connection_error,
            failure,
        )
        outcomes = self._router.outcomes_of(spec.name)
        return WorkerRow(
            name=spec.name,
            agent=spec.agent.name,
            node=str(spec.node),
            state=state,
            reason=reason,
            pid=pid,
            incarnation=incarnation,
            uptime_s=round(uptime_s, 3),
            restarts=record.restarts.total(),
            queries=counted.answered_node + counted.answered_direct,
            queries_node=counted.answered_node,
            queries_direct=counted.answered_direct,
            queries_per_s=round(record.recent.rate, 3),
            p50_s=record.recent.quantile(0.5),
            p99_s=record.recent.quantile(0.99),
            errors=counted.errors,
            connection_failures=counted.connection_failures,
            ignored=counted.ignored,
            unserved=sum(outcomes.get(each, 0) for each in UNSERVED),
            last_error=errors[0].error if errors else "",
            last_errors=errors,
        )

    @property
    def sample(self) -> Sample:
        """The worker as monitoring sees it now."""
        name = self.spec.name
        record = self._lineage.record
        current = self._lineage.current
        return Sample(
            row=self.row,
            counted=self._lineage.counted,
            restarts=dict(record.restarts),
            in_flight=self._router.in_flight_at(name),
            silent_s=0.0 if current is None else current.silent_s,
            outcomes=dict(self._router.outcomes_of(name)),
            replacements=dict(record.replacements),
        )

    @property
    def rates(self) -> list[float]:
        """The worker's queries per second in the steps of the last five minutes."""
        return self._lineage.record.recent.rates

    def record_counts(self) -> None:
        """Record what the worker has counted until now, for `rates` and for its row."""
        recent = self._lineage.record.recent
        recent.record(time.monotonic(), self._lineage.counted)

    # --- restarts ---

    async def run(self) -> None:
        """Keep the worker running until it is stopped."""
        stopping = self._lineage.stopping
        try:
            async with anyio.create_task_group() as tasks:
                while not stopping.is_set():
                    failure, up_s = await self._run_until_failure(tasks)
                    if not stopping.is_set():
                        await self._wait_for_restart(failure, up_s)
                tasks.cancel_scope.cancel()
        finally:
            # A successor may still be starting. It is reaped even if this task is cancelled, since
            # a process that no one reaps would keep its descriptors and its process group.
            with anyio.CancelScope(shield=True):
                await self._lineage.reap_all()
            self._state = "stopped"
            self._router.refuse_held(self.spec.name)
            self._ended.set()

    async def _run_until_failure(self, tasks: TaskGroup) -> tuple[Failure, float]:
        """Run a process and its planned successors until one ends unexpectedly.

        Returns:
            Why it ended, and how long the worker was up: 0.0 if no process had loaded its handler.
        """
        lineage = self._lineage
        up_since_s = inf
        self._state = "starting"
        try:
            current = await lineage.fork(lineage.spec, standby=False)
        except StartError as exc:
            return Failure("not_started", str(exc)), 0.0
        # Set in advance: it is shown only while no process is current.
        self._state = "crashed"
        while True:
            lineage.current = current
            # A replacement finds no process to replace while one is being forked. It then changes
            # only the spec, so the process must be checked once it is current.
            if lineage.is_stale(current, lineage.spec):
                reason = "its configuration or its handler changed while it was being started"
                stale = Replacement(
                    "configuration",
                    reason,
                    only_if_stale=True,
                )
                tasks.start_soon(self._succession.replace, stale)
            async with anyio.create_task_group() as watching:
                watching.start_soon(self._succession.replace_on_request, current, tasks)
                liveness_timeout_s = self.spec.agent.supervision.liveness_timeout_ms / 1000
                await current.watch_until_ended(START_TIMEOUT_S, liveness_timeout_s)
                watching.cancel_scope.cancel()
            up_since_s = min(up_since_s, current.up_since_s)
            failure = await lineage.reap(current)
            if current.successor is None:
                return failure, max(0.0, time.monotonic() - up_since_s)
            current = current.successor

    async def _wait_for_restart(self, failure: Failure, up_s: float) -> None:
        """Decide when to restart after an unexpected end, and wait until then."""
        lineage = self._lineage
        decision = self._history.record_end(time.monotonic(), up_s)
        lineage.record.restarts[failure.kind] += 1
        lineage.record.last_failure = LastError.now(failure.reason)
        fields = {
            "kind": failure.kind,
            "reason": failure.reason,
            "again_in_s": decision.delay_s,
        }
        if decision.failed:
            self._state = "failed"
            # Held queries wait for a worker that restarts soon, not for one that may not recover.
            self._router.refuse_held(self.spec.name)
            lineage.log.error("worker_failed", **fields)
        else:
            self._state = "restarting"
            lineage.log.warning("worker_restarting", **fields)
        # A new event for each wait: an earlier request must not skip this delay.
        lineage.restart_now = anyio.Event()
        with anyio.move_on_after(decision.delay_s):
            await lineage.restart_now.wait()

    def set_policy(self, policy: RestartPolicy) -> None:
        """Restart the worker by another policy from now on. Its recent restarts still count."""
        self._history.policy = policy

    # --- replacements ---

    async def replace_for_configuration(
        self, spec: WorkerSpec, *, moves_memory: bool
    ) -> Failure | None:
        """Replace the process by one with another spec. Without a process, restart the worker now.

        Args:
            spec: the worker's new spec.
            moves_memory: the memory moves to the spec's node, because the old node is gone.

        Returns:
            Why the old process stays; None if the worker runs with the new spec, or will.
        """
        replacement = Replacement(
            "configuration",
            "its configuration has changed",
            spec,
            moves_memory=moves_memory,
        )
        return await self._succession.replace(replacement)

    async def replace_for_handler(self, reason: str) -> Failure | None:
        """Replace the process because its handler changed. Without a process, start one now.

        Returns why the old process stays, which the caller logs; None if it was replaced.
        """
        return await self._succession.replace_for_handler(reason)

    def give_up_starting(self, handler: HandlerRef) -> None:
        """Give up a new process that is still loading this handler, because the handler changed."""
        self._succession.give_up_starting(handler)

    # --- the end ---

    def stop_restarting(self) -> None:
        """Do not restart the worker when it next exits."""
        self._lineage.stopping.set()
        self._lineage.restart_now.set()

    async def drain(self, timeout_s: float) -> None:
        """Have the worker finish its queries in flight and exit. Kill it after `timeout_s`."""
        self.stop_restarting()
        current = self._lineage.current
        if current is not None:
            # The successor is killed below, not here: `Succession` promotes it when this process
            # ends, and the log would say of a killed one that it is unreachable.
            self._lineage.kill(spared=(current, current.successor))
            current.successor = None
            await current.drain(timeout_s)
        self._lineage.kill()
        await self._ended.wait()

    def kill(self) -> None:
        """Kill the worker's processes, and do not restart it."""
        self.stop_restarting()
        self._lineage.kill()
