"""An HTTP server inside another program: uvicorn's protocol, without uvicorn's Server.

Runner and embedded node live in a loop that they own, so this takes no signals, needs no task of
its own, and stops without waiting for anybody's tick. What is served is the caller's.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import socket
from email.utils import formatdate
from typing import Any, Final, NamedTuple

import anyio
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from shared.errors import StartError

BACKLOG: Final = 2048
LINGER_S: Final = 1.0
"""How long the rest of a request that is already answered is read and dropped."""

CUT_S: Final = 0.25
"""How long connections that were cut may take to be gone."""

# Bad requests are the client's news, not ours; a failure of ours still reaches the log.
_LOGGER = logging.getLogger("http_server")
_LOGGER.setLevel(logging.ERROR)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, made fit for hostile clients."""

    def __init__(self, config: Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self.logger = _LOGGER

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the WebSocket protocol, unless an answer is still being written to it.

        uvicorn would let both write, and would never tell the first that its client has gone.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        super().handle_websocket_upgrade()

    def on_message_complete(self) -> None:
        """Note that the request is whole, also when it was answered before that."""
        if self.cycle is not None:
            self.cycle.more_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Give a client that was refused in mid-request a moment to see why.

        Closing at once would reset the connection under what it still sends, and the answer with it.
        """
        answered = self.cycle
        super().on_response_complete()
        if answered.more_body:
            self.loop.call_later(LINGER_S, self._stop_lingering, answered)

    def _stop_lingering(self, answered: RequestResponseCycle) -> None:
        if self.cycle is answered and answered.more_body:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP as every other error is answered."""
        body = b'{"error":"that is not an HTTP request"}'
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()


class Connections(set[Any]):
    """uvicorn's set of open connections, which also tells when the last one goes."""

    def __init__(self) -> None:
        super().__init__()
        self._emptied = anyio.Event()

    def discard(self, connection: object) -> None:
        """Take out a connection that has ended, or is handed to another protocol."""
        super().discard(connection)
        if not self:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Return when no connection is open."""
        while self:
            self._emptied = anyio.Event()
            await self._emptied.wait()


class HttpServer:
    """A listening socket that serves one ASGI application.

    Args:
        app: what answers requests.
        listener: a socket that listens, see `listen`; the server takes it over.
        ws: builds the protocol of each WebSocket upgrade; without it upgrades are refused.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket, ws: Any = "none") -> None:
        self._listener = listener
        self._state = ServerState()
        self._state.connections = self._connections = Connections()
        self._server: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._config = Config(
            app,
            http="httptools",
            ws=ws,
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )

    async def start(self) -> None:
        """Begin to accept connections."""
        self._config.load()
        self._loop = asyncio.get_running_loop()
        self._set_date()
        self._server = await self._loop.create_server(
            lambda: HttpConnection(self._config, self._state), sock=self._listener, backlog=BACKLOG
        )

    def close(self) -> None:
        """Accept no more connections; those that wait for a request are closed, the others after their answer."""
        if self._server is not None:
            self._server.close()
        self._listener.close()
        for connection in list(self._connections):
            connection.shutdown()

    async def stop(self, grace_s: float) -> None:
        """Close, give the answers under way `grace_s` seconds, then cut what is left."""
        self.close()
        with anyio.move_on_after(grace_s):
            await self._drained()
        for connection in list(self._connections):
            connection.transport.abort()
        with anyio.move_on_after(CUT_S):
            await self._drained()
        for task in list(self._state.tasks):
            task.cancel()
        await self._drained()
        if self._clock is not None:
            self._clock.cancel()

    async def _drained(self) -> None:
        await self._connections.wait_empty()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)

    def _set_date(self) -> None:
        # RFC 9110, 6.6.1: a server with a clock sends Date. Made once a second, not once an answer.
        self._state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = self._loop.call_later(1.0, self._set_date)


class Place(NamedTuple):
    """A resolved address to listen on: what `socket` wants, and how the user wrote it."""

    family: int
    address: tuple[Any, ...]
    written: str

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.address[0]).is_loopback


def resolve(host: str, port: int, *, hint: str) -> Place:
    """Return the place that a host name or address and a port name.

    Raises:
        StartError: when there is none; `hint` ends the error and says how to choose another.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as exc:
        raise StartError(f"no address for host {host!r} ({getattr(exc, 'strerror', None) or exc}); {hint}") from None
    return Place(family, address, f"{host}:{port}")


def listen(place: Place, *, hint: str) -> socket.socket:
    """Return a socket that listens.

    Raises:
        StartError: when the address cannot be had; `hint` ends the error and says how to choose another.
    """
    listener = socket.socket(place.family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place.address)
        # Here and not later: two sockets may share a port until one of them listens.
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        listener.close()
        raise StartError(f"cannot listen on {place.written}: {_reason(exc)}; {hint}") from None
    return listener


def _reason(exc: OSError) -> str:
    reasons = {
        errno.EADDRINUSE: "another program does",
        errno.EACCES: "ports below 1024 need privileges",
        errno.EADDRNOTAVAIL: "this machine has no such address",
    }
    return reasons.get(exc.errno or 0) or (os.strerror(exc.errno) if exc.errno else str(exc))
