"""How one process of a worker takes another's place in good order: without a query lost, and with its memory."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import TaskGroup

from runner.incarnation import Incarnation
from runner.memories import move_file
from runner.process import SpawnError
from runner.restarts import ReplacementReason
from runner.router import Router
from shared.config import WorkerSpec
from shared.handlers import HandlerRef
from shared.logs import Logger

if TYPE_CHECKING:
    from runner.child import Child

START_TIMEOUT_S: Final = 60.0
"""How long a worker may take to load its handler and set it up."""

_LATE: Final = f"it was not up within {START_TIMEOUT_S:.0f} s of its start"

KILL_GRACE_S: Final = 0.5
"""How much longer than its own time for draining a worker gets before it is killed."""


class Succession:
    """The successors of one worker's processes.

    Args:
        child: the worker.
        router: told who has the worker's name.
        log: where to.

    Attributes:
        renewals: how often the handler has been renewed: a process that was started before is out of date.
        replacements: how many processes took another's place, by the reason.
    """

    def __init__(self, child: Child, router: Router, log: Logger) -> None:
        self._child = child
        self._router = router
        self._log = log
        self.renewals = 0
        self.replacements: Counter[ReplacementReason] = Counter()
        self._outdated = anyio.Event()
        self._starting: WorkerSpec | None = None
        self._handover = anyio.Lock()

    async def renew(self, why: str) -> str:
        """Have a process that loads the handler afresh take over; one that waits to be started is started now.

        Returns why the new one did not come up and the old one stays, and leaves it to the caller to say so; else "".
        """
        self.renewals += 1
        self._child.hurry.set()
        return await self._replace(None, why, "handler", if_stale=True)

    async def replace(
        self,
        spec: WorkerSpec | None,
        why: str,
        reason: ReplacementReason,
        *,
        if_stale: bool = False,
        moves: bool = False,
        instead_of: Incarnation | None = None,
    ) -> bool:
        """Have a new process take over from the running one, without a query lost and with its memory.

        The new one has loaded its handler and waits before the old one lets go. Without a running one,
        `spec` holds from the next start on; None is the one that it has. With `if_stale` a process that was
        started since is left alone; with `instead_of` all but that one. With `moves` the memory goes along to another
        node, which has taken the place of the one that is gone.

        Returns whether there is a worker by the new spec, or will be; False when the new process did not come up and
        the old one stays.
        """
        if problem := await self._replace(spec, why, reason, if_stale, moves, instead_of):
            self._log.error("replacement_failed", why=problem, **self._child.which(self._child.numbers))
        return not problem

    async def _replace(
        self,
        spec: WorkerSpec | None,
        why: str,
        reason: ReplacementReason,
        if_stale: bool,
        moves: bool = False,
        instead_of: Incarnation | None = None,
    ) -> str:
        async with self._handover:
            spec = spec or self._child.spec  # as it is now: another replacement may just have changed it
            while True:
                old = self._child.current
                if instead_of is not None and old is not instead_of:
                    return ""
                if old is None and moves:  # there is nobody who has it open
                    move_file(self._child.spec, spec)
                if old is None or self._child.stopping.is_set() or (if_stale and not self.is_stale(old, spec)):
                    if old is None and spec != self._child.spec:
                        self._child.hurry.set()  # what it died of may be mended by that
                    self._child.adopt(spec)
                    return ""
                problem = await self._replace_once(old, spec, why, reason, moves)
                if problem is not None:
                    return problem
                if_stale = True

    def is_stale(self, incarnation: Incarnation, spec: WorkerSpec) -> bool:
        """Return whether a process was started by another spec, or with a handler that was renewed since."""
        return incarnation.launch.spec != spec or incarnation.renewals != self.renewals

    async def _replace_once(
        self, old: Incarnation, spec: WorkerSpec, why: str, reason: ReplacementReason, moves: bool
    ) -> str | None:
        """Try to replace a running process, and return why that failed or "".

        None means that it is to be tried again: the old process ended meanwhile, and another one runs or will; or the
        handler was written anew while a new configuration's successor was starting with it.
        """
        self._outdated, self._starting = anyio.Event(), spec
        try:
            new = await self._child.fork(spec, standby=True)
            up = await self._comes_up(new)
        except SpawnError as exc:
            return str(exc)
        finally:
            self._starting = None
        if up and self._child.current is old and not self._child.stopping.is_set():
            await self._hand_over(old, new, why, reason, moves)
            return ""
        if not up:
            late = "its handler was written anew meanwhile" if self._outdated.is_set() else _LATE
            new.failure = new.failure or ("" if new.process.has_ended else late)
        new.process.kill()
        await new.process.ended()
        await new.hear_out()
        found = await self._child.bury(new)
        if self._child.stopping.is_set():
            return ""
        if up:
            if moves and self._child.current is None:
                move_file(self._child.spec, spec)
            self._child.adopt(spec)  # whoever is started next has it; who has been started without it is replaced
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

    async def _hand_over(
        self, old: Incarnation, new: Incarnation, why: str, reason: ReplacementReason, moves: bool
    ) -> None:
        which = self._child.which(old.launch.incarnation)
        self._log.info("worker_replaced", why=why, pid=old.process.pid, by=new.process.pid, **which)
        old.successor = new
        spec = new.launch.spec
        self._child.adopt(spec)
        self.replacements[reason] += 1
        # What has begun may go on for its own time, not only for that of a shutdown: nobody is in a hurry.
        longest_ms = max(spec.shutdown_timeout_ms, old.launch.spec.agent.handler_timeout_ms)
        await old.drain(longest_ms / 1000 + KILL_GRACE_S, hand_over=True)
        memory = old.legacy or None  # empty: it has said itself why there is nothing
        if moves:
            move_file(old.launch.spec, spec)
        elif old.launch.spec.node != spec.node:
            memory = None
        if memory is None and old.legacy != b"" and spec.agent.memory == "ram" == old.launch.spec.agent.memory:
            why = "the worker left nothing" if old.legacy is None else "it is of a node that has another worker now"
            self._log.error("memory_not_handed_over", why=f"{why}; the agent starts with an empty one", **which)
        self._router.promote(new.launch, memory)

    async def on_request(self, incarnation: Incarnation, tasks: TaskGroup) -> None:
        """Have a process replaced whenever it asks for it, until cancelled."""
        while True:
            while not incarnation.wants_successor:
                await incarnation.changed.wait()
            # In the child's own group: this task ends with the incarnation that is being replaced.
            tasks.start_soon(self.recycle, incarnation.wants_successor, "limit", False, incarnation)
            incarnation.wants_successor = ""

    async def recycle(
        self, why: str, reason: ReplacementReason, if_stale: bool = False, instead_of: Incarnation | None = None
    ) -> None:
        """Do what `replace` does with the spec that it has; never raises."""
        try:
            await self.replace(None, why, reason, if_stale=if_stale, instead_of=instead_of)
        except Exception as exc:  # noqa: BLE001 - a fault of ours here must not end the worker that still runs
            self._log.error("replacement_failed", exc_info=exc, **self._child.which(self._child.numbers))
