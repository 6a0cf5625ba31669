"""The worker process: from the fork to the last line.

Order matters here: first what keeps it from becoming an orphan, then the line to the runner, so
that a failure to start can be told, then the handler, then the node.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection as Pipe

import anyio
import setproctitle
import structlog

from shared import logs
from shared.config import HandlerRef
from shared.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError
from shared.ipc import HEARTBEAT_INTERVAL_S, Counters, Launch, WorkerState
from shared.logs import Folded
from worker.connection import Connection
from worker.dispatch import Dispatcher, HandlerFault, dispatcher_for
from worker.handler import Handler, load
from worker.link import Link
from worker.memory import open_memory
from worker.orphan import leave_with_parent


def run(launch: Launch) -> None:
    """Be one worker until told to leave. The target of a worker process; it does not return.

    Exit status: 0 after a drain, 78 when the handler cannot be loaded, 1 for a fault of ours.
    """
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = launch.spec
    setproctitle.setproctitle(f"em-worker {spec.name} {spec.node}")
    logs.configure(
        spec.log_level,
        spec.log_format,
        worker=spec.name,
        agent=spec.agent.name,
        node=str(spec.node),
        incarnation=launch.incarnation,
    )
    status = EXIT_FAILED
    try:
        status = anyio.run(Worker(launch).run, backend_options={"use_uvloop": True})
    except BaseException as exc:  # noqa: BLE001 - the last line of defence: say it, leave, be started again
        structlog.get_logger("worker").error("worker_crashed", exc_info=exc)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # a handler's thread that hangs, or its atexit hooks, must not keep the process


def probe(ref: HandlerRef, pipe: Pipe) -> None:
    """Load a handler and send `(capabilities, error)`. The target of a process that ends after it."""
    leave_with_parent()
    try:
        pipe.send((load(ref).capabilities, None))
    except ConfigError as exc:
        pipe.send(((), str(exc)))
    pipe.close()
    os._exit(EXIT_DONE)


class Worker:
    """One agent at one node: its handler, its link to the runner and its connection to the node."""

    def __init__(self, launch: Launch) -> None:
        self._spec = launch.spec
        self._counters = Counters()
        self._link = Link(launch, self._counters, self._drain_begins)
        self._leaving = anyio.Event()
        self._repeats = Folded()
        self._log = structlog.get_logger("worker")

    async def run(self) -> int:
        """Serve until drained; return the exit status."""
        self._link.open()
        try:
            return await self._serve(load(self._spec.agent.handler))
        except ConfigError as exc:
            return self._give_up(str(exc), EXIT_CONFIG)
        finally:
            self._link.close()

    def _give_up(self, reason: str, status: int) -> int:
        self._log.error("worker_failed", error=reason)
        self._link.tell_failed(reason)
        return status

    async def _serve(self, handler: Handler) -> int:
        agent = self._spec.agent
        capabilities = handler.capabilities if agent.capabilities is None else agent.capabilities
        dispatcher = dispatcher_for(handler, open_memory(agent.memory), self._counters, agent.concurrency)
        connection = Connection(self._spec, capabilities, dispatcher, self._counters, self._tell)
        async with anyio.create_task_group() as tasks, dispatcher.running():
            tasks.start_soon(self._heartbeat, connection)
            tasks.start_soon(self._obey_sigterm)
            try:
                await dispatcher.set_up()
            except HandlerFault as exc:
                tasks.cancel_scope.cancel()
                return self._give_up(str(exc), EXIT_FAILED)
            self._link.serve(dispatcher)
            tasks.start_soon(connection.run)
            await self._leaving.wait()
            await self._drain(dispatcher, connection)
            tasks.cancel_scope.cancel()
        self._tell("stopped", "")
        return EXIT_DONE

    async def _drain(self, dispatcher: Dispatcher, connection: Connection) -> None:
        """Finish what is in flight, within the time that the runner gives before it kills."""
        self._tell("draining", "")
        with anyio.move_on_after(self._spec.shutdown_timeout_ms / 1000) as scope:
            await connection.drain()
            await dispatcher.idle()
            try:
                await dispatcher.tear_down()
            except HandlerFault as exc:
                self._log.error("close_failed", error=str(exc), exc_info=exc)
        if scope.cancelled_caught:
            self._log.warning("drain_timed_out", unanswered=dispatcher.pending)

    def _drain_begins(self) -> None:
        self._leaving.set()

    async def _obey_sigterm(self) -> None:
        # The runner must stop sending first: what it has sent already would be lost otherwise.
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._link.ask_for_drain()

    async def _heartbeat(self, connection: Connection) -> None:
        while True:
            await anyio.sleep(HEARTBEAT_INTERVAL_S)
            self._link.beat()
            connection.tell_overdue()

    def _tell(self, state: WorkerState, detail: str) -> None:
        """Report a state to the runner, and log it unless the same was just said."""
        self._link.tell(state, detail)
        if state == "backoff":
            held = self._repeats.admit(detail)
            if held is not None:
                self._log.warning("backoff", reason=detail, **({"like_it_before": held} if held else {}))
        elif state in ("ready", "draining", "stopped"):
            self._repeats = Folded()
            self._log.info(state)
        else:
            self._log.debug(state)
