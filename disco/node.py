"""A node's life: bound, serving, stopped."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio

from disco import embryos
from disco.http import application
from disco.hub import Hub
from disco.registry import Registry
from disco.settings import NodeSettings
from disco.socket import AgentSocket
from shared.errors import ConfigError
from shared.http_server import HttpServer, listen, resolve
from shared.tokens import require_strong

GRACE_S: Final = 0.25
"""How long clients may take to part when the node stops; then they are cut."""


class Node:
    """A node that serves; `serve` makes one."""

    def __init__(self, hub: Hub, host: str, port: int) -> None:
        """`host` and `port` are where clients of this machine reach it."""
        self._hub = hub
        self._authority = _authority(host, port)
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        """The node's address as agents write it, such as `ws://127.0.0.1:8080`, without the path."""
        return f"ws://{self._authority}"

    @property
    def http_url(self) -> str:
        """The node's address as HTTP clients write it."""
        return f"http://{self._authority}"

    @property
    def registry(self) -> Registry:
        """The listed agents."""
        return self._hub.registry

    @property
    def in_flight(self) -> int:
        """How many queries are being waited for."""
        return len(self._hub.queries)

    async def query(
        self, text: str, capabilities: Collection[str] | None = None, timeout_ms: int | None = None
    ) -> list[Any]:
        """Ask the agents as POST /query does, and return the values that it would answer.

        Args:
            text: the query.
            capabilities: only agents with one of these are asked, when there are any.
            timeout_ms: another time-out than the node's.
        """
        return embryos.decode(await self._hub.queries.ask(text, capabilities or (), timeout_ms))

    async def wait_for(self, name: str, timeout_s: float = 5.0) -> None:
        """Return when an agent is listed as `name`.

        Raises:
            TimeoutError: when that takes longer than `timeout_s`.
        """
        await self._wait_until(lambda: name in self.registry, timeout_s)

    async def wait_gone(self, name: str, timeout_s: float = 5.0) -> None:
        """Return when no agent is listed as `name`.

        Raises:
            TimeoutError: when that takes longer than `timeout_s`.
        """
        await self._wait_until(lambda: name not in self.registry, timeout_s)

    def drop(self, name: str) -> bool:
        """Cut an agent's socket without a close frame, and return whether there was one."""
        peer = self.registry.peer(name)
        if peer is None:
            return False
        peer.drop("the node was told to drop it")
        return True

    async def _wait_until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        with self._hub.changes() as changes, anyio.fail_after(timeout_s):
            while not holds():
                await changes.wait()


@asynccontextmanager
async def serve(settings: NodeSettings) -> AsyncIterator[Node]:
    """Serve a node for as long as the context lasts; its port is bound before the context is entered.

    Raises:
        ConfigError: when the address is open to others without a secret, or the secret is too short.
        StartError: when the address cannot be had.
    """
    if settings.secret is not None:
        require_strong(settings.secret.reveal(), "disco")
    place = resolve(settings.host, settings.port, hint=settings.port_hint)
    if settings.secret is None and not place.is_loopback:
        raise ConfigError(
            f"disco: {settings.host} is open to other machines and no secret is set; "
            "set one so that agents must show a token, or listen on 127.0.0.1"
        )
    listener = listen(place, hint=settings.port_hint)
    bound, port = listener.getsockname()[:2]
    host = _reachable(bound)
    hub = Hub(settings, f"ws://{_authority(host, port)}")
    server = HttpServer(application(hub), listener, ws=functools.partial(AgentSocket, hub))
    try:
        await server.start()
        yield Node(hub, host, port)
    finally:
        hub.stop()
        with anyio.CancelScope(shield=True):
            await server.stop(GRACE_S)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reachable(host: str) -> str:
    """Return the address under which this machine reaches a socket bound to `host`."""
    if not ipaddress.ip_address(host).is_unspecified:
        return host
    return "::1" if ":" in host else "127.0.0.1"
