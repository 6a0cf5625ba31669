"""One process of a worker, from its fork to its end, as the runner follows it."""

from __future__ import annotations

import time
from typing import Final

import anyio

from runner.process import WorkerProcess
from runner.restarts import RestartReason
from runner.router import Router
from shared import ipc
from shared.ipc import Counters, Launch, WorkerState, heartbeat_interval_s
from shared.logs import get_logger

LAST_WORDS_S: Final = 1.0
"""How long the last messages of a worker that left in good order may take to arrive."""

REASON_S: Final = 0.25
"""The same for a worker that left by itself, and may have said why: it is to be started again soon."""

LAST_WORDS_POLL_S: Final = 0.002

MIN_LOOK_S: Final = 0.01
"""The shortest time between two looks whether a worker is alive."""


class Incarnation:
    """A running process: what it says of itself, and how it can be ended.

    Attributes:
        renewals: how often the handler had been renewed before this process was started.
        failure: why it cannot go on, in its own words or in ours; empty while it can. `cause` is that in a word.
        wants_successor: why it wants one, empty while it does not.
        legacy: what it remembered, once it has handed that over.
        draining: whether it was told to finish and leave.
        successor: what takes its place when it ends; until then an end is a death.
    """

    def __init__(self, launch: Launch, process: WorkerProcess, router: Router, renewals: int = 0) -> None:
        self.launch = launch
        self.process = process
        self.renewals = renewals
        self.counters = Counters()
        self.state: WorkerState = "starting"
        self.detail = ""
        self.failure = ""
        self.cause: RestartReason | None = None
        self.wants_successor = ""
        self.legacy: bytes | None = None
        self.successor: Incarnation | None = None
        self.started_s = time.monotonic()
        self.changed = anyio.Event()
        self.over = anyio.Event()
        self.draining = False
        self._killed = False
        self._router = router
        self._log = get_logger("supervisor").bind(**launch.which)

    def hear(self, status: ipc.Status) -> None:
        """Take a state change or a heartbeat."""
        self.counters = status.counters
        if (status.state, status.detail) != (self.state, self.detail):
            self.state, self.detail = status.state, status.detail
            self._wake()

    def ask_for_successor(self, reason: str) -> None:
        """Note that it wants to be replaced."""
        self.wants_successor = reason
        self._wake()

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def ended(self, start_timeout_s: float, liveness_timeout_s: float) -> None:
        """Wait until the process has ended; end it when it does not start, or is silent for too long."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._hold_to_account, start_timeout_s, liveness_timeout_s)
            await self.process.ended()
            tasks.cancel_scope.cancel()
        await self.hear_out()
        self.over.set()

    async def hear_out(self) -> None:
        """Wait for what an ended process may still have to say."""
        if self._killed:
            return
        if self.draining or self.state == "draining":
            await self._hear_last_words(LAST_WORDS_S)
        elif (await self.process.how()).startswith("exit"):
            await self._hear_last_words(REASON_S)

    async def _hear_last_words(self, limit_s: float) -> None:
        """Wait for what the process sent before it ended: the kernel tells of its end by a shorter way."""
        with anyio.move_on_after(limit_s):
            while self.state != "stopped":
                self._router.silent_for_s(self.launch)
                await anyio.sleep(LAST_WORDS_POLL_S)

    async def _hold_to_account(self, start_timeout_s: float, liveness_timeout_s: float) -> None:
        with anyio.move_on_after(start_timeout_s) as scope:
            while self.state == "starting":  # its loop is busy with the handler's import: no heartbeats yet
                await self.changed.wait()
        if scope.cancelled_caught:
            self.kill(f"it was not up within {start_timeout_s:.0f} s of its start", "not_up")
            return
        self._router.pardon(self.launch)
        silent_s = 0.0
        late_s = heartbeat_interval_s(liveness_timeout_s)
        while True:
            # Nothing can be wrong before this time is up.
            wait_s = max(liveness_timeout_s - silent_s, MIN_LOOK_S)
            due_s = time.monotonic() + wait_s
            await anyio.sleep(wait_s)
            silent_s = self._router.silent_for_s(self.launch)
            # A look that comes so late was held up: it is the runner that was silent, not the worker.
            if time.monotonic() - due_s > late_s:
                self._router.pardon(self.launch)
                silent_s = 0.0
            elif silent_s >= liveness_timeout_s:
                self.kill(f"nothing was heard of it for {round(liveness_timeout_s * 1000)} ms", "silent")
                return

    async def reached(self, state: WorkerState) -> bool:
        """Wait for a state; return False when the process ends before it."""
        found = False

        async def wait() -> None:
            nonlocal found
            while self.state != state:
                await self.changed.wait()
            found = True
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await self.process.ended()
            tasks.cancel_scope.cancel()
        return found

    async def drain(self, timeout_s: float, *, hand_over: bool = False) -> None:
        """Have the process finish what is in flight and leave; kill it when it takes longer."""
        if self._router.drain(self.launch, hand_over=hand_over):
            self.draining = True
            with anyio.move_on_after(timeout_s):
                await self.over.wait()
                return
            self._log.warning("drain_timed_out", pid=self.process.pid)
        self.kill()
        await self.over.wait()

    @property
    def silent_s(self) -> float:
        """Since when nothing was heard of it."""
        return self._router.silent_for_s(self.launch)

    def kill(self, why: str = "", cause: RestartReason | None = None) -> None:
        """End the process at once; `cause` is the reason in a word."""
        self.cause = self.cause or cause
        if why:
            self._log.error("worker_killed", pid=self.process.pid, why=why)
        self.failure = self.failure or why
        self._killed = True
        self.process.kill()
