"""The worker process: from the fork to the last line.

Order matters here: first what keeps it from becoming an orphan, then the line to the runner, so
that a failure to start can be told, then the handler, then the node.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from multiprocessing.connection import Connection as Pipe
from typing import TYPE_CHECKING, Any, Final

import anyio
import setproctitle

from shared import logs
from shared.errors import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, ConfigError
from shared.handlers import HandlerRef
from shared.ipc import Counters, Launch, WorkerState, heartbeat_interval_s
from shared.logs import get_logger
from shared.memory_files import memory_name
from worker import output
from worker.connection import Connection
from worker.dispatch import Dispatcher
from worker.dispatchers import dispatcher_for
from worker.handler import Handler, frames_of, load, told
from worker.limits import Limits
from worker.link import Link
from worker.memories import memory_for
from worker.memory import Memory, MemoryBusy, MemoryFault
from worker.orphan import leave_with_parent
from worker.results import HandlerFault
from worker.states import StateLog
from worker.trial import attempt

if TYPE_CHECKING:
    from worker.tracing import WorkerTracing


MEMORY_POLL_S: Final = 0.02
"""How often a worker looks whether it can have its node's memory."""

ABANDON_S: Final = 0.5
"""How long the node may take to read the last answers of a worker whose handler hangs."""


def run(launch: Launch) -> None:
    """Be one worker until told to leave. The target of a worker process; it does not return.

    Exit status: 0 after a drain, 78 when the handler cannot be loaded, 1 for a fault of ours.
    """
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = launch.spec
    setproctitle.setproctitle(f"em-worker {spec.name} {spec.node}")
    logs.configure(spec.log_level, spec.log_format, **launch.which)
    output.take()
    status = EXIT_FAILED
    try:
        status = anyio.run(Worker(launch).run, backend_options={"use_uvloop": True})
    except BaseException as exc:  # noqa: BLE001 - the last line of defence: say it, leave, be started again
        get_logger("worker").error("worker_crashed", exc_info=exc)
    output.finish()
    os._exit(status)  # a handler's thread that hangs, or its atexit hooks, must not keep the process


def probe(ref: HandlerRef, pipe: Pipe) -> None:
    """Load a handler and send `(capabilities, error)`. The target of a process that ends after it."""
    leave_with_parent()
    # The world in which a worker will import it. What it prints and warns of meanwhile is told then, with the worker's
    # name, and not here too; its errors are.
    logs.configure("error", handler=str(ref))
    output.take()
    try:
        pipe.send((load(ref).capabilities, None))
    except ConfigError as exc:
        pipe.send(((), str(exc)))
    pipe.close()
    output.finish()
    os._exit(EXIT_DONE)


def trial(ref: HandlerRef, text: str, memory: dict[str, Any], timeout_s: float, pipe: Pipe) -> None:
    """Call a handler once; send each phase, and at last `(trial, error)`. The target of a process of its own."""
    leave_with_parent()
    logs.configure("warning", "console")
    try:
        found = attempt(ref, text, memory, timeout_s, pipe.send)
        gc.collect()  # what was never awaited, or has failed with nobody to see it, is told by its destructor
        pipe.send((found, None))
    except ConfigError as exc:
        pipe.send((None, str(exc)))
    pipe.close()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_DONE)


class Worker:
    """One agent at one node: its handler, its link to the runner and its connection to the node."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._spec = launch.spec
        self._counters = Counters()
        self._tracing: WorkerTracing | None = None
        self._link = _kind_of_link(self._spec.tracing)(launch, self._counters, self._drain_begins, self._go)
        self._limits = Limits(self._spec.agent)
        self._leaving = anyio.Event()
        self._leaves_since_s = 0.0
        self._hand_over = False
        self._hung = ""
        self._called = anyio.Event()
        self._inherited: bytes | None = None
        self._log = get_logger("worker")
        self._states = StateLog(self._log)

    async def run(self) -> int:
        """Serve until drained; return the exit status."""
        self._link.open()
        try:
            if self._spec.tracing:
                self._trace()
            return await self._serve(told(load(self._spec.agent.handler), self._spec.log_level))
        except ConfigError as exc:
            return self._give_up(str(exc), EXIT_CONFIG, exc.__cause__)
        finally:
            self._link.close()
            if self._tracing is not None:
                self._tracing.close(self._flush_s())

    def _trace(self) -> None:
        # In this process, not in the one that it is a fork of; before the handler, whose libraries look for it.
        from worker.tracing import WorkerTracing

        self._tracing = WorkerTracing(self._launch)

    def _flush_s(self) -> float:
        """Return how long the last spans may take to be sent: nobody may wait for them, and nobody kill for them."""
        if self._hand_over or self._hung or not self._leaves_since_s:
            return 0.0
        left_s = self._spec.shutdown_timeout_ms / 1000 - (time.monotonic() - self._leaves_since_s)
        return max(0.0, min(left_s, self._spec.liveness_timeout_ms / 2000))

    def _give_up(self, reason: str, status: int, cause: BaseException | None = None) -> int:
        """Tell why it cannot go on; in the log with the way through the handler, where that has raised `cause`."""
        self._log.error("worker_failed", error=reason, **({} if cause is None else {"exception": frames_of(cause)}))
        self._link.tell_failed(reason)
        return status

    async def _serve(self, handler: Handler) -> int:
        agent = self._spec.agent
        capabilities = handler.capabilities if agent.capabilities is None else agent.capabilities
        memory = memory_for(agent.memory, memory_name(agent.name, self._spec.node), self._spec.state_dir)
        timeout_s = agent.handler_timeout_ms / 1000
        chosen = dispatcher_for if self._tracing is None else self._tracing.dispatcher_for
        dispatcher = chosen(handler, memory, self._counters, agent.concurrency, timeout_s)
        dispatcher.on_hung = self._hang
        dispatcher.quotes_queries = self._spec.log_level == "debug"
        connection = Connection(self._spec, capabilities, dispatcher, self._counters, self._tell)
        status = EXIT_FAILED
        async with anyio.create_task_group() as tasks, dispatcher.running():
            tasks.start_soon(self._heartbeat, connection, dispatcher)
            tasks.start_soon(self._obey_sigterm)
            try:
                await self._get_ready(dispatcher, memory)
            except HandlerFault as exc:
                self._give_up(str(exc), status, exc.__cause__)
            except MemoryFault as exc:
                self._give_up(str(exc), status)
            else:
                tasks.start_soon(connection.run)
                await self._leaving.wait()
                self._leaves_since_s = time.monotonic()
                status = await self._leave(dispatcher, connection, memory)
            tasks.cancel_scope.cancel()
        self._tell("stopped", "")
        return status

    async def _get_ready(self, dispatcher: Dispatcher, memory: Memory) -> None:
        """Set the handler up, wait for the predecessor to leave if there is one, and open the memory."""
        await dispatcher.set_up()
        self._link.serve(dispatcher)
        if self._launch.standby:
            self._tell("standby", "")
            await self._called.wait()
        try:
            await self._open(memory)
        except MemoryFault as exc:
            if self._inherited is None:
                raise
            self._log.error("memory_not_inherited", error=str(exc), do="the agent starts with an empty memory")
        self._inherited = None
        if objection := self._limits.begin():
            self._log.error("limit_ignored", why=objection, do="raise max_rss_mb, or have the agent remember less")

    async def _open(self, memory: Memory) -> None:
        """Open the memory, once whoever had this node before has let go of it."""
        while not self._leaving.is_set():
            try:
                memory.open(self._inherited)
                return
            except MemoryBusy as exc:
                self._log.debug("memory_awaited", why=str(exc))
                await anyio.sleep(MEMORY_POLL_S)

    async def _leave(self, dispatcher: Dispatcher, connection: Connection, memory: Memory) -> int:
        if self._hung:
            return await self._abandon(dispatcher, connection)
        await self._drain(dispatcher, connection)
        if self._hung:  # it came to light while the rest was being finished
            return await self._abandon(dispatcher, connection)
        if self._hand_over:
            try:
                if (legacy := memory.legacy()) is not None:
                    self._link.leave_behind(legacy)
            except MemoryFault as exc:
                self._log.error("memory_not_handed_over", error=str(exc))
                self._link.leave_behind(b"")
        memory.close()
        return EXIT_DONE

    async def _abandon(self, dispatcher: Dispatcher, connection: Connection) -> int:
        """Leave although the handler still runs: a call that hangs can be ended only with its process."""
        status = self._give_up(self._hung, EXIT_FAILED)
        dispatcher.give_back()
        with anyio.move_on_after(ABANDON_S):
            await connection.drain()
        return status

    async def _drain(self, dispatcher: Dispatcher, connection: Connection) -> None:
        """Finish what is in flight, within the time that the runner gives before it kills."""
        self._tell("draining", "")
        if self._hand_over:
            dispatcher.give_back(self._link)  # the runner keeps them for the successor
        with anyio.move_on_after(self._spec.shutdown_timeout_ms / 1000) as scope:
            await self._finish(dispatcher, connection)
        if not scope.cancelled_caught:
            return
        self._log.warning("drain_timed_out", unanswered=dispatcher.pending)
        dispatcher.give_back()
        if self._hand_over:
            with anyio.move_on_after(self._spec.agent.handler_timeout_ms / 1000):
                await self._finish(dispatcher, connection)

    async def _finish(self, dispatcher: Dispatcher, connection: Connection) -> None:
        if self._hand_over:
            # The node cannot keep a query for the successor, which needs this connection's place: what it asks while
            # something long is being finished is still answered here.
            await dispatcher.caught_up()
        await connection.drain()
        await dispatcher.idle()
        try:
            await dispatcher.tear_down()
        except HandlerFault as exc:
            self._log.error("close_failed", error=str(exc), exc_info=exc)

    def _drain_begins(self, hand_over: bool) -> None:
        self._hand_over = hand_over
        self._leaving.set()

    def _go(self, legacy: bytes | None) -> None:
        self._inherited = legacy
        self._called.set()

    def _hang(self, reason: str) -> None:
        self._hung = reason
        self._leaving.set()

    async def _obey_sigterm(self) -> None:
        # The runner must stop sending first: what it has sent already would be lost otherwise.
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._link.ask_for_drain()

    async def _heartbeat(self, connection: Connection, dispatcher: Dispatcher) -> None:
        liveness_timeout_s = self._spec.liveness_timeout_ms / 1000
        news = True
        while True:
            await anyio.sleep(heartbeat_interval_s(liveness_timeout_s, idle=not news))
            news = self._link.beat()
            self._states.catch_up()
            connection.tell_overdue()
            dispatcher.tell_overdue()
            logs.tell_held_back()
            if reason := self._limits.reached(self._counters):
                self._link.ask_for_successor(reason)

    def _tell(self, state: WorkerState, detail: str) -> None:
        """Report a state to the runner, and to the log."""
        self._link.tell(state, detail)
        self._states.note(state, detail)


def _kind_of_link(tracing: bool) -> type[Link]:
    if not tracing:
        return Link
    from worker.tracing import TracedLink

    return TracedLink
