"""Attacks of clients on a real runner: its memory stays bounded, and other clients are served."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from disco import Node
from tests.chaos.load import http_load, report
from tests.cluster import Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
HANDLERS = """
def handle(body, memory):
    if body == "big":
        return "x" * 1_000_000, memory
    return {"type": "t", "properties": {"body": body}}, memory
"""
BIG = b'{"query":"big"}'
POST = b"POST /workers/%b/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%b"
ASK_BIG = POST % (b"big_server", len(BIG), BIG)


class Victim:
    """A runner under attack.

    Attributes:
        running: the cluster of the runner.
        port: the port of its HTTP interface.
        max_rss: the highest memory that was measured, in bytes.
    """

    def __init__(self, running: Cluster, clients: ExitStack) -> None:
        self.running = running
        self._clients = clients
        self._process = psutil.Process(running.process.pid)
        self.port = running.http.base_url.port or 0
        self.max_rss = 0

    @property
    def rss(self) -> int:
        """The memory of the runner now, in bytes."""
        rss = int(self._process.memory_info().rss)
        self.max_rss = max(self.max_rss, rss)
        return rss

    @property
    def connections(self) -> int:
        """How many connections the runner has now."""
        return sum(
            each.status == psutil.CONN_ESTABLISHED for each in self._process.net_connections("tcp")
        )

    def client(self) -> socket.socket:
        """Connect a client that stays connected until the end of the test."""
        client = self._clients.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        client.setblocking(False)
        return client

    async def watch(self, seconds: float) -> None:
        """Measure the memory for some time."""
        for _ in range(int(seconds / 0.02)):
            _ = self.rss
            await anyio.sleep(0.02)


def send(client: socket.socket, data: bytes) -> int:
    """Send as many bytes as the kernel accepts, and return their number."""
    try:
        return client.send(data)
    except (BlockingIOError, ConnectionError):
        return 0


async def slow_readers(victim: Victim) -> str:
    """Send queries with large responses and read nothing.

    There are pauses, so that the unread responses accumulate rather than the waiting queries.
    """
    for _ in range(30):
        for _ in range(10):
            send(victim.client(), ASK_BIG * 20)
        await victim.watch(0.04)
    return "300 clients request 20 MB each and read nothing"


async def send_slowly(victim: Victim, start: bytes) -> None:
    """Send incomplete requests from 400 clients."""
    clients = [victim.client() for _ in range(400)]
    for client in clients:
        send(client, start)
    for _ in range(30):
        for client in clients:
            send(client, b"x" * 2000)
        await victim.watch(0.02)


async def heads_that_never_end(victim: Victim) -> str:
    await send_slowly(victim, b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\na: ")
    return "400 clients send 60 KB of a header each"


async def bodies_that_never_end(victim: Victim) -> str:
    head = b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 65000\r\n\r\n"
    await send_slowly(victim, head)
    return "400 clients send 60 KB of a body each"


async def endless_bodies(victim: Victim) -> str:
    clients = [victim.client() for _ in range(50)]
    head = b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n"
    for client in clients:
        send(client, head)
    sent = 0
    for _ in range(60):
        for client in clients:
            sent += send(client, b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await victim.watch(0.02)
    return f"50 clients send bodies that never end, {sent // MIB} MB"


async def silent_clients(victim: Victim) -> str:
    """Send one query on each connection, and neither read nor close it."""
    for _ in range(60):
        for _ in range(10):
            send(victim.client(), ASK_BIG)
        await victim.watch(0.04)
    return "600 clients request 1 MB each, and neither read nor close"


async def clients_that_reset(victim: Victim) -> str:
    for _ in range(20):
        for _ in range(5):
            client = victim.client()
            send(client, ASK_BIG * 3)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        await victim.watch(0.04)
    return "100 clients request 3 MB and reset the connection"


async def pipelined_flood(victim: Victim) -> str:
    clients = [victim.client() for _ in range(40)]
    sent = 0
    for _ in range(50):
        for client in clients:
            sent += send(client, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 500)
        await victim.watch(0.02)
    return f"40 clients pipeline {sent // 43} requests and read no response"


async def idle(victim: Victim) -> str:
    clients = [victim.client() for _ in range(1500)]
    await until(lambda: victim.connections >= len(clients), "all clients are accepted")
    await victim.watch(0.2)
    return "1500 clients connect and send nothing"


Attack = Callable[[Victim], Awaitable[str]]
ATTACKS: dict[str, tuple[Attack, int]] = {
    "slow readers": (slow_readers, 400),
    "heads that never end": (heads_that_never_end, 80),
    "bodies that never end": (bodies_that_never_end, 80),
    "endless bodies": (endless_bodies, 40),
    "silent clients": (silent_clients, 200),
    "clients that reset": (clients_that_reset, 200),
    "a pipelined flood": (pipelined_flood, 60),
    "idle connections": (idle, 40),
}
"""The attacks, and by how many MB the runner may grow during each."""


@asynccontextmanager
async def victim(tmp_path: Path, node: Node) -> AsyncIterator[Victim]:
    agents = [agent(name, [node.url], capabilities=[name]) for name in ("small", "big")]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_ready()
        with ExitStack() as clients:
            yield Victim(running, clients)


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_leaves_memory_bounded_and_other_clients_served(
    name: str, tmp_path: Path, node: Node
) -> None:
    attack, max_growth_mib = ATTACKS[name]
    async with victim(tmp_path, node) as target:
        async with http_load(target.running, "/agents/small/query", clients=4) as others:
            await until(lambda: others.answered > 200, "200 queries are answered")
            await target.running.http.post("/agents/big/query", content=BIG)
            before, answered = target.rss, others.answered
            description = await attack(target)
            await until(
                lambda: others.answered - answered > 20,
                "other clients are answered during the attack",
            )
        report(
            name,
            description,
            f"{before / MIB:.0f} MB before, {target.max_rss / MIB:.0f} MB at most",
            others,
        )
        others.assert_nothing_lost()
        assert max(others.took_s) < 20, "no other client waits long"
        assert target.max_rss - before <= max_growth_mib * MIB
        assert target.running.process.poll() is None
        assert (await target.running.ask("x", agent="small")).status_code == 200
        assert "Traceback" not in target.running.log


async def test_disconnected_clients_no_longer_count_as_in_flight(
    tmp_path: Path, node: Node
) -> None:
    handlers = """
import pathlib, time
def handle(body, memory):
    while body == "wait" and not pathlib.Path("gate").exists():
        time.sleep(0.005)
    return {"type": "t", "properties": {"body": body}}, memory
"""
    ask = b'{"query":"wait"}'
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=handlers, runner="max_in_flight = 4"
    ) as running:
        await running.wait_ready()
        clients: list[asyncio.StreamWriter] = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", running.http.base_url.port)
            writer.write(POST % (b"a_server", len(ask), ask))
            clients.append(writer)

        await running.wait_in_flight(4)
        refused = await running.ask("x")
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        for writer in clients:
            writer.close()
        (tmp_path / "gate").touch()

        async def accepted() -> bool:
            return (await running.ask("x")).status_code == 200

        await until(accepted, "a query is accepted")
        assert (await running.results("y"))["properties"]["body"] == "y"
