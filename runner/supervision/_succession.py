"""Replaces a running process of a worker by a new one, without losing a query or the memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio
import msgspec
from anyio.abc import TaskGroup

from runner.routing.router import Router
from runner.supervision._incarnation import Incarnation
from runner.supervision._lineage import Lineage
from runner.supervision.memories import hand_over, move_file
from runner.supervision.restarts import Failure, ReplacementKind
from shared.config.handlers import HandlerRef
from shared.config.load import WorkerSpec
from shared.errors import StartError

START_TIMEOUT_S: Final = 60.0
"""How long a worker may take to load its handler and set it up."""

KILL_GRACE_S: Final = 0.5
"""The time between the end of a worker's own drain timeout and its kill."""

_LATE: Final = Failure("not_up", f"it was not up within {START_TIMEOUT_S:.0f} s of its start")
_OUTDATED: Final = Failure("not_up", "its handler changed again while it was being started")


class Replacement(msgspec.Struct, frozen=True):
    """A request to replace a worker's running process.

    Attributes:
        kind: why, for metrics.
        reason: why, for the log.
        spec: the worker's new spec; None keeps the spec that it has when the replacement starts.
        only_if_stale: replace only a process that has another spec or an older handler.
        instead_of: replace only this process.
        moves_memory: the memory moves to the new spec's node, because the old node is gone.
    """

    kind: ReplacementKind
    reason: str
    spec: WorkerSpec | None = None
    only_if_stale: bool = False
    instead_of: Incarnation | None = None
    moves_memory: bool = False


class _Overtaken(msgspec.Struct, frozen=True):
    """Meanwhile the old process ended, or the handler changed again. Another attempt is needed."""


class Succession:
    """The planned replacements of one worker's processes.

    Args:
        lineage: the worker's processes.
        router: gives the worker's name to the new process.
    """

    def __init__(self, lineage: Lineage, router: Router) -> None:
        self._lineage = lineage
        self._router = router
        self._outdated = anyio.Event()
        self._starting_spec: WorkerSpec | None = None
        self._one_at_a_time = anyio.Lock()

    async def replace_for_handler(self, reason: str) -> Failure | None:
        """Replace the process because its handler changed. Without a process, start one now.

        Returns why the old process stays, which the caller logs; None if it was replaced.
        """
        self._lineage.handler_version += 1
        self._lineage.restart_now.set()
        return await self.replace(Replacement("handler", reason, only_if_stale=True))

    async def replace(self, replacement: Replacement) -> Failure | None:
        """Replace the running process, and log a failure, except one of the kind `handler`.

        The new process loads its handler and stands by before the old one disconnects. If no
        process runs, the spec applies from the next start. The caller logs a failure of the kind
        `handler`. An internal error is always logged.

        Returns why the old process stays; None if the worker runs with the new spec, or will.
        """
        try:
            failure = await self._replace(replacement)
        except Exception as exc:  # this must not end healthy processes
            self._lineage.log.error("replacement_failed", exc_info=exc)
            return Failure("unknown", f"an internal error: {type(exc).__name__}")
        if failure is not None and replacement.kind != "handler":
            self._lineage.log.error("replacement_failed", reason=failure.reason)
        return failure

    async def _replace(self, replacement: Replacement) -> Failure | None:
        lineage, only_if_stale = self._lineage, replacement.only_if_stale
        async with self._one_at_a_time:
            # After the lock, because an earlier replacement may have changed the spec.
            spec = replacement.spec or lineage.spec
            while True:
                old = lineage.current
                if replacement.instead_of not in (None, old):
                    return None
                if old is None:
                    self._adopt_without_process(
                        spec,
                        moves_memory=replacement.moves_memory,
                    )
                    return None
                is_up_to_date = only_if_stale and not lineage.is_stale(old, spec)
                if is_up_to_date or lineage.stopping.is_set():
                    lineage.adopt(spec)
                    return None
                result = await self._try_once(old, spec, replacement)
                if not isinstance(result, _Overtaken):
                    return result
                # The process that is current now may have the new spec already.
                only_if_stale = True

    def _adopt_without_process(self, spec: WorkerSpec, *, moves_memory: bool) -> None:
        """Adopt a spec while no process runs, and restart the worker now if the spec is new."""
        lineage = self._lineage
        if moves_memory:
            move_file(lineage.spec, spec)
        if spec != lineage.spec:
            # The worker may wait for its restart after a failure that the new spec fixes.
            lineage.restart_now.set()
        lineage.adopt(spec)

    async def _try_once(
        self,
        old: Incarnation,
        spec: WorkerSpec,
        replacement: Replacement,
    ) -> Failure | _Overtaken | None:
        """Start a new process, and have it take over from the old one once it stands by.

        Returns why the new process did not come up; None if it took over, or the worker stops.
        """
        lineage = self._lineage
        self._outdated = anyio.Event()
        self._starting_spec = spec
        try:
            new = await lineage.fork(spec, standby=True)
            is_up = await self._wait_until_up(new)
        except StartError as exc:
            return Failure("not_started", str(exc))
        finally:
            self._starting_spec = None
        # There is no `await` between this check and the start of the hand-over, so it still holds.
        may_take_over = lineage.current is old and not lineage.stopping.is_set()
        if is_up and may_take_over:
            await self._hand_over(old, new, replacement)
            return None
        failure = await self._discard(new, is_up=is_up)
        if lineage.stopping.is_set():
            return None
        if is_up:
            # The old process has ended, and another one with the old spec may run already.
            # Restarts use the new spec from now on, unless the memory moves. Its file can be
            # renamed only while no process has it open, so that is left to the next attempt.
            if lineage.current is not None and not replacement.moves_memory:
                lineage.adopt(spec)
            return _Overtaken()
        # If a reload gives the worker this handler, and the file was saved again while the new
        # process was loading it: the watcher replaces only workers that have the handler already,
        # and a reload is not repeated. So the replacement is repeated here.
        if self._outdated.is_set() and replacement.kind == "configuration":
            return _Overtaken()
        return failure

    async def _wait_until_up(self, new: Incarnation) -> bool:
        """Wait until a new process stands by; False if it ends, is late, or is outdated."""
        with anyio.move_on_after(START_TIMEOUT_S):
            await _first_of(
                new.wait_for_standby,
                new.process.ended.wait,
                self._outdated.wait,
            )
        return new.state == "standby" and not new.process.ended.is_set()

    async def _discard(self, new: Incarnation, *, is_up: bool) -> Failure:
        """Kill and reap a new process that does not take over. Return why."""
        if not is_up and not new.process.ended.is_set():
            late = _OUTDATED if self._outdated.is_set() else _LATE
            new.failure = new.failure or late
        new.process.kill()
        await new.process.ended.wait()
        await new.receive_last_messages()  # they have the reason of a handler that failed
        return await self._lineage.reap(new)

    async def _hand_over(
        self,
        old: Incarnation,
        new: Incarnation,
        replacement: Replacement,
    ) -> None:
        lineage = self._lineage
        old.log.info(
            "worker_replaced",
            reason=replacement.reason,
            pid=old.process.pid,
            by=new.process.pid,
        )
        # From here on the end of the old process is planned: the child continues with the new one.
        old.successor = new
        before = old.launch.spec
        after = new.launch.spec
        lineage.adopt(after)
        lineage.record.replacements[replacement.kind] += 1
        # A shutdown has to be over soon, a replacement need not be: a running query may use its
        # handler's whole timeout.
        longest_ms = max(
            after.agent.supervision.shutdown_timeout_ms,
            before.agent.supervision.handler_timeout_ms,
        )
        timeout_s = longest_ms / 1000 + KILL_GRACE_S
        await old.drain(timeout_s, hand_over=True)
        # Only after the end of the old process, which holds the lock on the memory's file.
        memory = hand_over(
            old.launch,
            after,
            old.handover,
            moves=replacement.moves_memory,
        )
        self._router.promote(new.launch, memory)

    def give_up_starting(self, handler: HandlerRef) -> None:
        """Give up a new process that is still loading this handler, because the handler changed."""
        spec = self._starting_spec
        if spec is not None and spec.agent.handler == handler:
            self._outdated.set()

    async def replace_on_request(self, incarnation: Incarnation, tasks: TaskGroup) -> None:
        """Replace a process whenever it asks for that, until cancelled."""
        while True:
            while (reason := incarnation.replacement_reason) is None:
                await incarnation.changed.wait()
            incarnation.replacement_reason = None
            # In the child's task group, because this task is cancelled when the incarnation ends,
            # and that is in the middle of the replacement.
            replacement = Replacement(
                "limit",
                reason,
                instead_of=incarnation,
            )
            tasks.start_soon(self.replace, replacement)


async def _first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait until the first of these is done, and cancel the others."""

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for wait in waits:
            tasks.start_soon(run, wait)
