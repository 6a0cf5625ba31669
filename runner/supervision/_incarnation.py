"""One process of a worker, from its start to its end: what it reports, whether it is alive."""

from __future__ import annotations

import time
from math import inf
from typing import Final

import anyio

from runner.routing.router import Router
from runner.supervision._process import WorkerProcess
from runner.supervision.restarts import Failure
from shared import ipc
from shared.ipc import Counters, Launch, WorkerState, heartbeat_interval_s
from shared.logs.logger import get_logger

_LAST_MESSAGES_S: Final = 1.0
"""How long the last messages of a process that drained may take to arrive."""

_LAST_MESSAGES_AFTER_EXIT_S: Final = 0.25
"""How long those of a process that exited unexpectedly may take. Its restart waits for them."""

_LAST_MESSAGES_POLL_S: Final = 0.002

_MIN_CHECK_S: Final = 0.01
"""The shortest time between two checks whether a process is alive."""


class Incarnation:
    """A running process.

    Attributes:
        handler_version: how often the handler had changed before this process was started.
        failure: the failure that it reported, else why the runner killed it.
        replacement_reason: why it asks to be replaced; None if it does not.
        handover: its memory for the successor, once it has sent that.
        draining: whether the runner has asked it to finish and exit.
        up_since_s: when it had loaded its handler, by the monotonic clock; infinite before that.
        successor: the process that takes its place when it ends. Without one its end is unexpected.
        changed: set, and replaced by a new event, when the state or `replacement_reason` changes.
        log: a logger that names this incarnation.
        over: set when the process has ended and its last messages have arrived.
    """

    def __init__(
        self,
        launch: Launch,
        process: WorkerProcess,
        router: Router,
        handler_version: int = 0,
    ) -> None:
        self.launch = launch
        self.process = process
        self.handler_version = handler_version
        self.counters = Counters()
        self.state: WorkerState = "starting"
        self.reason = ""
        self.failure: Failure | None = None
        self.replacement_reason: str | None = None
        self.handover: ipc.Handover | None = None
        self.successor: Incarnation | None = None
        self.started_s = time.monotonic()
        self.up_since_s = inf
        self.changed = anyio.Event()
        self.over = anyio.Event()
        self.draining = False
        self._killed = False
        self._router = router
        self.log = get_logger().bind(**launch.log_context)

    def on_message(self, message: ipc.Report) -> None:
        """Record what the process reports."""
        match message:
            case ipc.Status(state, reason, counters):
                self.counters = counters
                # Most are heartbeats, which change nothing that anyone waits for.
                if (state, reason) != (self.state, self.reason):
                    if self.state == "starting" and state != "stopped":
                        self.up_since_s = time.monotonic()
                    self.state = state
                    self.reason = reason
                    self._wake()
            case ipc.Failed(reason):
                self.failure = Failure("ended_itself", reason)
            case ipc.ReplaceRequest(reason):
                self.replacement_reason = reason
                self._wake()
            case ipc.Handover():
                self.handover = message

    def _wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def watch_until_ended(self, start_timeout_s: float, liveness_timeout_s: float) -> None:
        """Wait until the process has ended. Kill it if it does not start, or is silent too long."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(
                self._check_alive,
                start_timeout_s,
                liveness_timeout_s,
            )
            await self.process.ended.wait()
            tasks.cancel_scope.cancel()
        await self.receive_last_messages()
        self.over.set()

    async def receive_last_messages(self) -> None:
        """Wait for the messages that an ended process sent last."""
        # The kernel reports the end of a process before ZeroMQ has delivered its last messages:
        # the memory and the counters after a drain, the reason after a failed start. A process
        # that was killed had no time to send any. Waiting for them would only delay its restart.
        if self._killed:
            return
        limit_s = _LAST_MESSAGES_S
        if not self.draining and self.state != "draining":
            limit_s = _LAST_MESSAGES_AFTER_EXIT_S
            failure = await self.process.exit_failure()
            if failure.kind != "exited":
                return
        with anyio.move_on_after(limit_s):
            while self.state != "stopped":
                self._router.receive()
                await anyio.sleep(_LAST_MESSAGES_POLL_S)

    async def _check_alive(self, start_timeout_s: float, liveness_timeout_s: float) -> None:
        """Kill the process if it does not start in time, or sends nothing for too long."""
        # It sends no heartbeats while it imports the handler, because its loop is busy.
        with anyio.move_on_after(start_timeout_s):
            while self.state == "starting":
                await self.changed.wait()
        if self.state == "starting":
            late = f"it was not up within {start_timeout_s:.0f} s of its start"
            self.kill(Failure("not_up", late))
            return
        self._router.restart_silence(self.launch)
        silent_s = 0.0
        max_late_s = heartbeat_interval_s(liveness_timeout_s)
        while silent_s < liveness_timeout_s:
            # The process cannot exceed its timeout before this time has passed.
            wait_s = max(liveness_timeout_s - silent_s, _MIN_CHECK_S)
            due_s = time.monotonic() + wait_s
            await anyio.sleep(wait_s)
            # If the runner was busy, newer messages may wait in the socket. If they were not read,
            # the runner would kill a healthy worker.
            self._router.receive()
            silent_s = self.silent_s
            check_late_s = time.monotonic() - due_s
            # If the check itself is late, the runner was busy or suspended. Then the worker may
            # have been suspended, too, and its silence means nothing: the time starts again.
            if check_late_s > max_late_s:
                self._router.restart_silence(self.launch)
                silent_s = 0.0
        silent_ms = round(liveness_timeout_s * 1000)
        self.kill(Failure("silent", f"it sent nothing for {silent_ms} ms"))

    async def wait_for_standby(self) -> None:
        """Wait until the process has loaded its handler and waits for its promotion."""
        while self.state != "standby":
            await self.changed.wait()

    async def drain(self, timeout_s: float, *, hand_over: bool = False) -> None:
        """Have the process finish its queries in flight and exit. Kill it after `timeout_s`."""
        # A process that has not connected yet cannot be asked, and has no queries.
        if self._router.drain(self.launch, hand_over=hand_over):
            self.draining = True
            with anyio.move_on_after(timeout_s):
                await self.over.wait()
                return
            self.log.warning("exit_timed_out", pid=self.process.pid)
        self.kill()
        await self.over.wait()

    @property
    def silent_s(self) -> float:
        """The time since the process sent something."""
        return self._router.silent_for_s(self.launch)

    def kill(self, failure: Failure | None = None) -> None:
        """Kill the process, because of a failure if any."""
        if failure is not None:
            self.log.error(
                "worker_killed",
                pid=self.process.pid,
                reason=failure.reason,
            )
        # What the process reported itself is closer to the cause than what the runner noticed.
        self.failure = self.failure or failure
        self._killed = True
        self.process.kill()
