"""Keeps one WebSocket to one node: connects, serves until the connection ends, and connects again.

`worker.node._connection` serves one connection. The cause of its end is the reason for a `backoff`,
after which the client connects again.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

import aiohappyeyeballs
import anyio

from shared.config.load import WorkerSpec
from shared.config.nodes import is_ip_address
from shared.config.tokens import TokenError
from shared.ipc import Counters, WorkerState
from shared.logs.logger import LogThrottle, get_logger
from shared.logs.redaction import redact
from worker.dispatching.dispatch import Dispatcher
from worker.node._connection import NodeConnection
from worker.node.losses import Loss, LossKind
from worker.node.session import Session

JITTER: Final = 0.2
"""The reconnect interval is shortened by a random part, up to this.

Otherwise all clients of a node that restarts would reconnect at the same time.
"""

NEXT_ADDRESS_S: Final = 0.25
"""How long to wait for one address of a node before also trying the next (RFC 8305, 5)."""

_CA_ADVICE: Final = "; if it should be trusted, name its CA's file as tls_ca_file"
# By OpenSSL's verify code (x509_vfy.h).
_CERTIFICATE_ADVICE: Final = {
    10: "; the node must renew it",
    18: _CA_ADVICE,
    19: _CA_ADVICE,
    20: f" (unknown CA){_CA_ADVICE}",
    21: f" (unknown CA){_CA_ADVICE}",
    62: "; it is for another host: check the node's address",
}

_log = get_logger()


class NodeClient:
    """One worker's connections to its node, one after another.

    Args:
        spec: which node, as which agent.
        capabilities: what the agent registers.
        dispatcher: answers the queries.
        on_state: called at each change of state. With `backoff` it gets why there is no connection.

    Attributes:
        counters: what was counted over all connections. Fields that the client does not count are
            zero.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        capabilities: tuple[str, ...],
        dispatcher: Dispatcher,
        on_state: Callable[[WorkerState, Loss | None], None],
    ) -> None:
        self.counters = Counters()
        self._spec = spec
        self._options = spec.agent.connection
        self._capabilities = capabilities
        self._dispatcher = dispatcher
        self._on_state = on_state
        self._throttle = LogThrottle("frames_ignored")
        self._connection: NodeConnection | None = None
        self._draining = False

    async def run(self) -> None:
        """Connect, and again after each loss, until drained or cancelled."""
        while not self._draining:
            self._on_state("connecting", None)
            loss = await self._connect_and_serve()
            if self._draining:
                return
            # The interval is shortened, not lengthened: an operator set it as the longest wait.
            delay_s = self._options.reconnect_interval_ms / 1000
            delay_s *= 1 - JITTER * random.random()
            self.counters.connection_failures += 1
            self._on_state("backoff", loss)
            await anyio.sleep(delay_s)

    async def drain(self) -> None:
        """Answer what has been read, close with 1001 (going away), and do not reconnect."""
        self._draining = True
        if self._connection is not None:
            await self._connection.drain()

    async def _connect_and_serve(self) -> Loss:
        """Connect, serve until the connection ends, and return why it failed or ended."""
        try:
            # At each connect, because the token's file may have changed.
            token = self._spec.agent.token.read(self._spec.agent.name)
            connection = await self._connect(token)
        except TokenError as exc:
            return Loss(LossKind.NO_TOKEN, f"no token: {exc}")
        # OSError is also the base of TLS errors and timeouts. uvloop raises RuntimeError, too.
        except (OSError, RuntimeError) as exc:
            return self._connect_loss(exc)
        self._connection = connection
        try:
            loss = await connection.run()
        finally:
            self._connection = None
        # A node may quote the token, and the reason goes to the log and to the status page.
        return loss._replace(reason=redact(loss.reason, token))

    async def _connect(self, token: str | None) -> NodeConnection:
        node = self._spec.node
        # A new context each time, because the CA file may have been renewed.
        tls = None
        if node.tls:
            tls = ssl.create_default_context(cafile=self._options.tls_ca_file)
        with anyio.fail_after(self._options.connect_timeout_ms / 1000):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: self._connection_for(token),
                **await self._connect_arguments(),
                ssl=tls,
                server_hostname=node.host if node.tls else None,
            )
        return connection

    async def _connect_arguments(self) -> dict[str, Any]:
        """Return arguments of `create_connection`: an address, or for a name a connected socket."""
        node = self._spec.node
        # An address needs no resolver, so the resolver's threads are not started.
        if is_ip_address(node.host):
            return {"host": node.host, "port": node.port}
        # The loop would try the addresses of a name one after another. A dead one could take the
        # whole timeout, and the others would never be tried.
        sock = await aiohappyeyeballs.start_connection(
            await self._resolve(),
            happy_eyeballs_delay=NEXT_ADDRESS_S,
        )
        # Without this, the kernel delays a small write until the previous one is acknowledged
        # (Nagle's algorithm).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {"sock": sock}

    async def _resolve(self) -> list[tuple[Any, ...]]:
        node = self._spec.node
        loop = asyncio.get_running_loop()
        return list(
            await loop.getaddrinfo(
                node.host,
                node.port,
                type=socket.SOCK_STREAM,
            )
        )

    def _connection_for(self, token: str | None) -> NodeConnection:
        session = Session(
            self._spec.node,
            self._spec.agent.name,
            self._capabilities,
            token,
            self._options.max_frame_bytes,
        )
        return NodeConnection(
            session,
            self._options,
            self._dispatcher,
            self.counters,
            self._on_state,
            self._count_ignored,
        )

    def _count_ignored(self, ignored: Mapping[str, int]) -> None:
        for kind, number in ignored.items():
            self.counters.ignored[kind] = self.counters.ignored.get(kind, 0) + number
            # A node can send any number of such frames.
            suppressed = self._throttle.admit(kind)
            if suppressed is not None:
                _log.warning(
                    "frames_ignored",
                    kind=kind,
                    **suppressed,
                )

    def _connect_loss(self, exc: Exception) -> Loss:
        authority = self._spec.node.authority
        if isinstance(exc, TimeoutError):
            reason = f"no connection to {authority} within {self._options.connect_timeout_ms} ms"
            return Loss(LossKind.CONNECT_TIMEOUT, reason)
        if isinstance(exc, ssl.SSLCertVerificationError):
            advice = _CERTIFICATE_ADVICE.get(exc.verify_code, "")
            problem = exc.verify_message.removesuffix(".")
            reason = f"the worker refuses the certificate of {authority}: {problem}{advice}"
            return Loss(LossKind.CERTIFICATE_REFUSED, reason)
        if isinstance(exc, ssl.SSLError):
            return Loss(LossKind.TLS_FAILED, f"no TLS with {authority}: {exc.reason or exc}")
        return Loss(LossKind.CONNECT_FAILED, f"cannot connect to {authority}: {_reason(exc)}")


def _reason(exc: Exception) -> str:
    """Return the reason without an address: a name may have several, and all may have failed."""
    if isinstance(exc, socket.gaierror):
        return exc.strerror or "its name has no address"
    if isinstance(exc, OSError) and exc.errno:
        return os.strerror(exc.errno)
    return str(exc) or type(exc).__name__
