"""One connection to a node, from its first byte to its loss: the I/O around `worker.node.session`.

The session decides what bytes mean, this module moves them. Callbacks move a query, without tasks
and streams: a read is decoded and submitted, and all answers of a loop turn are one write. No
exception that a node causes leaves this module: `run` returns a `Loss` instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

import anyio
from websockets.frames import CloseCode

from shared.config.schema import ConnectionSection
from shared.ipc import Counters, Outcome, WorkerState
from shared.logs.logger import get_logger
from worker.dispatching.dispatch import Dispatcher
from worker.dispatching.jobs import CANCELLED, Answer, Job
from worker.dispatching.results import encode_result
from worker.node.losses import Loss, LossKind
from worker.node.session import Session, SessionState

MAX_PENDING: Final = 1024
"""How many queries of a node may wait for the handler. Then reading pauses, and TCP pushes back."""

MAX_PENDING_SIZE: Final = 8 * 1024 * 1024
"""The limit for these queries together. The same limit applies to the unsent answers together.

A single message may exceed it. A query counts with the characters of its text, an answer with its
bytes: encoding a text only to count its bytes would cost each query.
"""

CLOSE_TIMEOUT_S: Final = 1.0
"""How long the node may take to read the last bytes. The closing handshake may take as long."""

DRAIN_POLL_S: Final = 0.01
"""How often a drain checks whether the node has read its answers. There is no event for that."""

_log = get_logger()


class NodeConnection(asyncio.Protocol):
    """One socket, and the source of the jobs that come over it.

    Args:
        session: decides what the bytes mean.
        options: the timeouts.
        dispatcher: answers the queries.
        counters: where answers are counted.
        on_state: called when the session registers and when it is ready.
        on_ignored: called with how many frames were ignored, by kind.
    """

    def __init__(
        self,
        session: Session,
        options: ConnectionSection,
        dispatcher: Dispatcher,
        counters: Counters,
        on_state: Callable[[WorkerState, Loss | None], None],
        on_ignored: Callable[[Mapping[str, int]], None],
    ) -> None:
        self._session = session
        self._options = options
        self._dispatcher = dispatcher
        self._counters = counters
        self._on_state = on_state
        self._on_ignored = on_ignored
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._loss: Loss | None = None
        self._jobs: set[Job] = set()
        self._waiting_size = 0
        self._answer_bytes = 0
        self._written_bytes = 0
        self._write_due = False
        self._paused = False
        self._ping_excused = False
        self._finished = False
        self._draining = False
        self._end_requested = asyncio.Event()
        self._socket_closed = asyncio.Event()
        self._changed = asyncio.Event()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the upgrade request."""
        # uvloop's transports have the methods of `asyncio.Transport`, but are not of its class.
        self._transport = transport  # type: ignore[assignment]
        self._transport.set_write_buffer_limits(high=MAX_PENDING_SIZE)
        self._write()

    def data_received(self, data: bytes) -> None:
        """Process what the node sent."""
        if self._finished:
            return
        session = self._session
        before = session.state
        try:
            queries = session.receive(data)
            if queries:
                self._submit(queries)
            if session.state != before:
                self._report_state(session.state)
            if session.ignored:
                self._on_ignored(session.ignored)
                session.ignored.clear()
        except Exception as exc:  # noqa: BLE001 - a fault of em-runner costs only this connection
            self._fail(exc)
        # Pongs and the registration are written now. The answers follow in a later turn of the
        # loop.
        self._write()
        if session.loss is not None:
            self._request_end()

    def eof_received(self) -> None:
        """Process the end of what the node sends. The transport then closes itself."""
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection, because its socket is closed."""
        if exc is not None and self._session.loss is None:
            self._request_end(Loss(LossKind.BROKEN, f"the connection broke: {exc}"))
        self._socket_closed.set()
        self._request_end()

    def pause_writing(self) -> None:
        """Pause or resume reading. Both callbacks do the same."""
        self._update_reading()

    resume_writing = pause_writing

    # --- start and end ---

    async def run(self) -> Loss:
        """Serve until the connection ends, close it, and return why it ended."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch_timeouts)
                await self._end_requested.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._finished = True
            # The answers to these jobs cannot be sent. If a connection is lost again and again, its
            # queries must not fill this process's memory while they wait for the handler. The text
            # is dropped after `skipped_as` is set, see `Job`.
            for job in self._jobs:
                job.skipped_as = CANCELLED
                job.body = ""
                job.ticket = b""
            with anyio.CancelScope(shield=True):
                await self._close()
        unknown = Loss(LossKind.UNKNOWN, "the connection was lost")
        # A timeout or a fault comes first: it has closed the connection, and what the session then
        # found follows from that.
        return self._loss or self._session.loss or unknown

    async def drain(self) -> None:
        """Answer and send what has been read, then close with 1001 (going away)."""
        self._draining = True
        # Before the upgrade there is no query to finish, and no WebSocket to close.
        if self._session.state == "connecting":
            self._request_end()
            return
        while not self._finished and (self._jobs or self._unsent_bytes):
            self._changed.clear()
            with anyio.move_on_after(DRAIN_POLL_S):
                await self._changed.wait()
        self._session.close(CloseCode.GOING_AWAY, "the agent disconnects")
        self._write()
        # The node's close frame ends the session. That ends `run`, which closes the socket.
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            await self._socket_closed.wait()

    async def _close(self) -> None:
        """Send the rest if the node still reads, and close the socket in any case."""
        self._changed.set()
        self._write()
        self._transport.close()
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            await self._socket_closed.wait()
            return
        # `close` waits until the node has read everything. A node that does not read would keep the
        # socket open.
        self._transport.abort()

    def _request_end(self, loss: Loss | None = None) -> None:
        self._loss = self._loss or loss  # the first is the cause
        self._end_requested.set()
        self._changed.set()

    def _fail(self, exc: Exception) -> None:
        _log.error("connection_fault", exc_info=exc)
        reason = f"an internal error of em-runner: {type(exc).__name__} (see the log)"
        self._request_end(Loss(LossKind.INTERNAL_ERROR, reason))

    # --- from the node ---

    def _submit(self, queries: list[tuple[bytes, str]]) -> None:
        # Queries that arrive during a drain are not run. Without the `null`, the node would wait
        # for its timeout.
        if self._draining:
            for query_id, _ in queries:
                self._session.answer(query_id, b"null")
            return
        jobs = [
            Job(
                self,
                query_id,
                body,
                len(body) + len(query_id),
            )
            for query_id, body in queries
        ]
        self._jobs.update(jobs)
        for job in jobs:
            self._waiting_size += job.size
        self._dispatcher.submit(jobs)
        self._update_reading()

    def _update_reading(self) -> None:
        """Pause reading while the handler is behind or the node does not read. Otherwise resume."""
        # A node that sends faster than the handler answers, or that never reads, must not fill the
        # worker's memory. Once reading pauses, the kernel's buffers fill, and TCP stops the node.
        if self._finished or self._transport.is_closing():
            return
        behind = self._handler_is_behind()
        if behind or self._unsent_bytes >= MAX_PENDING_SIZE:
            # Queries that are not read yet may delay a pong. The node does not cause that delay.
            self._ping_excused = self._ping_excused or behind
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()
        elif self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _handler_is_behind(self) -> bool:
        return len(self._jobs) >= MAX_PENDING or self._waiting_size >= MAX_PENDING_SIZE

    @property
    def _unsent_bytes(self) -> int:
        return self._answer_bytes + self._buffered_bytes

    @property
    def _buffered_bytes(self) -> int:
        return 0 if self._socket_closed.is_set() else self._transport.get_write_buffer_size()

    def _report_state(self, state: SessionState) -> None:
        # `ready` would follow `draining` if the drain started during the registration.
        if state == "registering" or (state == "ready" and not self._draining):
            self._on_state(state, None)
        self._changed.set()

    # --- to the node ---

    encode = staticmethod(encode_result)

    def answer(self, job: Job, answer: Answer) -> None:
        """Send one answer. A failure is `null` to the node."""
        outcome, payload = answer
        self._jobs.discard(job)
        self._waiting_size -= job.size
        if outcome is Outcome.CANCELLED:
            return
        self._counters.node_answers[outcome] += 1
        if self._finished or not self._session.answer(
            job.ticket,
            payload if outcome is Outcome.OK else b"null",
        ):
            self._counters.late += 1
            return
        self._answer_bytes += len(payload) + len(job.ticket)
        # All answers of a loop turn are one write, and one system call.
        if not self._write_due:
            self._write_due = True
            self._loop.call_soon(self._write)

    def send_answers(self) -> None:
        """Write the answers that wait for the loop's next turn."""
        if self._write_due:
            self._write()

    def _write(self) -> None:
        """Write what the session wants to send."""
        self._write_due = False
        self._answer_bytes = 0
        data = self._session.take_output()
        if data and not self._socket_closed.is_set():
            self._written_bytes += len(data)
            self._transport.write(data)
        if self._paused:
            self._update_reading()
        if self._draining:
            self._changed.set()

    # --- timeouts ---

    async def _watch_timeouts(self) -> None:
        """End the connection when the node exceeds a timeout."""
        try:
            self._request_end(await self._wait_for_timeout())
        except Exception as exc:  # noqa: BLE001 - as in `data_received`
            self._fail(exc)

    async def _wait_for_timeout(self) -> Loss:
        """Wait until the node exceeds a timeout: of the upgrade, the registration, or a ping."""
        timeout_ms = self._options.upgrade_timeout_ms
        if not await self._wait_while("connecting", timeout_ms):
            reason = f"the node did not answer the upgrade within {timeout_ms} ms"
            return Loss(LossKind.UPGRADE_TIMEOUT, reason)
        if not await self._wait_while("registering", timeout_ms):
            reason = "the node accepted the connection, but did not register the agent"
            return Loss(LossKind.REGISTRATION_TIMEOUT, f"{reason} within {timeout_ms} ms")
        while await self._ping_and_wait():
            pass
        reason = f"the node answered no ping within {self._options.ping_interval_ms} ms"
        return Loss(LossKind.NO_PONG, reason)

    async def _wait_while(self, state: SessionState, timeout_ms: int) -> bool:
        """Wait while the session is in a state. Return False if that exceeds the timeout."""
        with anyio.move_on_after(timeout_ms / 1000):
            while self._session.state == state:
                self._changed.clear()
                await self._changed.wait()
        return self._session.state != state

    async def _ping_and_wait(self) -> bool:
        """Send a ping, and wait for the interval. Return False if the connection seems dead."""
        self._session.ping()
        self._ping_excused = self._handler_is_behind()
        self._write()
        sent_bytes = self._sent_bytes
        await anyio.sleep(self._options.ping_interval_ms / 1000)
        # Reading is paused if the node is slow to read its answers. It may have sent the pong, and
        # it is alive if it has read anything since.
        still_reads = self._paused and self._sent_bytes > sent_bytes
        return self._session.ponged or self._ping_excused or still_reads

    @property
    def _sent_bytes(self) -> int:
        """How much the kernel has taken for the node since the start."""
        return self._written_bytes - self._buffered_bytes
