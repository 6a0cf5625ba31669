"""Nodes on free ports, and agents that send frames by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from websockets.asyncio.client import ClientConnection, connect

from disco import Node, NodeSettings, serve
from shared.config.tokens import mint

SECRET = "a test secret that is long enough for HS256"
LIMIT_S = 60.0
"""The time limit of a test."""


class NullConnection:
    """A connection that discards all frames, for tests without sockets."""

    def send(self, frame: bytes) -> None: ...

    def drop(self, reason: str) -> None: ...


@asynccontextmanager
async def node_with(**settings: Any) -> AsyncIterator[Node]:
    """Serve a node for the time limit of a test, on a free port by default."""
    with anyio.fail_after(LIMIT_S):
        async with serve(
            NodeSettings(**{"port": 0, "query_timeout_ms": 30_000, **settings})
        ) as node:
            yield node


def token_for(name: str, *, ttl_s: float = 60) -> str:
    return mint(SECRET, name, ttl_s=ttl_s)


class FakeAgent:
    """A client that sends only the frames that a test asks for."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, frame: Any) -> None:
        await self.socket.send(msgspec.json.encode(frame).decode())

    async def receive(self) -> Any:
        return msgspec.json.decode(await self.socket.recv())

    async def request(self, frame: Any) -> Any:
        await self.send(frame)
        return await self.receive()

    async def register(self, name: str) -> Any:
        return await self.request({"action": "register", "name": name})

    async def hello(self, *capabilities: str) -> Any:
        return await self.request({"action": "agent_hello", "capabilities": list(capabilities)})

    async def answer(self, query: Any, data: Any) -> None:
        await self.send({"action": "result", "id": query["id"], "data": data})

    async def wait_closed(self) -> int | None:
        """Wait for the node's close, and return its code."""
        await self.socket.wait_closed()
        return self.socket.close_code


@asynccontextmanager
async def connected(node: Node, token: str | None = None) -> AsyncIterator[FakeAgent]:
    """Connect without a handshake and without pings."""
    url = f"{node.url}/ws" if token is None else f"{node.url}/ws?token={token}"
    async with connect(
        url, ping_interval=None, compression=None, proxy=None, close_timeout=1
    ) as socket:
        yield FakeAgent(socket)


@asynccontextmanager
async def agent(node: Node, name: str, *capabilities: str) -> AsyncIterator[FakeAgent]:
    """Connect and finish the handshake."""
    async with connected(node) as fake:
        await fake.register(name)
        assert (await fake.hello(*capabilities))["action"] == "agent_registered"
        yield fake


async def eventually(holds: Callable[[], bool]) -> None:
    """Poll a condition until it holds."""
    with anyio.fail_after(LIMIT_S):
        while not holds():  # noqa: ASYNC110
            await anyio.sleep(0.005)


UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def masked(opcode: int, payload: bytes) -> bytes:
    """A client's frame, with a mask of zeros."""
    assert len(payload) < 126
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


HANDSHAKE = masked(0x1, b'{"action":"register","name":"a"}') + masked(
    0x1, b'{"action":"agent_hello","capabilities":[]}'
)
"""Both handshake frames of an agent named `a`."""


@asynccontextmanager
async def raw_socket(
    node: Node,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect without a WebSocket library, and cut the connection at the end."""
    reader, writer = await asyncio.open_connection(node.host, node.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@asynccontextmanager
async def raw_agent(node: Node) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Upgrade by hand, for tests of what a WebSocket library would not do."""
    async with raw_socket(node) as (reader, writer):
        writer.write(UPGRADE)
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        yield reader, writer
