"""The life of a node: it binds an address, serves, and stops."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
)
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from disco import _embryos
from disco._http import application
from disco._hub import Hub
from disco._registry import Registry
from disco._settings import NodeSettings
from disco._socket import AgentSocket
from shared.config.nodes import NodeAddress
from shared.config.tokens import require_strong
from shared.errors import ConfigError
from shared.http.server import Address, HttpServer

_WAIT_TIMEOUT_S: Final = 30.0
"""How long a test waits for an agent."""

_GRACE_S: Final = 0.25
"""How long clients may take to disconnect when the node stops. The node then cuts them."""


class Node:
    """A node that serves; `serve` makes one.

    Attributes:
        host: the address at which clients on this machine reach the node.
        port: the TCP port.
        address: the same as a node's address.
    """

    def __init__(
        self,
        settings: NodeSettings,
        host: str,
        port: int,
    ) -> None:
        self.host = host
        self.port = port
        self.address = NodeAddress(host, port, False)
        self._hub = Hub(settings, self.url)

    @property
    def url(self) -> str:
        """The node's URL for agents, without the path, such as `ws://127.0.0.1:8080`."""
        return str(self.address)

    @property
    def registry(self) -> Registry:
        """The registered agents."""
        return self._hub.registry

    @property
    def in_flight(self) -> int:
        """The number of queries in flight."""
        return len(self._hub.queries)

    async def query(
        self,
        text: str,
        capabilities: Collection[str] = (),
        timeout_ms: int | None = None,
    ) -> list[Any]:
        """Send a query to the agents as POST /query does, and return the decoded embryos.

        Args:
            text: the query.
            capabilities: ask only agents with one of these. If no agent has one, all are asked.
            timeout_ms: replaces the node's timeout.
        """
        return _embryos.decode(await self._hub.queries.ask(text, capabilities, timeout_ms))

    async def wait_for(
        self,
        name: str,
        timeout_s: float = _WAIT_TIMEOUT_S,
    ) -> None:
        """Wait until an agent is registered as `name`.

        Raises:
            TimeoutError: after `timeout_s`.
        """
        await self.wait_until(lambda: name in self.registry, timeout_s)

    def drop(self, name: str) -> bool:
        """Cut an agent's socket without a close frame. Returns whether it was registered."""
        connection = self.registry.connection(name)
        if connection is None:
            return False
        connection.drop("the node dropped it on request")
        return True

    async def wait_until(
        self,
        condition: Callable[[], bool],
        timeout_s: float = _WAIT_TIMEOUT_S,
    ) -> None:
        """Wait until a condition on the registry holds.

        Raises:
            TimeoutError: after `timeout_s`.
        """
        with self._hub.changes() as changes, anyio.fail_after(timeout_s):
            while not condition():
                await changes.wait()


@asynccontextmanager
async def serve(settings: NodeSettings) -> AsyncIterator[Node]:
    """Serve a node until the block ends. Its port is bound when the block starts.

    Raises:
        ConfigError: if the secret is weak, or there is none and others can reach the address.
        StartError: if the address is unavailable.
    """
    if settings.secret is not None:
        require_strong(settings.secret.reveal(), "disco")
    address = Address.resolve(settings.host, settings.port, hint=settings.port_hint)
    # The resolved address decides, not the text: "localhost" is loopback, and a name that looks
    # local may resolve to an address that other machines reach.
    if settings.secret is None and not address.is_loopback:
        raise ConfigError(
            f"disco: {settings.host} is open to other machines and no secret is set; "
            "set one so that agents must show a token, or listen on 127.0.0.1"
        )
    listener = address.listen()
    bound, port = listener.getsockname()[:2]
    node = Node(settings, _local_address(bound), port)
    hub = node._hub
    server = HttpServer(application(hub), listener, functools.partial(AgentSocket, hub))
    try:
        await server.start()
        yield node
    finally:
        # Before the server stops: event streams end by themselves only when they see the flag.
        hub.stop()
        # Shielded: a cancelled caller must still leave no socket and no task behind.
        with anyio.CancelScope(shield=True):
            await server.stop(_GRACE_S)


def _local_address(host: str) -> str:
    """Return the address at which this machine reaches a socket that is bound to `host`."""
    # 0.0.0.0 and :: are no destinations.
    if not ipaddress.ip_address(host).is_unspecified:
        return host
    return "::1" if ":" in host else "127.0.0.1"
