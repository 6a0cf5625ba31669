"""Keeps one WebSocket to one node: connect, upgrade, register, stay, and again for ever.

The I/O around `worker.session`, which decides. Nothing that a node does gets past here: whatever
ends an attempt becomes the reason for a `backoff`, and the next attempt follows.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.abc
import structlog
from websockets.frames import CloseCode

from shared.config import WorkerSpec
from shared.ipc import Counters, Outcome, WorkerState
from shared.logs import Folded
from shared.tokens import TokenError, redact
from worker.dispatch import Answer, Dispatcher, Job
from worker.results import encode_result
from worker.session import Session

READ_BYTES: Final = 65_536
SEND_BYTES: Final = 65_536
MAX_PENDING: Final = 1024
"""Queries of a node that may wait for the handler or for their answer to be written; past it TCP pushes back."""

MAX_PENDING_BYTES: Final = 8 * 1024 * 1024
"""The same bound for their text and for unsent answers; one message may exceed it alone."""

JITTER: Final = 0.2
"""Up to this part of the reconnect interval is left off, so that a node's clients do not return at once."""

CLOSE_TIMEOUT_S: Final = 1.0

# OpenSSL's verify codes (x509_vfy.h).
_OWN_CA: Final = "; if it should be trusted, name its CA's file as tls_ca_file"
_CERTIFICATE_ADVICE: Final = {
    10: "; the node must renew it",
    18: _OWN_CA,
    19: _OWN_CA,
    20: f" (unknown CA){_OWN_CA}",
    21: f" (unknown CA){_OWN_CA}",
    62: "; it is for another host: check the node's address",
}

OnState = Callable[[WorkerState, str], None]


class Lost(Exception):
    """The attempt is over; the text says why."""


class Connection:
    """One worker's way to its node.

    Args:
        spec: which node, as which agent.
        capabilities: what the agent says it can do.
        dispatcher: who answers the queries.
        counters: where reconnects, ignored frames and late answers are counted.
        on_state: called at each change of state, with the reason in words.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        capabilities: tuple[str, ...],
        dispatcher: Dispatcher,
        counters: Counters,
        on_state: OnState,
    ) -> None:
        self._spec = spec
        self._options = spec.agent.connection
        self._capabilities = capabilities
        self._dispatcher = dispatcher
        self._counters = counters
        self._on_state = on_state
        self._folded = Folded()
        self._attempt: Attempt | None = None
        self._draining = False
        self._log = structlog.get_logger("worker.connection")

    async def run(self) -> None:
        """Connect, and again after each loss, until drained or cancelled."""
        while not self._draining:
            self._on_state("connecting", "")
            why = await self._try_once()
            if self._draining:
                return
            delay_s = self._options.reconnect_interval_ms / 1000 * (1 - JITTER * random.random())
            self._counters.reconnects += 1
            self._on_state("backoff", why)
            await anyio.sleep(delay_s)

    async def drain(self) -> None:
        """Answer what has been read, send it, close the socket with 1001 (going away), and stay away."""
        self._draining = True
        if self._attempt is not None:
            await self._attempt.drain()

    def tell_overdue(self) -> None:
        """Log how many ignored frames were held back, once their time is up."""
        for reason, held in self._folded.overdue():
            self._log.warning("frames_ignored", reason=reason, more=held)

    async def _try_once(self) -> str:
        """Return why the connection could not be had, or was lost."""
        token = None
        try:
            token = self._spec.agent.token.read(self._spec.agent.name)
            stream = await self._connect()
        except TokenError as exc:
            return f"no token: {exc}"
        except (OSError, ssl.SSLError, TimeoutError) as exc:
            return _describe(exc, self._spec.node.authority, self._options.connect_timeout_ms)
        session = Session(
            self._spec.node, self._spec.agent.name, self._capabilities, token, self._options.max_frame_bytes
        )
        self._attempt = Attempt(self, stream, session)
        try:
            return redact(await self._attempt.run(), token)
        finally:
            self._attempt = None

    async def _connect(self) -> anyio.abc.ByteStream:
        node, options = self._spec.node, self._options
        with anyio.fail_after(options.connect_timeout_ms / 1000):
            if not node.tls:
                return await anyio.connect_tcp(node.host, node.port)
            # A new context each time: the CA file may have been renewed since.
            context = ssl.create_default_context(cafile=options.tls_ca_file)
            return await anyio.connect_tcp(
                node.host, node.port, ssl_context=context, tls_hostname=node.host, tls_standard_compatible=False
            )


class Attempt:
    """One socket, from its connect to its loss. The source of the jobs that come by it."""

    def __init__(self, connection: Connection, stream: anyio.abc.ByteStream, session: Session) -> None:
        self._owner = connection
        self._options = connection._options
        self._stream = stream
        self._session = session
        self._lost_because = ""
        self._jobs: set[Job] = set()
        self._waiting_bytes = 0
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._answer_bytes = 0
        self._written_bytes = 0
        self._sending = False
        self._paused = False
        self._excused = False
        self._over = False
        self._draining = False
        self._room = asyncio.Event()
        self._output = asyncio.Event()
        self._progress = asyncio.Event()
        self._counted: dict[str, int] = {}

    async def run(self) -> str:
        """Run the session and return why it ended."""
        why = "the connection was lost"
        try:
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                tasks.start_soon(self._guard, self._read, tasks.cancel_scope)
                tasks.start_soon(self._guard, self._write, tasks.cancel_scope)
                tasks.start_soon(self._guard, self._keep, tasks.cancel_scope)
        finally:
            self._over = True
            for job in self._jobs:  # nobody can be sent their answers: they must not pile up, loss after loss
                job.cancelled, job.body = True, ""
            with anyio.CancelScope(shield=True):
                await self._leave()
        return self._lost_because or self._session.ended or why

    async def _guard(self, part: Callable[[], Any], scope: anyio.CancelScope) -> None:
        """Run one part; its end is the end of the attempt, and never an exception's way out."""
        try:
            await part()
        except Lost as exc:
            self._lost_because = str(exc)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
            if isinstance(exc, anyio.EndOfStream):
                self._session.receive(b"")
            elif self._session.ended is None:
                self._lost_because = f"the connection broke: {exc.__cause__ or exc or type(exc).__name__}"
        except Exception as exc:  # noqa: BLE001 - a fault of ours costs this connection, not the worker
            self._owner._log.error("connection_fault", exc_info=exc)
            self._lost_because = f"a fault of em-runner's own: {type(exc).__name__} (see the log)"
        scope.cancel()

    # --- from the node ---

    async def _read(self) -> None:
        session = self._session
        self._output.set()
        while session.ended is None:
            await self._make_room()
            data = await self._stream.receive(READ_BYTES)
            before = session.state
            queries = session.receive(data)
            if queries:
                self._submit(queries)
            if session.state != before:
                self._tell_state()
            if session.ignored:
                self._count_ignored()
            self._collect()
            self._output.set()

    def _submit(self, queries: list[tuple[bytes, str]]) -> None:
        if self._draining:  # nobody is left to answer them; `null` spares the node its time-out
            for query_id, _ in queries:
                self._session.answer(query_id, b"null")
            return
        jobs = [Job(self, query_id, body, len(body)) for query_id, body in queries]
        self._jobs.update(jobs)
        self._waiting_bytes += sum(job.size for job in jobs)
        self._owner._dispatcher.submit(jobs)

    async def _make_room(self) -> None:
        """Wait while the node is ahead of the handler, or does not read its answers."""
        while (behind := self._handler_is_behind()) or self._unsent_bytes >= MAX_PENDING_BYTES:
            self._paused = True
            # A pong may lie behind queries that we do not read yet: that is our delay, not the node's.
            self._excused = self._excused or behind
            self._room.clear()
            await self._room.wait()
        self._paused = False

    def _handler_is_behind(self) -> bool:
        return len(self._jobs) >= MAX_PENDING or self._waiting_bytes >= MAX_PENDING_BYTES

    @property
    def _unsent_bytes(self) -> int:
        return self._outbox_bytes + self._answer_bytes

    def _tell_state(self) -> None:
        if self._session.state == "registering":
            self._owner._on_state("registering", "")
        elif self._session.state == "ready" and not self._draining:
            self._owner._on_state("ready", "")
        self._progress.set()

    def _count_ignored(self) -> None:
        ignored, counted = self._session.ignored, self._owner._counters.ignored
        for reason, number in ignored.items():
            counted[reason] = counted.get(reason, 0) + number
            held = self._owner._folded.admit(reason)
            if held is not None:
                self._owner._log.warning("frames_ignored", reason=reason, more=held)
        ignored.clear()

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
        self._owner._counters.queries_node += 1
        if self._over or not self._session.answer(job.ticket, payload if outcome is Outcome.OK else b"null"):
            self._owner._counters.late += 1
            return
        self._answer_bytes += len(payload)
        self._output.set()
        if self._paused:
            self._room.set()

    def _collect(self) -> None:
        """Take what the session wants sent, pongs too, so that it is counted while it waits."""
        data = self._session.take_output()
        self._answer_bytes = 0
        if data:
            self._outbox.append(data)
            self._outbox_bytes += len(data)

    async def _write(self) -> None:
        while True:
            await self._output.wait()
            self._output.clear()
            self._collect()
            while self._outbox:
                await self._send(self._outbox.popleft())
                if self._paused:
                    self._room.set()
            self._progress.set()

    async def _send(self, data: bytes) -> None:
        """Send in pieces, so that a node that reads slowly is seen to read."""
        self._sending = True
        for start in range(0, len(data), SEND_BYTES):
            piece = data[start : start + SEND_BYTES] if len(data) > SEND_BYTES else data
            await self._stream.send(piece)
            self._outbox_bytes -= len(piece)
            self._written_bytes += len(piece)
        self._sending = False

    # --- time ---

    async def _keep(self) -> None:
        """Hold the node to its time-outs: the upgrade, the registration, then a pong for each ping."""
        timeout_ms = self._options.upgrade_timeout_ms
        await self._wait_until(lambda: self._session.state != "connecting", timeout_ms, "did not answer the upgrade")
        await self._wait_until(
            lambda: self._session.state not in ("connecting", "registering"),
            timeout_ms,
            "took the connection, but did not register the agent",
        )
        while True:
            self._session.ping()
            self._excused = self._handler_is_behind()
            written_bytes = self._written_bytes
            self._output.set()
            await anyio.sleep(self._options.ping_interval_ms / 1000)
            still_reads = self._paused and self._written_bytes > written_bytes
            if not (self._session.ponged or self._excused or still_reads):
                raise Lost(f"the node answered no ping within {self._options.ping_interval_ms} ms")

    async def _wait_until(self, reached: Callable[[], bool], timeout_ms: int, failure: str) -> None:
        with anyio.move_on_after(timeout_ms / 1000):
            while not reached():
                self._progress.clear()
                await self._progress.wait()
            return
        raise Lost(f"the node {failure} within {timeout_ms} ms")

    # --- the end ---

    async def drain(self) -> None:
        """Answer and send what has been read, then close with 1001."""
        self._draining = True
        if self._session.state == "connecting":  # there is nothing to finish, and nobody to take leave of
            self._scope.cancel()
            return
        while not self._over and (self._jobs or self._unsent_bytes or self._output.is_set()):
            self._progress.clear()
            await self._progress.wait()
        self._session.close(CloseCode.GOING_AWAY, "the agent leaves")
        self._output.set()
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            while not self._over:
                self._progress.clear()
                await self._progress.wait()

    async def _leave(self) -> None:
        """Say goodbye if the peer still reads, and let the socket go in any case."""
        self._progress.set()
        with anyio.move_on_after(CLOSE_TIMEOUT_S):
            try:
                self._collect()
                while self._outbox and not self._sending:  # not into the middle of a frame
                    await self._stream.send(self._outbox.popleft())
                await self._stream.aclose()
                return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
                pass
        await anyio.aclose_forcefully(self._stream)


def _describe(exc: Exception, authority: str, timeout_ms: int) -> str:
    if isinstance(exc, TimeoutError):
        return f"no connection to {authority} within {timeout_ms} ms"
    if isinstance(exc, ssl.SSLCertVerificationError):
        advice = _CERTIFICATE_ADVICE.get(exc.verify_code, "")
        return f"the certificate of {authority} is refused: {exc.verify_message}{advice}"
    if isinstance(exc, ssl.SSLError):
        return f"no TLS with {authority}: {exc.reason or exc}"
    return f"cannot connect to {authority}: {_root(exc)}"


def _root(exc: BaseException) -> str:
    """Return the innermost reason; anyio wraps one error for each address it tried."""
    if isinstance(exc, BaseExceptionGroup):
        return _root(exc.exceptions[0])
    if exc.__cause__ is not None:
        return _root(exc.__cause__)
    text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return text or type(exc).__name__
