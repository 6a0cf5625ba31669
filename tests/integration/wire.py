"""A node that follows a script, for tests of what a correct node never does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

_SILENT = logging.Logger("tests.wire")
_SILENT.disabled = True

REGISTERED = {"status": "ok", "action": "registered"}
AGENT_REGISTERED = {"status": "ok", "action": "agent_registered", "capabilities": []}


class Wire:
    """One connection of a client to a scripted node."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.protocol = ServerProtocol(max_size=None, logger=_SILENT)
        self.request: Request | None = None
        self._events: list[Any] = []

    async def _event(self) -> Any:
        while not self._events:
            data = await self.reader.read(65536)
            if data:
                self.protocol.receive_data(data)
            else:
                self.protocol.receive_eof()
            self._events += self.protocol.events_received()
            await self.flush()
            if not data and not self._events:
                raise ConnectionResetError("the client is gone")
        return self._events.pop(0)

    async def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                self.writer.write(data)
        await self.writer.drain()

    async def upgrade(self) -> None:
        self.request = await self._event()
        self.protocol.send_response(self.protocol.accept(self.request))
        await self.flush()

    async def frame(self, *opcodes: Opcode) -> Frame:
        """Return the client's next frame of one of these kinds, or of any kind if none is given."""
        while True:
            event = await self._event()
            if not opcodes or event.opcode in opcodes:
                return event  # type: ignore[no-any-return]

    async def json(self) -> Any:
        """Return the client's next text frame, decoded."""
        return json.loads((await self.frame(Opcode.TEXT)).data)

    async def send(self, value: Any) -> None:
        await self.text(json.dumps(value).encode())

    async def text(self, data: bytes) -> None:
        self.protocol.send_text(data)
        await self.flush()

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def register(self) -> None:
        """Upgrade the connection and accept the registration, as a correct node does."""
        await self.upgrade()
        assert (await self.json())["action"] == "register"
        await self.send(REGISTERED)
        assert (await self.json())["action"] == "agent_hello"
        await self.send(AGENT_REGISTERED)

    async def until_gone(self) -> None:
        """Read, and answer pings, until the client disconnects."""
        with contextlib.suppress(ConnectionError):
            while True:
                await self._event()


Script = Callable[[Wire], Awaitable[None]]


async def polite(wire: Wire) -> None:
    """Register the agent and send nothing else, as a correct node without queries does."""
    await wire.register()
    await wire.until_gone()


class ScriptedNode:
    """Runs the script `first` for the first connection, and `polite` for the others."""

    def __init__(self, first: Script, then: Script = polite) -> None:
        self.first = first
        self.then = then
        self.connections = 0
        self.failures: list[BaseException] = []

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        script = self.first if self.connections == 1 else self.then
        try:
            await script(Wire(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError, InvalidState):
            pass  # the client has disconnected, or is closing the connection
        except AssertionError as exc:
            self.failures.append(exc)
        finally:
            writer.close()


@asynccontextmanager
async def scripted(first: Script, then: Script = polite) -> AsyncIterator[tuple[ScriptedNode, str]]:
    """Serve a scripted node; yields it and its address."""
    node = ScriptedNode(first, then)
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(node._play(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield node, f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not node.failures, node.failures
