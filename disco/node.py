"""A node's life: bound, serving, stopped."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import anyio

from disco import embryos
from disco.hub import Hub
from disco.listener import BACKLOG, Listener
from disco.registry import Registry
from disco.settings import NodeSettings
from shared.errors import ConfigError
from shared.tokens import require_strong


class Node:
    """A node that serves; `serve` makes one."""

    def __init__(self, hub: Hub, host: str, port: int) -> None:
        """`host` and `port` are where clients of this machine reach it."""
        self._hub = hub
        self._authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
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
        ConfigError: when the address cannot be bound, is open to others without a secret, or the
            secret is too short to be one.
    """
    if settings.secret is not None:
        require_strong(settings.secret.reveal(), "disco")
    sock = await _bind(settings)
    hub = Hub(settings)
    listener = Listener(hub, sock)
    try:
        await listener.start()
        host, port = sock.getsockname()[:2]
        yield Node(hub, _reachable(host), port)
    finally:
        hub.stop()
        with anyio.CancelScope(shield=True):
            await listener.stop()


async def _bind(settings: NodeSettings) -> socket.socket:
    try:
        found = await anyio.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise ConfigError(f"disco: no address for host {settings.host!r} ({exc.strerror}); try 127.0.0.1") from None
    family, kind, _, _, address = found[0]
    if settings.secret is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"disco: {settings.host} is open to other machines and no secret is set; "
            "set one so that agents must show a token, or listen on 127.0.0.1"
        )
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # Here and not later: two sockets may share a port until one of them listens.
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise ConfigError(_explain(exc, settings)) from None
    return sock


def _explain(exc: OSError, settings: NodeSettings) -> str:
    place = f"disco: cannot listen on {settings.host}:{settings.port}"
    match exc.errno:
        case errno.EADDRINUSE:
            return f"{place}: another program does; stop it, or choose another port (0 takes any free one)"
        case errno.EACCES:
            return f"{place}: it needs privileges; choose a port above 1023"
        case errno.EADDRNOTAVAIL:
            return f"{place}: this machine has no such address; try 127.0.0.1"
        case code:
            return f"{place}: {os.strerror(code) if code else exc}; choose another host or port"


def _reachable(host: str) -> str:
    """Return the address under which this machine reaches a socket bound to `host`."""
    if not ipaddress.ip_address(host).is_unspecified:
        return host
    return "::1" if ":" in host else "127.0.0.1"
