"""One worker: an agent at a node, from the import of its handler to its exit."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Final

import anyio
import setproctitle

from shared.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, ConfigError
from shared.ipc import (
    Counters,
    DrainRequest,
    Failed,
    Handover,
    Launch,
    ReplaceRequest,
    WorkerState,
    heartbeat_interval_s,
)
from shared.logs import logger as logs
from shared.memory_files import memory_name
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.dispatch import DispatcherOptions
from worker.dispatching.handler import Handler, load
from worker.dispatching.results import HandlerFault
from worker.limits import Limits
from worker.link import Link
from worker.memory.base import MemoryBusy, MemoryFault
from worker.memory.choose import create_memory
from worker.node.client import NodeClient
from worker.node.losses import Loss
from worker.state_log import StateLog

if TYPE_CHECKING:
    from worker.tracing import WorkerTracing

_MEMORY_POLL_S: Final = 0.02
"""How often a worker tries to open a memory that another process still has open."""

_ABANDON_S: Final = 0.5
"""How long the node may take to read the last answers of a worker whose handler hangs."""


class Worker:
    """One agent at one node: its handler, its link to the runner and its connection to the node."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._spec = launch.spec
        supervision = launch.spec.agent.supervision
        self._shutdown_timeout_s = supervision.shutdown_timeout_ms / 1000
        self._liveness_timeout_s = supervision.liveness_timeout_ms / 1000
        self._handler_timeout_s = supervision.handler_timeout_ms / 1000
        self._link = Link(
            launch,
            on_drain=self._on_drain,
            on_promote=self._on_promote,
        )
        self._limits = Limits(launch.spec.agent)
        self._tracing: WorkerTracing | None = None
        self._stopping = anyio.Event()
        self._kill_deadline_s = 0.0
        self._has_successor = False
        self._hang: HandlerFault | None = None
        self._promoted = anyio.Event()
        self._handover: bytes | None = None
        self._log = logs.get_logger()
        self._states = StateLog(self._log)

    async def run(self) -> int:
        """Serve until drained. Return the exit status."""
        setproctitle.setproctitle(f"em-worker {self._spec.name} {self._spec.node}")
        # The link comes first, so that the runner learns why a worker cannot start.
        self._link.open()
        try:
            if self._spec.runner.tracing:
                self._start_tracing()
            handler = load(self._spec.agent.handler)
            handler = handler.with_query_logging(self._spec.runner.log_level)
            return await self._serve(handler)
        except ConfigError as exc:
            self._report_failure(exc)
            return EXIT_CONFIG
        finally:
            # The link first: if the runner kills this process before the end, only spans are lost.
            self._link.close()
            if self._tracing is not None:
                self._close_tracing(self._tracing)

    def _start_tracing(self) -> None:
        # In this process, because the threads of a tracer do not survive a fork. Before the handler
        # is loaded, because its libraries look for a tracer when they are imported.
        from worker.tracing import WorkerTracing

        self._tracing = WorkerTracing(self._launch)

    def _close_tracing(self, tracing: WorkerTracing) -> None:
        """Send the last spans, within the time that is left until the runner kills this process."""
        limit_s = self._kill_deadline_s - time.monotonic()
        # A successor waits for this process to exit. After a hang, the runner must restart it soon.
        if self._has_successor or self._hang is not None:
            limit_s = 0.0
        # The worker sends no heartbeats any more, so it waits for half of the liveness timeout at
        # most. Otherwise the runner could kill it as a worker that hangs.
        tracing.close(min(limit_s, self._liveness_timeout_s / 2))

    def _report_failure(self, error: Exception) -> None:
        """Log and report why the worker cannot continue."""
        self._log.error(
            "worker_ended_itself",
            error=str(error),
            # The cause is what the handler raised.
            exc_info=error.__cause__,
        )
        self._link.send(Failed(str(error)))

    async def _serve(self, handler: Handler) -> int:
        self._create_parts(handler)
        status = EXIT_FAILED
        async with anyio.create_task_group() as tasks, self._dispatcher.running():
            tasks.start_soon(self._beat)
            tasks.start_soon(self._handle_sigterm)
            try:
                await self._get_ready()
            except (HandlerFault, MemoryFault) as exc:
                self._report_failure(exc)
            else:
                tasks.start_soon(self._client.run)
                await self._stopping.wait()
                status = await self._stop()
            tasks.cancel_scope.cancel()
        self._report_state("stopped")
        return status

    def _create_parts(self, handler: Handler) -> None:
        spec, agent = self._spec, self._spec.agent
        name = memory_name(agent.name, spec.node)
        self._memory = create_memory(
            agent.memory,
            name,
            spec.runner.state_dir,
        )
        if self._tracing is not None:
            handler = self._tracing.within_span(handler)
        options = DispatcherOptions(
            concurrency=agent.concurrency,
            timeout_s=self._handler_timeout_s,
            on_hung=self._on_hung,
            on_error=self._link.report_error,
            observer=self._tracing,
        )
        self._dispatcher = create_dispatcher(handler, self._memory, options)
        capabilities = agent.capabilities
        if capabilities is None:
            capabilities = handler.capabilities
        self._client = NodeClient(
            spec,
            capabilities,
            self._dispatcher,
            self._report_state,
        )

    # --- the start ---

    async def _get_ready(self) -> None:
        """Set up the handler, wait for the predecessor to exit, and open the memory.

        A successor sets up its handler while its predecessor still serves, so that the agent is
        missing for a short time only. The memory comes last: it is complete when the predecessor
        has exited. The link is read before that, because the promotion arrives over it. Queries
        cannot arrive too early: the runner sends none before the state `connecting`.
        """
        await self._dispatcher.set_up()
        self._link.serve(self._dispatcher.submit, self._counters)
        if self._launch.standby:
            self._report_state("standby")
            await self._promoted.wait()
        try:
            await self._open_memory()
        except MemoryFault as exc:
            # If a memory that was handed over cannot be read, no later process can read it either,
            # so the worker starts empty. A file that cannot be opened may still have its content,
            # so that error ends the worker.
            if self._handover is None:
                raise
            self._log.error(
                "handover_unreadable",
                error=str(exc),
                hint="the agent starts with an empty memory",
            )
        self._handover = None
        reason = self._limits.check_at_start()
        if reason is not None:
            self._log.error(
                "limit_ignored",
                reason=reason,
                hint="raise max_rss_mb, or keep less in the agent's memory",
            )

    async def _open_memory(self) -> None:
        # Another worker may still have this memory open, for example one that the runner has just
        # killed. The lock is the kernel's, so it ends with that process and no event announces it.
        while not self._stopping.is_set():
            try:
                self._memory.open(self._handover)
                return
            except MemoryBusy as exc:
                self._log.debug("memory_awaited", error=str(exc))
                await anyio.sleep(_MEMORY_POLL_S)

    # --- the end ---

    async def _stop(self) -> int:
        self._kill_deadline_s = time.monotonic() + self._shutdown_timeout_s
        if self._hang is None:
            await self._drain()
        # The handler may also be found to hang during the drain.
        if self._hang is not None:
            await self._abandon(self._hang)
            return EXIT_FAILED
        if self._has_successor:
            self._send_memory()
        self._memory.close()
        return EXIT_OK

    async def _abandon(self, error: HandlerFault) -> None:
        """Give up a handler that hangs. Only the end of the process ends its call."""
        self._report_failure(error)
        self._dispatcher.give_back()
        with anyio.move_on_after(_ABANDON_S):
            await self._client.drain()

    async def _drain(self) -> None:
        """Answer what is in flight before the runner kills this process."""
        self._report_state("draining")
        if self._has_successor:
            # The runner keeps these queries for the successor. Here they would delay the handover.
            self._dispatcher.give_back(self._link)
        with anyio.move_on_after(self._shutdown_timeout_s) as limit:
            await self._finish()
        if not limit.cancelled_caught:
            return
        self._log.warning(
            "drain_timed_out",
            pending=self._dispatcher.pending,
        )
        self._dispatcher.give_back()
        if self._has_successor:
            # The memory is complete only after the query that still runs, and the successor needs
            # it. The runner waits for the handler's timeout before it kills a worker that is
            # replaced.
            with anyio.move_on_after(self._handler_timeout_s):
                await self._finish()

    async def _finish(self) -> None:
        if self._has_successor:
            # The successor can register at the node only after this connection is closed. So first
            # the queries that were already submitted are answered, and the node's further queries
            # are accepted here. If the connection were closed at once, the agent would be missing
            # from the node until a long query is finished.
            await self._dispatcher.wait_for_submitted()
        await self._client.drain()
        await self._dispatcher.wait_until_idle()
        try:
            await self._dispatcher.tear_down()
        except HandlerFault as exc:
            self._log.error(
                "close_failed",
                error=str(exc),
                exc_info=exc,
            )

    def _send_memory(self) -> None:
        memory = None
        try:
            memory = self._memory.handover()
        except MemoryFault as exc:
            # The successor starts with an empty memory. It must not wait for this one.
            self._log.error(
                "memory_not_handed_over",
                reason=str(exc),
            )
        self._link.send(Handover(memory))

    # --- what happens while it serves ---

    def _on_drain(self, hand_over: bool) -> None:
        self._has_successor = hand_over
        self._stopping.set()

    def _on_promote(self, memory: bytes | None) -> None:
        self._handover = memory
        self._promoted.set()

    def _on_hung(self, reason: str) -> None:
        self._hang = HandlerFault(reason)
        self._stopping.set()

    async def _handle_sigterm(self) -> None:
        # The drain starts only when the runner confirms the request. Until then, it may still send
        # queries, which a drained worker would not answer.
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._link.send(DrainRequest())

    async def _beat(self) -> None:
        changed = True
        while True:
            interval_s = heartbeat_interval_s(
                self._liveness_timeout_s,
                idle=not changed,
            )
            await anyio.sleep(interval_s)
            changed = self._link.send_status()
            self._states.log_if_settled()
            logs.report_suppressed()
            counters = self._link.all_counters()
            reason = self._limits.reached(counters)
            if reason is not None:
                self._link.send(ReplaceRequest(reason))

    def _counters(self) -> Counters:
        counters = self._dispatcher.counters()
        counters.add(self._client.counters)
        return counters

    def _report_state(
        self,
        state: WorkerState,
        loss: Loss | None = None,
    ) -> None:
        reason = "" if loss is None else loss.reason
        self._link.report_state(state, reason)
        self._states.record(state, loss)
