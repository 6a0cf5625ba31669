"""One connection to a node, from its first byte to its loss: the I/O around `worker.session`, which decides.

On a query's way there are callbacks only, no tasks and no streams: what a read brings is decoded,
submitted and, when the handler is done, written by one `write` for all answers of a loop turn.
Nothing a node does gets past here: whatever ends the attempt becomes what `run` returns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, cast

import anyio
from websockets.frames import CloseCode

from shared.config import Connection as Options
from shared.ipc import Counters, Outcome
from shared.logs import get_logger
from worker.dispatch import Dispatcher
from worker.jobs import Answer, Job
from worker.results import encode_result
from worker.session import Session, SessionState

MAX_PENDING: Final = 1024
"""Queries of a node that may wait for the handler; past it nothing more is read, and TCP pushes back."""

MAX_PENDING_BYTES: Final = 8 * 1024 * 1024
"""The same bound for their text and for unsent answers; one message may exceed it alone."""

CLOSE_TIMEOUT_S: Final = 1.0
"""How long the closing handshake, and the last bytes before it, may take."""

DRAIN_POLL_S: Final = 0.01
"""How often a drain looks whether the node has read its answers: nothing tells when it has."""

_log = get_logger("worker.connection")


class Lost(Exception):
    """The attempt is over; the text says why."""


class Attempt(asyncio.Protocol):
    """One socket. The source of the jobs that come by it.

    Args:
        session: what the bytes mean.
        options: the time-outs.
        dispatcher: who answers the queries.
        counters: where answers are counted.
        on_state: called with each new state of the session but its end.
        on_ignored: called with a reason and how many frames were ignored for it.
    """

    def __init__(
        self,
        session: Session,
        options: Options,
        dispatcher: Dispatcher,
        counters: Counters,
        on_state: Callable[[SessionState], None],
        on_ignored: Callable[[str, int], None],
    ) -> None:
        self._session = session
        self._options = options
        self._dispatcher = dispatcher
        self._counters = counters
        self._on_state = on_state
        self._on_ignored = on_ignored
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._lost_because = ""
        self._jobs: set[Job] = set()
        self._waiting_bytes = 0
        self._answer_bytes = 0
        self._written_bytes = 0
        self._flush_due = False
        self._paused = False
        self._excused = False
        self._over = False
        self._draining = False
        self._ended = asyncio.Event()
        self._closed = asyncio.Event()
        self._progress = asyncio.Event()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods, not by its class
        self._transport.set_write_buffer_limits(high=MAX_PENDING_BYTES)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what the node sent."""
        if self._over:
            return
        session = self._session
        before = session.state
        try:
            queries = session.receive(data)
            if queries:
                self._submit(queries)
            if session.state != before:
                self._tell_state()
            if session.ignored:
                self._tell_ignored()
        except Exception as exc:  # noqa: BLE001 - a fault of ours costs this connection, not the worker
            self._fault(exc)
        self._flush()  # pongs and the handshake; answers come later
        if session.ended is not None:
            self._end()

    def eof_received(self) -> None:
        """Take the end of what the node sends; the transport closes itself."""
        self.data_received(b"")

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the socket."""
        if exc is not None and self._session.ended is None:
            self._end(f"the connection broke: {exc}")
        self._closed.set()
        self._end()

    def pause_writing(self) -> None:
        """Read no more from a node that leaves its answers unread."""
        self._govern()

    def resume_writing(self) -> None:
        """Read on."""
        self._govern()

    # --- its life ---

    async def run(self) -> str:
        """Serve until the end, leave, and return why it ended."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep)
                await self._ended.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._over = True
            for job in self._jobs:  # nobody can be sent their answers: they must not pile up, loss after loss
                job.cancelled, job.body, job.ticket = True, "", b""
            with anyio.CancelScope(shield=True):
                await self._leave()
        return self._lost_because or self._session.ended or "the connection was lost"

    async def drain(self) -> None:
        """Answer and send what has been read, then close with 1001."""
        self._draining = True
        if self._session.state == "connecting":  # there is nothing to finish, and nobody to take leave of
            self._end()
            return
        while not self._over and (self._jobs or self._unsent_bytes):
            await self._wait_for_progress(DRAIN_POLL_S)
        self._session.close(CloseCode.GOING_AWAY, "the agent leaves")
        self._flush()
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            while not self._over:
                await self._wait_for_progress(CLOSE_TIMEOUT_S)

    async def _wait_for_progress(self, timeout_s: float) -> None:
        self._progress.clear()
        with anyio.move_on_after(timeout_s):
            await self._progress.wait()

    async def _leave(self) -> None:
        """Send what is left if the node still reads, and let the socket go in any case."""
        self._progress.set()
        self._flush()
        self._transport.close()
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            await self._closed.wait()
            return
        self._transport.abort()

    def _end(self, why: str = "") -> None:
        self._lost_because = self._lost_because or why
        self._ended.set()
        self._progress.set()

    def _fault(self, exc: Exception) -> None:
        _log.error("connection_fault", exc_info=exc)
        self._end(f"a fault of em-runner's own: {type(exc).__name__} (see the log)")

    # --- from the node ---

    def _submit(self, queries: list[tuple[bytes, str]]) -> None:
        if self._draining:  # nobody is left to answer them; `null` spares the node its time-out
            for query_id, _ in queries:
                self._session.answer(query_id, b"null")
            return
        jobs = [Job(self, query_id, body, len(body) + len(query_id)) for query_id, body in queries]
        self._jobs.update(jobs)
        for job in jobs:
            self._waiting_bytes += job.size
        self._dispatcher.submit(jobs)
        self._govern()

    def _govern(self) -> None:
        """Read no more while the node is ahead of the handler or leaves its answers unread, and read on after it."""
        if self._over or self._transport.is_closing():
            return
        behind = self._handler_is_behind()
        if behind or self._unsent_bytes >= MAX_PENDING_BYTES:
            # A pong may lie behind queries that we do not read yet: that is our delay, not the node's.
            self._excused = self._excused or behind
            if not self._paused:
                self._paused = True
                self._transport.pause_reading()
        elif self._paused:
            self._paused = False
            self._transport.resume_reading()

    def _handler_is_behind(self) -> bool:
        return len(self._jobs) >= MAX_PENDING or self._waiting_bytes >= MAX_PENDING_BYTES

    @property
    def _unsent_bytes(self) -> int:
        return self._answer_bytes + self._buffered_bytes

    @property
    def _buffered_bytes(self) -> int:
        return 0 if self._closed.is_set() else self._transport.get_write_buffer_size()

    def _tell_state(self) -> None:
        if self._session.state == "registering" or (self._session.state == "ready" and not self._draining):
            self._on_state(self._session.state)
        self._progress.set()

    def _tell_ignored(self) -> None:
        for reason, number in self._session.ignored.items():
            self._on_ignored(reason, number)
        self._session.ignored.clear()

    # --- to the node ---

    def encode(self, result: Any) -> bytes:
        """Return a result as the JSON that goes into `data`."""
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        """Send one answer; what a handler failed at is `null` to the node."""
        outcome, payload = answer
        self._jobs.discard(job)
        self._waiting_bytes -= job.size
        if outcome is Outcome.CANCELLED:
            return
        self._counters.node[outcome] += 1
        if self._over or not self._session.answer(job.ticket, payload if outcome is Outcome.OK else b"null"):
            self._counters.late += 1
            return
        self._answer_bytes += len(payload) + len(job.ticket)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def flush(self) -> None:
        """Write the answers that wait for the loop's next turn."""
        if self._flush_due:
            self._flush()

    def _flush(self) -> None:
        """Write what the session wants sent."""
        self._flush_due = False
        self._answer_bytes = 0
        data = self._session.take_output()
        if data and not self._closed.is_set():
            self._written_bytes += len(data)
            self._transport.write(data)
        if self._paused:
            self._govern()
        if self._draining:
            self._progress.set()

    # --- time ---

    async def _keep(self) -> None:
        """Hold the node to its time-outs: the upgrade, the registration, then a pong for each ping."""
        try:
            await self._greeted()
            while True:
                await self._answers_ping()
        except Lost as exc:
            self._end(str(exc))
        except Exception as exc:  # noqa: BLE001 - as above
            self._fault(exc)

    async def _greeted(self) -> None:
        timeout_ms = self._options.upgrade_timeout_ms
        await self._wait_until(lambda: self._session.state != "connecting", timeout_ms, "did not answer the upgrade")
        await self._wait_until(
            lambda: self._session.state not in ("connecting", "registering"),
            timeout_ms,
            "took the connection, but did not register the agent",
        )

    async def _answers_ping(self) -> None:
        self._session.ping()
        self._excused = self._handler_is_behind()
        self._flush()
        left_bytes = self._left_bytes
        await anyio.sleep(self._options.ping_interval_ms / 1000)
        still_reads = self._paused and self._left_bytes > left_bytes
        if not (self._session.ponged or self._excused or still_reads):
            raise Lost(f"the node answered no ping within {self._options.ping_interval_ms} ms")

    @property
    def _left_bytes(self) -> int:
        """How much has left for the node since the begin."""
        return self._written_bytes - self._buffered_bytes

    async def _wait_until(self, reached: Callable[[], bool], timeout_ms: int, failure: str) -> None:
        with anyio.move_on_after(timeout_ms / 1000):
            while not reached():
                self._progress.clear()
                await self._progress.wait()
            return
        raise Lost(f"the node {failure} within {timeout_ms} ms")
