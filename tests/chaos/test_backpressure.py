"""What hostile clients cost a real runner: its memory is measured under each, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
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
import pathlib
gate = pathlib.Path("gate")

def handle(body, memory):
    if body == "big":
        return "x" * 1_000_000, memory
    return {"type": "t", "properties": {"body": body}}, memory
"""
BIG = b'{"query":"big"}'
POST = b"POST /workers/%b/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%b"
ASK_BIG = POST % (b"big_server", len(BIG), BIG)


class Victim:
    """A runner's port, and what its process holds."""

    def __init__(self, running: Cluster, clients: ExitStack) -> None:
        self.running = running
        self._clients = clients
        self._process = psutil.Process(running.process.pid)
        self.port = running.http.base_url.port or 0
        self.most_rss = 0

    @property
    def rss(self) -> int:
        rss = int(self._process.memory_info().rss)
        self.most_rss = max(self.most_rss, rss)
        return rss

    @property
    def connections(self) -> int:
        return sum(each.status == psutil.CONN_ESTABLISHED for each in self._process.net_connections("tcp"))

    def client(self) -> socket.socket:
        client = self._clients.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        client.setblocking(False)
        return client

    async def watch(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.02)):
            _ = self.rss
            await anyio.sleep(0.02)


def send(client: socket.socket, data: bytes) -> int:
    """Send what the kernel takes; return how much that was."""
    try:
        return client.send(data)
    except (BlockingIOError, ConnectionError):
        return 0


async def slow_readers(victim: Victim) -> str:
    """Ask for far more than is read. A few at a time, so that it is the unread answers that add up."""
    for _ in range(30):
        for _ in range(10):
            send(victim.client(), ASK_BIG * 20)
        await victim.watch(0.04)
    return "300 clients ask for 20 MB each and read nothing"


async def heads_that_never_end(victim: Victim) -> str:
    clients = [victim.client() for _ in range(400)]
    for client in clients:
        send(client, b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\na: ")
    for _ in range(30):
        for client in clients:
            send(client, b"x" * 2000)
        await victim.watch(0.02)
    return "400 clients send 60 KB of a header each"


async def bodies_that_never_end(victim: Victim) -> str:
    clients = [victim.client() for _ in range(400)]
    for client in clients:
        send(client, b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 65000\r\n\r\n")
    for _ in range(30):
        for client in clients:
            send(client, b"x" * 2000)
        await victim.watch(0.02)
    return "400 clients send 60 KB of a body each"


async def endless_bodies(victim: Victim) -> str:
    clients = [victim.client() for _ in range(50)]
    for client in clients:
        send(client, b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n")
    sent = 0
    for _ in range(60):
        for client in clients:
            sent += send(client, b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await victim.watch(0.02)
    return f"50 clients send bodies without an end, {sent // MIB} MB"


async def half_open(victim: Victim) -> str:
    """Ask, then be heard of no more."""
    for _ in range(60):
        for _ in range(10):
            send(victim.client(), ASK_BIG)
        await victim.watch(0.04)
    return "600 clients ask for 1 MB each and are heard of no more"


async def clients_that_reset(victim: Victim) -> str:
    for _ in range(20):
        for _ in range(5):
            client = victim.client()
            send(client, ASK_BIG * 3)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        await victim.watch(0.04)
    return "100 clients ask for 3 MB and reset the connection"


async def pipelined_flood(victim: Victim) -> str:
    clients = [victim.client() for _ in range(40)]
    sent = 0
    for _ in range(50):
        for client in clients:
            sent += send(client, b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 500)
        await victim.watch(0.02)
    return f"40 clients pipeline {sent // 43} requests and read no answer"


async def idle(victim: Victim) -> str:
    clients = [victim.client() for _ in range(1500)]
    await until(lambda: victim.connections >= len(clients), "all are accepted")
    await victim.watch(0.2)
    return "1500 clients connect and say nothing"


Attack = Callable[[Victim], Awaitable[str]]
ATTACKS: dict[str, tuple[Attack, int]] = {
    "slow readers": (slow_readers, 400),
    "heads that never end": (heads_that_never_end, 80),
    "bodies that never end": (bodies_that_never_end, 80),
    "endless bodies": (endless_bodies, 40),
    "half-open clients": (half_open, 200),
    "clients that reset": (clients_that_reset, 200),
    "a pipelined flood": (pipelined_flood, 60),
    "idle connections": (idle, 40),
}
"""Each with the MB by which it may have the runner grow."""


@asynccontextmanager
async def victim(tmp_path: Path, node: Node) -> AsyncIterator[Victim]:
    agents = [agent(name, [node.url], capabilities=[name]) for name in ("small", "big")]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_ready()
        with ExitStack() as clients:
            yield Victim(running, clients)


@pytest.mark.parametrize("name", ATTACKS)
async def test_memory_is_bounded_and_others_are_answered_under(name: str, tmp_path: Path, node: Node) -> None:
    attack, most_mib = ATTACKS[name]
    async with victim(tmp_path, node) as under:
        async with http_load(under.running, "/agents/small/query", clients=4) as others:
            await until(lambda: others.right > 200, "all is warm")
            await under.running.http.post("/agents/big/query", content=BIG)
            before, answered = under.rss, others.right
            what = await attack(under)
            answered = others.right - answered
        report(name, f"{what}: {before / MIB:.0f} MB before, {under.most_rss / MIB:.0f} MB at most", others)
        others.assert_nothing_lost()
        assert answered > 20, "others are answered meanwhile"
        assert max(others.took_s) < 5, "and none of them waits for long"
        assert under.most_rss - before <= most_mib * MIB
        assert under.running.process.poll() is None
        assert (await under.running.ask("x", agent="small")).status_code == 200
        assert "Traceback" not in under.running.log


async def test_places_of_clients_that_are_gone_are_free_again(tmp_path: Path, node: Node) -> None:
    handlers = """
import pathlib, time
def handle(body, memory):
    while body == "wait" and not pathlib.Path("gate").exists():
        time.sleep(0.005)
    return {"type": "t", "properties": {"body": body}}, memory
"""
    ask = b'{"query":"wait"}'
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handlers, runner="max_in_flight = 4") as running:
        await running.wait_ready()
        clients: list[asyncio.StreamWriter] = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", running.http.base_url.port)
            writer.write(POST % (b"a_server", len(ask), ask))
            clients.append(writer)

        async def full() -> bool:
            shown = (await running.http.get("/metrics")).text
            return re.search(r'queries_in_flight\{.*transport="http".*\} 4\.0', shown) is not None

        await until(full, "all places are taken")
        refused = await running.ask("x")
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        for writer in clients:
            writer.close()
        (tmp_path / "gate").touch()

        async def served() -> bool:
            return (await running.ask("x")).status_code == 200

        await until(served, "there is a place")
        assert json.loads((await running.ask("y")).content)["results"]["properties"]["body"] == "y"
