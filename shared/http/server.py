"""An HTTP server inside another program.

The runner and the embedded node run their own event loops. So this server handles no signals, and
`stop` returns as soon as the connections have ended. Its callers decide what it serves.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import resource
import socket
from collections.abc import Callable
from email.utils import formatdate
from typing import (
    Any,
    Final,
    NamedTuple,
)

import anyio
from starlette.types import ASGIApp

from shared.errors import StartError
from shared.http._asgi import AsgiResponder
from shared.http._connection import HttpConnection
from shared.http.exchange import Channel, Responder
from shared.http.head import RequestHead
from shared.http.limits import HttpLimits

_BACKLOG: Final = 2048

_CUT_S: Final = 0.25
"""After it has cut connections, how long the server waits until their requests end."""

_MAX_SWEEP_S: Final = 1.0
"""The longest interval between two checks of the timeouts and updates of the `date` header."""

_RESERVED_FILES: Final = 256
"""How many file descriptors connections leave free, until `reserve` sets another number."""

_LEAST_CONNECTIONS: Final = 8

_REASONS: Final = {
    errno.EADDRINUSE: "address already in use",
    errno.EACCES: "ports below 1024 need privileges",
    errno.EADDRNOTAVAIL: "this machine has no such address",
}

_RespondFirst = Callable[[RequestHead, Channel], Responder | None]
_Upgrade = Callable[[set[Any]], asyncio.Protocol]


class HttpServer:
    """A listening socket that serves one ASGI application.

    Args:
        app: answers requests.
        listener: a listening socket, see `Address.listen`. The server closes it.
        upgrade: called for each WebSocket with the server's set of open connections. It returns a
            protocol that adds itself to the set, and removes itself at its end. Without `upgrade`,
            the server ignores offers of a WebSocket.
        limits: what clients may take.
        respond_first: called first for each request. If it returns a responder, that one answers
            the request instead of the application.

    Attributes:
        limits, upgrade: see the arguments.
        admitted_connections: how many connections may be open: `limits.max_connections`, or fewer
            if the process may not open as many files (RLIMIT_NOFILE).
        connections: the open connections, including upgraded ones.
        date: the `date` header of this second, as a line.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        upgrade: _Upgrade | None = None,
        limits: HttpLimits | None = None,
        respond_first: _RespondFirst | None = None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.upgrade = upgrade
        self.connections = _Connections()
        self.date = b""
        self._app = app
        self._listener = listener
        self._respond_first = respond_first
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.reserve(min(_RESERVED_FILES, _max_open_files() // 2))

    def reserve(self, files: int) -> None:
        """Leave `files` of the process's file descriptors for other parts of the program.

        Connections that wait for a request are cut at once, if there are now too many.
        """
        # Without this, clients could take all descriptors, and no worker could start.
        spare = max(_max_open_files() - files, _LEAST_CONNECTIONS)
        self.admitted_connections = min(self.limits.max_connections, spare)
        excess = max(len(self.connections) - self.admitted_connections, 0)
        waiting = sorted(self._waiting(), key=lambda connection: connection.waits_since_s)
        for connection in waiting[:excess]:
            connection.cut()

    async def start(self) -> None:
        """Start to accept connections."""
        self._loop = asyncio.get_running_loop()
        self._sweep(self._loop.time())
        self._server = await self._loop.create_server(
            lambda: HttpConnection(self),
            sock=self._listener,
            backlog=_BACKLOG,
        )

    def close(self) -> None:
        """Accept no more connections, and close the others.

        Connections that wait for a request are closed now, those with requests after the responses.
        """
        if self._server is not None:
            self._server.close()
        self._listener.close()
        for connection in list(self.connections):
            connection.shutdown()

    async def stop(self, grace_s: float) -> None:
        """Close, wait up to `grace_s` seconds for unfinished responses, then cut the others."""
        self.close()
        with anyio.move_on_after(grace_s):
            await self._wait_drained()
        # A cut connection notifies its request. Most applications then end by themselves, and
        # release what they hold. Only the tasks of the others are cancelled.
        for connection in list(self.connections):
            connection.transport.abort()
        with anyio.move_on_after(_CUT_S):
            await self._wait_drained()
        for task in list(self._tasks):
            task.cancel()
        await self._wait_drained()
        if self._timer is not None:
            self._timer.cancel()

    async def _wait_drained(self) -> None:
        await self.connections.wait_empty()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Called by connections.

    def respond(self, head: RequestHead, channel: Channel) -> Responder:
        """Return the responder for a request."""
        responder = None if self._respond_first is None else self._respond_first(head, channel)
        return responder or AsgiResponder(
            head,
            channel,
            self._app,
            self._tasks,
        )

    def admit(self, newcomer: HttpConnection) -> bool:
        """Return whether a new connection may stay. A waiting connection may be cut for it."""
        if len(self.connections) <= self.admitted_connections:
            return True
        waiting = [connection for connection in self._waiting() if connection is not newcomer]
        if not waiting:
            return False
        # The longest wait first. A client that opens connections and sends nothing thus loses its
        # own, and cannot keep others out.
        min(waiting, key=lambda connection: connection.waits_since_s).cut()
        return True

    def limit_unsent_bytes(self) -> None:
        """Cut clients that do not read, until all unsent bytes are within the limit."""
        # The client that has read nothing for longest is cut first.
        stuck = [connection for connection in self._http_connections() if connection.write_paused]
        stuck.sort(key=lambda connection: connection.stuck_since_s)
        unsent_bytes = sum(connection.unsent_bytes for connection in stuck)
        # The last one has just got its response: it had no chance to read. If it were cut too, a
        # response larger than the limit could never be sent.
        for connection in stuck[:-1]:
            if unsent_bytes <= self.limits.max_unsent_bytes:
                return
            unsent_bytes -= connection.unsent_bytes
            connection.cut()

    def _http_connections(self) -> list[HttpConnection]:
        return [
            connection for connection in self.connections if isinstance(connection, HttpConnection)
        ]

    def _waiting(self) -> list[HttpConnection]:
        return [
            connection for connection in self._http_connections() if not connection.owes_response
        ]

    def _sweep(self, due_s: float) -> None:
        """Check the timeouts of all clients, and renew the date."""
        now_s = self._loop.time()
        # A late timer means that this process was suspended or busy. What clients have sent since
        # may lie unread in their sockets, so their time starts again.
        stalled = now_s - due_s > _MAX_SWEEP_S
        for connection in self._http_connections():
            if stalled:
                connection.reset_timers(now_s)
            else:
                connection.check_timeouts(now_s)
        # RFC 9110, 6.6.1: a server with a clock sends Date. Formatting it once a second, and not
        # for each response, is exact enough: its unit is a second.
        self.date = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        # A quarter of the shortest timeout, so that a client gets at most a quarter more time.
        due_s = now_s + min(_MAX_SWEEP_S, self.limits.shortest_timeout_s / 4)
        self._timer = self._loop.call_at(due_s, self._sweep, due_s)


class _Connections(set[Any]):
    """The open connections of a server."""

    def __init__(self) -> None:
        super().__init__()
        self._emptied = anyio.Event()

    def discard(self, connection: object) -> None:
        """Remove a connection that has ended, or that another protocol takes over."""
        super().discard(connection)
        if not self:
            self._emptied.set()

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self:
            self._emptied = anyio.Event()
            await self._emptied.wait()


class Address(NamedTuple):
    """A resolved address to listen on. `resolve` makes it.

    Attributes:
        family: the address family.
        socket_address: the address in the form that `socket` takes.
        text: the address as the user wrote it.
        hint: how to choose another address. It is the last part of error messages.
    """

    family: int
    socket_address: tuple[Any, ...]
    text: str
    hint: str

    @classmethod
    def resolve(
        cls,
        host: str,
        port: int,
        *,
        hint: str,
    ) -> Address:
        """Resolve a host name or address.

        Raises:
            StartError: if the host has no address.
        """
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:  # UnicodeError: a label of the name is too long
            reason = getattr(exc, "strerror", None) or exc
            raise StartError(f"no address for host {host!r} ({reason}); {hint}") from None
        family, _, _, _, address = found[0]
        return cls(
            family,
            address,
            f"{host}:{port}",
            hint,
        )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.socket_address[0]).is_loopback

    def listen(self) -> socket.socket:
        """Return a listening socket.

        Raises:
            StartError: if the address is unavailable.
        """
        listener = socket.socket(self.family, socket.SOCK_STREAM)
        try:
            # Else a restart fails while old connections are in TIME-WAIT (RFC 9293, 3.3.2).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self.socket_address)
            # Now, and not when the server starts: two sockets with SO_REUSEADDR can be bound to one
            # port until one of them listens.
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError as exc:
            listener.close()
            reason = _REASONS.get(exc.errno or 0, exc.strerror)
            raise StartError(f"cannot listen on {self.text}: {reason}; {self.hint}") from None
        return listener


def _max_open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
