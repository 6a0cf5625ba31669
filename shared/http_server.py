"""An HTTP server inside another program: uvicorn's protocol, without uvicorn's Server.

Runner and embedded node live in a loop that they own, so this takes no signals, needs no task of
its own, and stops without waiting for anybody's tick. What is served is the caller's.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import resource
import socket
from typing import Any, Final, NamedTuple

import anyio
from starlette.types import ASGIApp
from uvicorn.config import Config

from shared.errors import StartError
from shared.http_connection import Direct, HttpConnection, HttpLimits, HttpState

BACKLOG: Final = 2048
CUT_S: Final = 0.25
"""How long connections that were cut may take to be gone."""

SWEEP_S: Final = 1.0
"""How often the clients are held to their time-outs."""

RESERVED_FILES: Final = 256
LEAST_CONNECTIONS: Final = 8
"""How many file descriptors are left to everything else when connections take all they may."""


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
        limits: what clients may take.
        direct: is offered every request first, and may answer it without ASGI.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        ws: Any = "none",
        limits: HttpLimits | None = None,
        direct: Direct | None = None,
    ) -> None:
        self._direct = direct
        self._listener = listener
        self._limits = limits or HttpLimits()
        self._state = HttpState()
        self._state.connections = self._connections = Connections()
        self.reserve(None)
        self._server: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._sweeper: asyncio.TimerHandle | None = None
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

    def reserve(self, files: int | None) -> None:
        """Leave so many of the files that may be open to others; None: some, but never more than half.

        Connections that wait for a request make room at once.
        """
        self.max_connections = min(self._limits.max_connections, _spare_files(files))
        waiting = sorted(
            (each for each in self._http_connections() if not each.owes_an_answer), key=lambda each: each.waits_since_s
        )
        for connection in waiting[: max(len(self._connections) - self.max_connections, 0)]:
            connection.cut()

    async def start(self) -> None:
        """Begin to accept connections."""
        self._config.load()
        self._loop = asyncio.get_running_loop()
        self._set_date()
        self._sweep(self._loop.time())
        self._server = await self._loop.create_server(self._connect, sock=self._listener, backlog=BACKLOG)

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
        for timer in (self._clock, self._sweeper):
            if timer is not None:
                timer.cancel()

    async def _drained(self) -> None:
        await self._connections.wait_empty()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)

    def _connect(self) -> HttpConnection:
        return HttpConnection(self._config, self._state, self._limits, self._admit, self._relieve, self._direct)

    def _admit(self, newcomer: HttpConnection) -> bool:
        """Return whether there is a place for a connection; one that waits for a request may have to make it."""
        if len(self._connections) <= self.max_connections:
            return True
        waiting = [
            connection
            for connection in self._http_connections()
            if connection is not newcomer and not connection.owes_an_answer
        ]
        if not waiting:
            return False
        min(waiting, key=lambda connection: connection.waits_since_s).cut()
        return True

    def _relieve(self) -> None:
        """Cut clients that leave their answers unread, the longest stuck first, while those are too much in all."""
        stuck = [connection for connection in self._http_connections() if connection.flow.write_paused]
        stuck.sort(key=lambda connection: connection.stuck_since_s)
        unsent_bytes = sum(connection.unsent_bytes for connection in stuck)
        for connection in stuck[:-1]:  # the last one has only just been given its answer
            if unsent_bytes <= self._limits.max_unsent_bytes:
                return
            unsent_bytes -= connection.unsent_bytes
            connection.cut()

    def _http_connections(self) -> list[HttpConnection]:
        return [each for each in self._connections if isinstance(each, HttpConnection) and not each.cut_off]

    def _sweep(self, due_s: float) -> None:
        """Hold every client to its time-outs; after a stall of this process only begin to count again."""
        now_s = self._loop.time()
        stalled = now_s - due_s > SWEEP_S
        for connection in self._http_connections():
            if stalled:
                connection.pardon(now_s)
            else:
                connection.judge(now_s)
        due_s = now_s + min(SWEEP_S, self._limits.shortest_s / 4)
        self._sweeper = self._loop.call_at(due_s, self._sweep, due_s)

    def _set_date(self) -> None:
        self._state.set_date()
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


def _spare_files(reserved: int | None) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(soft - RESERVED_FILES, soft // 2) if reserved is None else max(soft - reserved, LEAST_CONNECTIONS)


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
