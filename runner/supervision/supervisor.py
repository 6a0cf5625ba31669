"""All workers: adds, removes and replaces them, and drains and kills them together.

Workers are independent: what happens to one never affects another.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final

import anyio
import msgspec

from runner.routing.router import Router
from runner.supervision._child import Child
from runner.supervision._succession import KILL_GRACE_S
from runner.supervision.fork_server import ForkServer
from runner.supervision.recent import STEP_S
from runner.supervision.restarts import Failure, RestartPolicy
from runner.supervision.sample import Sample
from runner.table import WorkerRow
from shared.config.handlers import HandlerRef
from shared.config.load import WorkerSpec
from shared.config.nodes import NodeAddress

_REPLACED_AT_ONCE: Final = 4
"""How many workers are replaced at a time. During its replacement a worker has two processes."""


class Changes(msgspec.Struct, frozen=True):
    """The workers that a reload changes, by name. Those that `failed` keep their old process."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    unchanged: int = 0

    @classmethod
    def between(
        cls,
        before: Mapping[str, WorkerSpec],
        after: Mapping[str, WorkerSpec],
    ) -> Changes:
        """Return what has to change to run the specs `after` in place of `before`."""
        added = tuple(name for name in after if name not in before)
        removed = tuple(name for name in before if name not in after)
        kept = [name for name in after if name in before]
        replaced = tuple(name for name in kept if before[name] != after[name])
        return cls(
            added,
            removed,
            replaced,
            unchanged=len(kept) - len(replaced),
        )


class Supervisor:
    """All workers.

    Args:
        specs: one for each worker.
        policy: when they are restarted, and how long a drain may take.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        policy: RestartPolicy,
        fork_server: ForkServer,
        router: Router,
    ) -> None:
        self._policy = policy
        self._fork_server = fork_server
        self._router = router
        self._stopping = anyio.Event()
        self._children = {spec.name: self._child(spec) for spec in specs}
        self._removing: set[Child] = set()

    def _child(self, spec: WorkerSpec) -> Child:
        return Child(
            spec,
            self._policy,
            self._fork_server,
            self._router,
        )

    @property
    def _drain_timeout_s(self) -> float:
        return self._policy.supervision.shutdown_timeout_ms / 1000 + KILL_GRACE_S

    @property
    def rows(self) -> list[WorkerRow]:
        """The table of workers."""
        return [child.row for child in self._children.values()]

    @property
    def samples(self) -> list[Sample]:
        """The workers as monitoring sees them now."""
        return [child.sample for child in self._children.values()]

    @property
    def rates(self) -> dict[str, list[float]]:
        """The workers' queries per second in the steps of the last five minutes, by name."""
        return {name: child.rates for name, child in self._children.items()}

    @property
    def stopping(self) -> bool:
        """Whether the workers are being stopped."""
        return self._stopping.is_set()

    async def record_counts(self) -> None:
        """After each step, record what the workers have counted. Runs until cancelled."""
        while True:
            await anyio.sleep(STEP_S)
            for child in self._children.values():
                child.record_counts()

    async def run(self) -> None:
        """Keep every worker running until `drain` or `kill`. Return when all have ended."""
        async with anyio.create_task_group() as self._tasks:
            for child in self._children.values():
                self._tasks.start_soon(child.run)
            await self._stopping.wait()

    # --- changes ---

    async def change(
        self,
        specs: Sequence[WorkerSpec],
        policy: RestartPolicy,
    ) -> Changes:
        """Reconcile the running workers with `specs`. Return what has changed."""
        self._policy = policy
        before = {name: child.spec for name, child in self._children.items()}
        after = {spec.name: spec for spec in specs}
        changes = Changes.between(
            before,
            after,
        )
        moving = _memory_movers(before, after)
        # For all workers: a new policy alone replaces no process.
        for child in self._children.values():
            child.set_policy(policy)
        slots = anyio.CapacityLimiter(_REPLACED_AT_ONCE)
        failures: dict[str, Failure | None] = {}
        async with anyio.create_task_group() as tasks:
            for name in changes.replaced:
                replace = partial(
                    self._children[name].replace_for_configuration,
                    after[name],
                    moves_memory=name in moving,
                )
                tasks.start_soon(
                    _replace_in_slot,
                    name,
                    replace,
                    slots,
                    failures,
                )
            for name in changes.added:
                child = self._child(after[name])
                self._children[name] = child
                # The task group ends with the supervisor, which may be during a reload.
                if not self.stopping:
                    self._tasks.start_soon(child.run)
            for name in changes.removed:
                child = self._children.pop(name)
                tasks.start_soon(
                    self._remove,
                    child,
                )
        # In the order of the configuration, which is the order of the table.
        self._children = {name: self._children[name] for name in after}
        replaced = tuple(name for name in changes.replaced if failures[name] is None)
        return msgspec.structs.replace(
            changes,
            replaced=replaced,
            failed=tuple(sorted(failures.keys() - replaced)),
        )

    async def replace_for_handler(
        self,
        handler: HandlerRef,
        reason: str,
    ) -> dict[str, Failure | None]:
        """Replace all workers of a handler, because it changed.

        Returns, by worker, why its old process stays; None if it was replaced.
        """
        slots = anyio.CapacityLimiter(_REPLACED_AT_ONCE)
        failures: dict[str, Failure | None] = {}
        async with anyio.create_task_group() as tasks:
            for name, child in self._children.items():
                if child.spec.agent.handler != handler:
                    continue
                replace = partial(child.replace_for_handler, reason)
                tasks.start_soon(
                    _replace_in_slot,
                    name,
                    replace,
                    slots,
                    failures,
                )
        # By name, and not in the order in which they came up: these names are logged.
        return dict(sorted(failures.items()))

    def has_other_handler(
        self,
        handler: HandlerRef,
        agents: Sequence[str],
    ) -> bool:
        """Return whether a worker of these agents has another handler."""
        for child in self._children.values():
            agent = child.spec.agent
            if agent.name in agents and agent.handler != handler:
                return True
        return False

    def give_up_starting(self, handler: HandlerRef) -> None:
        """Give up new processes that are still loading this handler, because it changed again."""
        for child in self._children.values():
            child.give_up_starting(handler)

    async def _remove(self, child: Child) -> None:
        # It is in no table any more, but a second signal must still kill it (see `kill`).
        self._removing.add(child)
        try:
            await child.drain(self._drain_timeout_s)
        finally:
            self._removing.discard(child)

    # --- the end ---

    def stop_restarting(self) -> None:
        """Do not restart any worker when it next exits."""
        # Before the drain, because a signal to the process group reaches the workers, too, and may
        # end them before the runner drains them.
        self._stopping.set()
        for child in self._children.values():
            child.stop_restarting()

    async def drain(self) -> None:
        """Drain all workers together."""
        self.stop_restarting()
        async with anyio.create_task_group() as tasks:
            for child in self._children.values():
                tasks.start_soon(
                    child.drain,
                    self._drain_timeout_s,
                )

    def kill(self) -> None:
        """Kill all workers, including those that a reload is removing."""
        self.stop_restarting()
        children = self._children.values()
        for child in (*children, *self._removing):
            child.kill()


async def _replace_in_slot(
    name: str,
    replace: Callable[[], Awaitable[Failure | None]],
    slots: anyio.CapacityLimiter,
    failures: dict[str, Failure | None],
) -> None:
    """Replace a worker's process once a slot is free, and add the result to `failures`."""
    async with slots:
        failures[name] = await replace()


def _memory_movers(
    before: Mapping[str, WorkerSpec],
    after: Mapping[str, WorkerSpec],
) -> set[str]:
    """Return the workers that move their memory: their old node is gone, their new one is added."""
    # A worker's name has the position of its node in the agent's list, not the node's address. So a
    # memory moves along with its worker only if no worker of the agent has the old node now, and
    # none had the new node before. Two nodes that swap places, or a list that shifts by one, move
    # nothing.
    old = {_memory_owner(spec) for spec in before.values()}
    new = {_memory_owner(spec) for spec in after.values()}
    moving: set[str] = set()
    for name in before.keys() & after.keys():
        is_gone = _memory_owner(before[name]) not in new
        is_added = _memory_owner(after[name]) not in old
        if is_gone and is_added:
            moving.add(name)
    return moving


def _memory_owner(spec: WorkerSpec) -> tuple[str, NodeAddress]:
    """Return the agent and the node to which a worker's memory belongs."""
    return spec.agent.name, spec.node
