"""The node's listening socket and the HTTP connections on it.

uvicorn's protocol class without uvicorn's Server: a node lives inside another program's loop, so it
takes no signals, needs no task of its own, and stops without waiting for anybody's tick.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from typing import Any, Final, cast

import anyio
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from disco.http import application
from disco.hub import Hub
from disco.socket import AgentSocket

BACKLOG: Final = 1024
GRACE_S: Final = 0.25
"""How long clients may take to part when the node stops; then they are cut."""

# Bad requests are the client's news, not ours; a failure of ours still reaches the log.
_LOGGER = logging.getLogger("disco.http")
_LOGGER.setLevel(logging.ERROR)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, made fit for hostile clients."""

    def __init__(self, config: Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {})
        self.logger = _LOGGER

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to an `AgentSocket`, unless an answer is still being written to it.

        uvicorn would let both write, and would never tell the first that its client has gone.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()
            return
        super().handle_websocket_upgrade()


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


class Listener:
    """An open port that serves the agents and the HTTP clients of one hub."""

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        """Take over `sock`, which is bound."""
        self._hub = hub
        self._sock = sock
        self._state = ServerState()
        self._state.connections = self._connections = Connections()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to accept connections."""
        config = Config(
            application(self._hub),
            http="httptools",
            # uvicorn calls it with keywords, as it would the class.
            ws=cast(type[asyncio.Protocol], functools.partial(AgentSocket, self._hub)),
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        config.load()
        self._server = await asyncio.get_running_loop().create_server(
            lambda: HttpConnection(config, self._state), sock=self._sock, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """Close the port and every connection; returns when none is left, well within a second."""
        if self._server is not None:
            self._server.close()
        self._sock.close()
        for connection in list(self._connections):
            connection.shutdown()
        with anyio.move_on_after(GRACE_S):
            await self._drained()
        for connection in list(self._connections):
            connection.transport.abort()
        with anyio.move_on_after(GRACE_S):
            await self._drained()
        for task in list(self._state.tasks):
            task.cancel()
        await self._drained()

    async def _drained(self) -> None:
        await self._connections.wait_empty()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks)
