"""A line between a worker and its node that breaks in every way a line can.

    async with proxied(node.port) as line:
        agent("echo", [line.url]) ...
        line.reset()

`mend` takes back whatever was done to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from tests.ports import HOST, held_port

READ_BYTES: Final = 65_536
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class Pipe:
    """One connection through the line: two sockets, pumped both ways."""

    def __init__(self, client: asyncio.StreamWriter, node: asyncio.StreamWriter) -> None:
        self.client = client
        self.node = node
        self.tells_nobody = False

    def cut(self) -> None:
        """Close both ends in order (FIN)."""
        self.client.close()
        self.node.close()

    def reset(self) -> None:
        """Tear both ends (RST)."""
        reset(self.client)
        reset(self.node)


class Line:
    """What a test does to the line, and what it saw on it."""

    def __init__(self, node_port: int, port: int) -> None:
        self.connections = 0
        self.to_node_bytes = 0
        self.to_client_bytes = 0
        self.port = port
        self._node_port = node_port
        self._server: asyncio.Server | None = None
        self._pipes: set[Pipe] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._swallows = False
        self._trickle: tuple[int, float] | None = None
        self._left: int | None = None
        self._breaker: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"ws://{HOST}:{self.port}"

    @property
    def pipes(self) -> int:
        """How many connections there are now."""
        return len(self._pipes)

    # --- what can be done to it ---

    def cut(self) -> None:
        """End every connection in order (FIN)."""
        for pipe in self._pipes:
            pipe.cut()

    def reset(self) -> None:
        """Tear every connection (RST)."""
        for pipe in self._pipes:
            pipe.reset()

    def abandon_client(self) -> None:
        """Tear the worker's ends only: the node goes on believing in connections that nobody has."""
        for pipe in self._pipes:
            pipe.tells_nobody = True
            reset(pipe.client)

    def swallow(self) -> None:
        """Go half-open: take everything, pass nothing on, and tell nobody."""
        self._swallows = True

    def stall(self, part: float, period_s: float) -> None:
        """Pass nothing for this part of each period; what waited follows in the rest of it."""

        async def stalling() -> None:
            while True:
                self._open.clear()
                await asyncio.sleep(period_s * part)
                self._open.set()
                await asyncio.sleep(period_s * (1 - part))

        self._break(stalling())

    def trickle(self, size: int, pause_s: float) -> None:
        """Pass a few bytes at a time."""
        self._trickle = size, pause_s

    def reset_after(self, to_client_bytes: int) -> None:
        """Tear each connection once so many more bytes have gone to the worker, in the middle of whatever that is."""
        self._left = to_client_bytes

    def flap(self, times_per_s: float) -> None:
        """Tear every connection so many times a second."""

        async def flapping() -> None:
            while True:
                self.reset()
                await asyncio.sleep(1 / times_per_s)

        self._break(flapping())

    async def refuse(self) -> None:
        """Tear everything, and let nobody listen."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    async def mend(self) -> None:
        """Be a good line again. Connections that lost something on it are torn, as their peers would tear them."""
        broken = self._swallows
        if self._breaker is not None:
            self._breaker.cancel()
            self._breaker = None
        self._swallows, self._trickle, self._left = False, None, None
        self._open.set()
        if broken:
            self.reset()
        await self.listen()

    # --- how it works ---

    async def listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accepted, HOST, self.port)

    async def close(self) -> None:
        if self._breaker is not None:
            self._breaker.cancel()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _break(self, breaking: object) -> None:
        self._breaker = asyncio.ensure_future(breaking)  # type: ignore[arg-type]

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            node_reader, node = await asyncio.open_connection(HOST, self._node_port)
        except OSError:
            client.close()
            return
        pipe = Pipe(client, node)
        self._pipes.add(pipe)
        try:
            await asyncio.gather(self._pump(client_reader, node, pipe), self._pump(node_reader, client, pipe))
        finally:
            self._pipes.discard(pipe)
            pipe.cut()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pipe: Pipe) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await self._open.wait()
                await self._pass(data, writer, pipe)
        # One end is gone; the other is told, unless the line is one that tells nobody.
        if not (self._swallows or pipe.tells_nobody):
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    async def _pass(self, data: bytes, writer: asyncio.StreamWriter, pipe: Pipe) -> None:
        if self._swallows:
            return
        to_client = writer is pipe.client
        if to_client and self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        while data:
            if writer.is_closing():  # a node that goes on talking to a client that has gone
                return
            size, pause_s = self._trickle or (len(data), 0.0)
            piece, data = data[:size], data[size:]
            writer.write(piece)
            await writer.drain()
            if to_client:
                self.to_client_bytes += len(piece)
            else:
                self.to_node_bytes += len(piece)
            if pause_s:
                await asyncio.sleep(pause_s)
        if to_client and self._left == 0:
            self._left = None
            pipe.reset()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a socket at once, so that its peer sees a reset."""
    if not writer.transport.is_closing():
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        writer.transport.abort()


@asynccontextmanager
async def proxied(node_port: int) -> AsyncIterator[Line]:
    """A line to the node on a port of this machine."""
    with held_port() as port:  # it is kept while nobody listens there
        line = Line(node_port, port)
        await line.listen()
        try:
            yield line
        finally:
            await line.close()
