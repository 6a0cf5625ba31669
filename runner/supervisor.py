"""All the workers: which there are, and what is done to several of them at once.

Children are independent: what happens to one is never a reason to touch another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import anyio
import msgspec

from runner.child import Child
from runner.memories import moves
from runner.metrics import Sample
from runner.process import ForkServer
from runner.recent import STEP_S
from runner.restarts import RestartPolicy
from runner.router import Router
from runner.succession import KILL_GRACE_S
from runner.table import WorkerRow
from shared.config import WorkerSpec
from shared.handlers import HandlerRef

REPLACED_AT_ONCE: Final = 4
"""How many workers a reload replaces at a time: each is there twice for a while."""


class Changes(msgspec.Struct, frozen=True):
    """What a reload did, by the names of the workers; `failed` are those whose old process stays."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    unchanged: int = 0


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
        self._policy = policy
        self._fork_server = fork_server
        self._router = router
        self._shutdown_timeout_s = shutdown_timeout_s
        self._stopping = anyio.Event()
        self._children = {spec.name: self._child(spec) for spec in specs}
        self._taken_out: set[Child] = set()

    @property
    def rows(self) -> list[WorkerRow]:
        """The table of workers."""
        return [child.row for child in self._children.values()]

    @property
    def samples(self) -> list[Sample]:
        """The workers with all that they counted."""
        return [child.sample for child in self._children.values()]

    @property
    def rates(self) -> dict[str, list[float]]:
        """The workers' queries a second in the last five minutes, by name."""
        return {name: child.rates for name, child in self._children.items()}

    @property
    def leaving(self) -> bool:
        """Whether the end has begun."""
        return self._stopping.is_set()

    async def observe(self) -> None:
        """Remember what the workers did in the last five minutes, until cancelled."""
        while True:
            await anyio.sleep(STEP_S)
            for child in self._children.values():
                child.note(time.monotonic())

    def __len__(self) -> int:
        return len(self._children)

    async def run(self) -> None:
        """Keep every worker running until `drain` or `kill`; returns when all have ended."""
        async with anyio.create_task_group() as self._tasks:
            for child in self._children.values():
                self._tasks.start_soon(child.run)
            await self._stopping.wait()

    async def change(self, specs: Sequence[WorkerSpec], policy: RestartPolicy, shutdown_timeout_s: float) -> Changes:
        """Come to run exactly `specs`: leave alone what is the same, start, stop or replace the rest."""
        self._policy, self._shutdown_timeout_s = policy, shutdown_timeout_s
        wanted = {spec.name: spec for spec in specs}
        removed = [name for name in self._children if name not in wanted]
        added = [name for name in wanted if name not in self._children]
        changed = [name for name, child in self._children.items() if name in wanted and child.spec != wanted[name]]
        failed: list[str] = []
        moving = moves([child.spec for child in self._children.values()], specs)
        for child in self._children.values():
            child.judge_by(policy)
        async with anyio.create_task_group() as tasks:
            some_at_a_time = anyio.CapacityLimiter(REPLACED_AT_ONCE)
            for name in changed:
                tasks.start_soon(self._replace, wanted[name], some_at_a_time, failed, name in moving)
            for name in added:
                self._children[name] = self._child(wanted[name])
                if not self._stopping.is_set():
                    self._tasks.start_soon(self._children[name].run)
            for name in removed:
                tasks.start_soon(self._take_out, self._children.pop(name))
        self._children = {name: self._children[name] for name in wanted}
        return Changes(
            tuple(added),
            tuple(removed),
            tuple(name for name in changed if name not in failed),
            tuple(failed),
            len(wanted) - len(added) - len(changed),
        )

    async def renew(self, handler: HandlerRef, why: str) -> dict[str, str]:
        """Have the workers of a handler load it afresh, each in its own time.

        Returns for each why its new process did not come up and the old one stays, or "".
        """
        renewed: dict[str, str] = {}
        some_at_a_time = anyio.CapacityLimiter(REPLACED_AT_ONCE)

        async def renew(child: Child) -> None:
            async with some_at_a_time:
                renewed[child.spec.name] = await child.succession.renew(why)

        async with anyio.create_task_group() as tasks:
            for child in self._children.values():
                if child.spec.agent.handler == handler:
                    tasks.start_soon(renew, child)
        return dict(sorted(renewed.items()))

    def lacks(self, handler: HandlerRef, agents: Sequence[str]) -> bool:
        """Return whether a worker of these agents has another handler."""
        return any(
            child.spec.agent.name in agents and child.spec.agent.handler != handler for child in self._children.values()
        )

    def outdate(self, handler: HandlerRef) -> None:
        """Wait no longer for a handler's successors that are still starting: they are of a former version."""
        for child in self._children.values():
            child.succession.outdate(handler)

    async def _replace(self, spec: WorkerSpec, limiter: anyio.CapacityLimiter, failed: list[str], moves: bool) -> None:
        async with limiter:
            child, why = self._children[spec.name], "its configuration has changed"
            if not await child.succession.replace(spec, why, "configuration", moves=moves):
                failed.append(spec.name)

    async def _take_out(self, child: Child) -> None:
        self._taken_out.add(child)
        try:
            await child.drain(self._shutdown_timeout_s + KILL_GRACE_S)
        finally:
            self._taken_out.discard(child)

    def _child(self, spec: WorkerSpec) -> Child:
        return Child(spec, self._policy, self._fork_server, self._router)

    def retire(self) -> None:
        """Start no worker again: a signal to the whole process group reaches them before their drain does."""
        self._stopping.set()
        for child in self._children.values():
            child.retire()

    async def drain(self) -> None:
        """Drain all workers at once."""
        self.retire()
        async with anyio.create_task_group() as tasks:
            for child in self._children.values():
                tasks.start_soon(child.drain, self._shutdown_timeout_s + KILL_GRACE_S)

    def kill(self) -> None:
        """End all workers at once, those that a reload is just taking out too."""
        self.retire()
        for child in (*self._children.values(), *self._taken_out):
            child.kill()
