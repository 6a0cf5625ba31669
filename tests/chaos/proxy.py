"""A TCP proxy between a worker and its node that fails in the ways a network fails.

    async with proxied(node.port) as proxy:
        agent("echo", [proxy.url]) ...
        proxy.reset_connections()

`restore` ends every failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Final

from tests.ports import HOST, reserved_port

READ_BYTES: Final = 65_536
_LINGER_0_S: Final = struct.pack("ii", 1, 0)
"""The value of SO_LINGER with which the kernel sends RST when the socket is closed."""


class ProxiedConnection:
    """A connection through the proxy: a socket to the worker, and one to the node.

    Attributes:
        propagates_close: whether one side is closed when the other side ends.
    """

    def __init__(self, client: asyncio.StreamWriter, node: asyncio.StreamWriter) -> None:
        self.client = client
        self.node = node
        self.propagates_close = True

    def close(self) -> None:
        """Close both sides (FIN)."""
        self.client.close()
        self.node.close()

    def reset(self) -> None:
        """Reset both sides (RST)."""
        reset(self.client)
        reset(self.node)


class Proxy:
    """Forwards bytes both ways, until a test makes it fail.

    Attributes:
        port: the port that it listens on.
        accepted: how many connections it has accepted.
        to_node_bytes: how many bytes it has forwarded to the node.
    """

    def __init__(self, node_port: int, port: int) -> None:
        self.accepted = 0
        self.to_node_bytes = 0
        self.port = port
        self._node_port = node_port
        self._server: asyncio.Server | None = None
        self._connections: set[ProxiedConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._discards = False
        self._piece: tuple[int, float] | None = None
        self._bytes_until_reset: int | None = None
        self._failure: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._connections)

    # --- failures ---

    def close_connections(self) -> None:
        """Close every connection (FIN)."""
        for connection in self._connections:
            connection.close()

    def reset_connections(self) -> None:
        """Reset every connection (RST)."""
        for connection in self._connections:
            connection.reset()

    def reset_clients_only(self) -> None:
        """Reset the workers' sides, and keep the node's sides open."""
        for connection in self._connections:
            connection.propagates_close = False
            reset(connection.client)

    def discard(self) -> None:
        """Leave connections half-open: read everything, forward nothing, and close nothing."""
        self._discards = True

    def stall(self, part: float, period_s: float) -> None:
        """Forward nothing for this part of each period, and the delayed bytes after it."""

        async def stall() -> None:
            while True:
                self._flowing.clear()
                await asyncio.sleep(period_s * part)
                self._flowing.set()
                await asyncio.sleep(period_s * (1 - part))

        self._start_failure(stall())

    def trickle(self, size: int, pause_s: float) -> None:
        """Forward `size` bytes at a time, and pause after each piece."""
        self._piece = size, pause_s

    def reset_after(self, to_client_bytes: int) -> None:
        """Reset a connection after this many more bytes to the worker, even inside a frame."""
        self._bytes_until_reset = to_client_bytes

    def flap(self, times_per_s: float) -> None:
        """Reset every connection this many times a second."""

        async def flap() -> None:
            while True:
                self.reset_connections()
                await asyncio.sleep(1 / times_per_s)

        self._start_failure(flap())

    async def refuse(self) -> None:
        """Reset every connection, and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset_connections()

    async def restore(self) -> None:
        """Forward everything again, and reset the connections that have lost bytes."""
        lost_bytes = self._discards
        if self._failure is not None:
            self._failure.cancel()
            self._failure = None
        self._discards, self._piece, self._bytes_until_reset = False, None, None
        self._flowing.set()
        if lost_bytes:
            self.reset_connections()
        await self.listen()

    # --- forwarding ---

    async def listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._on_connection, HOST, self.port)

    async def stop(self) -> None:
        if self._failure is not None:
            self._failure.cancel()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start_failure(self, failure: Coroutine[None, None, None]) -> None:
        self._failure = asyncio.ensure_future(failure)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter
    ) -> None:
        try:
            node_reader, node = await asyncio.open_connection(HOST, self._node_port)
        except OSError:
            client.close()
            return
        connection = ProxiedConnection(client, node)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._copy(client_reader, node, connection),
                self._copy(node_reader, client, connection),
            )
        finally:
            self._connections.discard(connection)
            connection.close()

    async def _copy(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: ProxiedConnection,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self._flowing.wait()
                await self._forward(data, writer, connection)
        if connection.propagates_close and not self._discards:
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    async def _forward(
        self, data: bytes, writer: asyncio.StreamWriter, connection: ProxiedConnection
    ) -> None:
        if self._discards:
            return
        to_client = writer is connection.client
        if to_client and self._bytes_until_reset is not None:
            data = data[: self._bytes_until_reset]
            self._bytes_until_reset -= len(data)
        while data:
            if writer.is_closing():  # the node still sends to a worker that has disconnected
                return
            size, pause_s = self._piece or (len(data), 0.0)
            piece, data = data[:size], data[size:]
            writer.write(piece)
            await writer.drain()
            if not to_client:
                self.to_node_bytes += len(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        if to_client and self._bytes_until_reset == 0:
            self._bytes_until_reset = None
            connection.reset()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a socket such that its peer sees a reset."""
    if not writer.transport.is_closing():
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0_S)
        writer.transport.abort()


@asynccontextmanager
async def proxied(node_port: int) -> AsyncIterator[Proxy]:
    """Run a proxy to a node on this machine."""
    with reserved_port() as port:  # no other process gets the port while the proxy refuses
        proxy = Proxy(node_port, port)
        await proxy.listen()
        try:
            yield proxy
        finally:
            await proxy.stop()
