"""Keeps one WebSocket to one node: connect, upgrade, register, stay, and again for ever.

What a connection is, once it is there, is `worker.attempt`. Whatever ends one becomes the reason
for a `backoff`, and the next attempt follows.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
from collections.abc import Callable
from typing import Any, Final

import aiohappyeyeballs
import anyio

from shared.config import WorkerSpec
from shared.ipc import Counters, WorkerState
from shared.logs import Folded, get_logger
from shared.nodes import is_address
from shared.redaction import redact
from shared.tokens import TokenError
from worker.attempt import Attempt
from worker.dispatch import Dispatcher
from worker.session import Session, SessionState

JITTER: Final = 0.2
"""Up to this part of the reconnect interval is left off, so that a node's clients do not return at once."""

NEXT_ADDRESS_S: Final = 0.25
"""How long one address of a node may take before the next is tried beside it (RFC 8305, 5)."""

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
        self._log = get_logger("worker.connection")

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
            attempt = await self._connect(token)
        except TokenError as exc:
            return f"no token: {exc}"
        except (OSError, RuntimeError) as exc:  # of TLS and time too; uvloop has its own of no class
            return _describe(exc, self._spec.node.authority, self._options.connect_timeout_ms)
        self._attempt = attempt
        try:
            return redact(await attempt.run(), token)
        finally:
            self._attempt = None

    async def _connect(self, token: str | None) -> Attempt:
        node, loop = self._spec.node, asyncio.get_running_loop()
        # A new context each time: the CA file may have been renewed since.
        tls = ssl.create_default_context(cafile=self._options.tls_ca_file) if node.tls else None
        with anyio.fail_after(self._options.connect_timeout_ms / 1000):
            _, attempt = await loop.create_connection(
                lambda: self._begin(token),
                **await self._way(),
                ssl=tls,
                server_hostname=node.host if node.tls else None,
            )
        return attempt

    async def _way(self) -> dict[str, Any]:
        """Return what leads to the node: its address, or for a name a socket that is connected to one of its own."""
        node = self._spec.node
        if is_address(node.host):  # no resolver is needed, and none of its threads
            return {"host": node.host, "port": node.port}
        sock = await aiohappyeyeballs.start_connection(await self._resolve(), happy_eyeballs_delay=NEXT_ADDRESS_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {"sock": sock}

    async def _resolve(self) -> list[tuple[Any, ...]]:
        node, loop = self._spec.node, asyncio.get_running_loop()
        return list(await loop.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM))

    def _begin(self, token: str | None) -> Attempt:
        spec, options = self._spec, self._options
        session = Session(spec.node, spec.agent.name, self._capabilities, token, options.max_frame_bytes)
        return Attempt(session, options, self._dispatcher, self._counters, self._tell_state, self._count_ignored)

    def _tell_state(self, state: SessionState) -> None:
        if state == "registering" or state == "ready":
            self._on_state(state, "")

    def _count_ignored(self, reason: str, number: int) -> None:
        self._counters.ignored[reason] = self._counters.ignored.get(reason, 0) + number
        held = self._folded.admit(reason)
        if held is not None:
            self._log.warning("frames_ignored", reason=reason, more=held)


def _describe(exc: Exception, authority: str, timeout_ms: int) -> str:
    if isinstance(exc, TimeoutError):
        return f"no connection to {authority} within {timeout_ms} ms"
    if isinstance(exc, ssl.SSLCertVerificationError):
        advice = _CERTIFICATE_ADVICE.get(exc.verify_code, "")
        return f"the certificate of {authority} is refused: {exc.verify_message.removesuffix('.')}{advice}"
    if isinstance(exc, ssl.SSLError):
        return f"no TLS with {authority}: {exc.reason or exc}"
    return f"cannot connect to {authority}: {_reason(exc)}"


def _reason(exc: Exception) -> str:
    """Return the bare reason; where several addresses failed alike, it is told once."""
    if isinstance(exc, socket.gaierror):
        return exc.strerror or "its name has no address"
    if isinstance(exc, OSError) and exc.errno:
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__
