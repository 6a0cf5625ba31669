"""The HTTP server against clients that send too slowly, too much, or do not read: with small limits.

Each test runs twice: what answers is an ASGI application, then a direct exchange, as direct queries are.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from shared.http_connection import PIECE_BYTES, HttpConnection
from shared.http_direct import DirectExchange
from shared.http_server import HttpLimits, HttpServer, listen, resolve
from tests.cluster import until

pytestmark = pytest.mark.anyio

GET = b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
KINDS = ("ASGI", "direct")
_kind = KINDS[0]


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `served` answer in this way."""
    monkeypatch.setattr(f"{__name__}._kind", request.param)


class Served:
    """A server, and what its application saw."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.left_early = 0
        self.gate = asyncio.Event()
        self.port = 0
        self.server: HttpServer
        self.streams: list[Stream] = []
        self.deaf_ones: list[socket.socket] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer `/SIZE` with so many bytes, `/wait` once the gate is open, `/gone` never, a POST with its body."""
        request = Request(scope, receive)
        self.asked.append(scope["path"])
        try:
            body = await request.body()
        except ClientDisconnect:
            self.left_early += 1
            return
        if scope["path"] == "/gone":
            assert (await receive())["type"] == "http.disconnect"
            self.left_early += 1
            return
        if scope["path"] == "/wait":
            await self.gate.wait()
        if scope["path"][1:].isdigit():
            body = b"x" * int(scope["path"][1:])
        await Response(body or b"ok")(scope, receive, send)

    def take(self, connection: HttpConnection) -> DirectExchange:
        """Do what `app` does, without ASGI."""
        return Answering(self, connection)

    @property
    def connections(self) -> list[HttpConnection]:
        return self.server._http_connections()

    async def connect(self) -> Stream:
        stream = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)
        self.streams.append(stream)
        return stream

    def deaf(self) -> socket.socket:
        """Connect a client that reads nothing."""
        client = socket.create_connection(("127.0.0.1", self.port))
        self.deaf_ones.append(client)
        return client

    async def idle(self) -> bool:
        return not self.connections and not self.server._state.tasks


class Answering(DirectExchange):
    """One request that is answered as `Served.app` answers it."""

    def __init__(self, known: Served, connection: HttpConnection) -> None:
        parser = connection.parser
        keep_alive = parser.get_http_version() != "1.0" and parser.should_keep_alive()
        super().__init__(connection, keep_alive=keep_alive, expects_continue=connection.expect_100_continue)
        self.known = known
        self.path = connection.url.decode()
        self.left = False
        self.waiting: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.known.asked.append(self.path)
        super().start()

    def proceed(self) -> None:
        if self.disconnected:
            self.known.left_early += not self.left and (self.more_body or self.path == "/gone")
            self.left = True
        elif self.more_body:
            self.ask_for_body()
        elif self.path == "/wait" and not self.known.gate.is_set():
            self.waiting = self.waiting or asyncio.ensure_future(self.wait())
        elif self.path != "/gone":
            body = b"x" * int(self.path[1:]) if self.path[1:].isdigit() else bytes(self.body)
            self.answer(200, b"", body or b"ok")

    async def wait(self) -> None:
        await self.known.gate.wait()
        self.set()


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[Served]:
    known = Served()
    listener = listen(resolve("127.0.0.1", 0, hint=""), hint="")
    known.port = listener.getsockname()[1]
    direct = known.take if _kind == "direct" else None
    known.server = HttpServer(known.app, listener, limits=HttpLimits(**limits), direct=direct)
    await known.server.start()
    try:
        yield known
    finally:
        for _, writer in known.streams:
            writer.transport.abort()
        for client in known.deaf_ones:
            client.close()
        await known.server.stop(0)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    return int(head.split()[1]), await asyncio.wait_for(reader.readexactly(length), 5)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the server ends the connection."""
    try:
        return await asyncio.wait_for(reader.read(-1), 5)
    except ConnectionResetError:
        return b""


async def test_connection_that_asks_nothing_is_closed_without_a_word() -> None:
    async with served(header_timeout_s=0.1) as known:
        reader, _ = await known.connect()
        assert await ended(reader) == b""
        assert await known.idle()


async def drip(stream: Stream, data: bytes) -> bytes:
    """Send one byte at a time for as long as the server takes them; return what it says."""
    reader, writer = stream
    said = asyncio.ensure_future(ended(reader))
    for byte in data:
        if said.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.005)
    return await said


async def test_heads_that_come_a_byte_at_a_time_are_ended_with_408_while_others_are_answered() -> None:
    async with served(header_timeout_s=0.4) as known:
        streams = [await known.connect() for _ in range(100)]
        head = b"GET /x HTTP/1.1\r\na: " + b"x" * 500
        slow = [asyncio.ensure_future(drip(stream, head)) for stream in streams]
        reader, writer = await known.connect()
        while not all(task.done() for task in slow):
            writer.write(GET % b"3")
            assert await answer(reader) == (200, b"xxx")
            await asyncio.sleep(0)
        for task in slow:
            assert task.result().startswith(b"HTTP/1.1 408 ")
            assert b"within 0.4 s" in task.result()
        for _, writer in known.streams:
            writer.close()
        await until(known.idle, "nothing is left")


async def test_body_that_comes_a_byte_at_a_time_is_ended_with_408_and_so_is_its_request() -> None:
    async with served(body_timeout_s=0.3) as known:
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n"
        streams = [await known.connect() for _ in range(20)]
        for said in await asyncio.gather(*[drip(stream, head + b"x" * 500) for stream in streams]):
            assert said.startswith(b"HTTP/1.1 408 ")
            assert json.loads(said.partition(b"\r\n\r\n")[2]) == {"error": "the body was not sent within 0.3 s"}
        for _, writer in streams:
            writer.close()
        await until(known.idle, "nothing is left")
        assert known.left_early == 20


async def test_time_that_an_earlier_answer_takes_is_not_counted_against_the_next_request() -> None:
    async with served(header_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2) as known:
        reader, writer = await known.connect()
        writer.write(GET % b"wait" + b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"y" * 5000)
        await until(lambda: known.asked, "the first is being answered")
        await asyncio.sleep(0.6)  # the absence of a time-out can only be waited for
        known.gate.set()
        assert await answer(reader) == (200, b"ok")
        assert await answer(reader) == (200, b"y" * 5000)


async def test_connection_that_is_kept_idle_is_closed_and_one_in_use_is_not() -> None:
    async with served(idle_timeout_s=0.3) as known:
        idle, writer = await known.connect()
        writer.write(GET % b"1")
        assert await answer(idle) == (200, b"x")
        busy, writer = await known.connect()
        over = asyncio.ensure_future(ended(idle))
        while not over.done():
            writer.write(GET % b"2")
            assert await answer(busy) == (200, b"xx")
            await asyncio.sleep(0.02)
        assert over.result() == b""


CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HEADS: dict[str, bytes] = {
    "one long header": b"GET / HTTP/1.1\r\na: " + b"x" * 10_000 + b"\r\n\r\n",
    "a header without an end": b"GET / HTTP/1.1\r\na: " + b"x" * 10_000,
    "a name without an end": b"GET / HTTP/1.1\r\n" + b"x" * 10_000,
    "a long target": b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
    "a method without an end": b"\r\n" * 5000,
    "many small headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 33 + b"\r\n",
    "many headers that are large together": b"GET / HTTP/1.1\r\n" + (b"a: " + b"b" * 200 + b"\r\n") * 30 + b"\r\n",
    "a chunk's extension without an end": CHUNKED + b"1;" + b"x" * 10_000,
    "a long trailer": CHUNKED + b"0\r\na: " + b"x" * 10_000,
    "many trailers": CHUNKED + b"0\r\n" + b"a: b\r\n" * 40,
}


@pytest.mark.parametrize("name", HEADS)
async def test_head_past_its_bounds_is_refused(name: str) -> None:
    async with served(max_header_bytes=4096, max_headers=32) as known:
        reader, writer = await known.connect()
        writer.write(HEADS[name])
        said = await ended(reader)
        assert said.startswith(b"HTTP/1.1 431 ")
        assert said.count(b"HTTP/1.1") == 1
        writer.close()
        await until(known.idle, "nothing is left")


async def test_head_within_its_bounds_is_served() -> None:
    async with served(max_header_bytes=4096, max_headers=32) as known:
        reader, writer = await known.connect()
        for _ in range(3):  # what an earlier request took is not counted again
            writer.write(b"GET /7 HTTP/1.1\r\nhost: x\r\n" + (b"a: " + b"b" * 100 + b"\r\n") * 30 + b"\r\n")
            assert await answer(reader) == (200, b"x" * 7)


async def test_connections_past_the_limit_take_the_place_of_those_that_wait_longest() -> None:
    async with served(max_connections=4) as known:
        first, writer = await known.connect()
        writer.write(GET % b"1")
        assert await answer(first) == (200, b"x")
        kept = [await known.connect() for _ in range(3)]
        for _, writer in kept:
            writer.write(GET % b"wait")
        await until(lambda: len(known.asked) == 4, "three are being answered")
        newcomer, writer = await known.connect()
        writer.write(GET % b"2")
        assert await answer(newcomer) == (200, b"xx")
        assert await ended(first) == b"", "the idle one had to go"
        writer.write(GET % b"wait")
        await until(lambda: len(known.asked) == 6, "all places are taken")
        said = await ended((await known.connect())[0])
        assert said.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in said
        known.gate.set()
        for reader, _ in [*kept, (newcomer, writer)]:
            assert await answer(reader) == (200, b"ok")


async def test_client_that_does_not_read_its_answer_is_cut_and_one_that_reads_slowly_is_not() -> None:
    async with served(write_timeout_s=0.4) as known:
        known.deaf().send(GET % b"20000000")
        await until(lambda: known.connections, "it is connected")
        deaf = known.connections[0]
        slow, slow_writer = await known.connect()
        slow_writer.write(b"GET /20000000 HTTP/1.0\r\n\r\n")
        read = 0
        while data := await asyncio.wait_for(slow.read(1 << 18), 5):
            read += len(data)
            await asyncio.sleep(0.01)
        assert read > 20_000_000
        assert deaf.cut_off
        await until(known.idle, "nothing is left")


async def test_answers_left_unread_are_bounded_in_all_and_a_reader_gets_its_own() -> None:
    size = 8_000_000
    async with served(max_unsent_bytes=3 * size) as known:
        for _ in range(12):
            known.deaf().send(GET % b"%d" % size * 5)
            reader, reader_writer = await known.connect()
            reader_writer.write(GET % b"%d" % size)
            status, body = await answer(reader)
            assert (status, len(body)) == (200, size)
            reader_writer.close()
            assert sum(connection.unsent_bytes for connection in known.connections) <= 4 * size
        assert 1 <= len(known.connections) <= 6, "most of the twelve were cut"


async def test_client_that_reads_no_answer_has_its_next_request_wait_until_it_does() -> None:
    size = 8_000_000
    async with served() as known:
        reader, writer = await asyncio.open_connection("127.0.0.1", known.port)  # it buffers little
        known.streams.append((reader, writer))
        writer.write(GET % b"%d" % size * 3)
        await until(lambda: known.connections and known.connections[0].flow.write_paused, "it reads nothing")
        writer.write(GET % b"%d" % size)
        await asyncio.sleep(0.1)  # that nothing happens can only be waited for
        assert len(known.asked) == 1
        for _ in range(4):
            status, body = await answer(reader)
            assert (status, len(body)) == (200, size)
        assert len(known.asked) == 4


async def test_pipelined_flood_waits_as_bytes_and_is_answered_in_order() -> None:
    async with served() as known:
        reader, writer = await known.connect()
        count = 5000
        writer.write(b"".join(GET % b"%d" % (1 + number % 7) for number in range(count)))
        most = 0
        for number in range(count):
            most = max(most, *(len(each.pipeline) for each in known.connections))
            assert await answer(reader) == (200, b"x" * (1 + number % 7))
        assert most <= PIECE_BYTES // len(GET % b"1") + 1
        assert most > 1 or _kind == "direct", "what is answered at once waits for nothing"


async def test_what_follows_a_whole_request_does_not_take_its_answer_away() -> None:
    async with served() as known:
        reader, writer = await known.connect()
        writer.write(GET % b"3" + GET % b"4" + b"\x00 nonsense\r\n\r\n")
        assert await answer(reader) == (200, b"xxx")
        assert await answer(reader) == (200, b"xxxx")
        rest = await ended(reader)
        assert rest == b"" if _kind == "ASGI" else rest.startswith(b"HTTP/1.1 400 ")


async def test_upgrade_that_is_not_taken_neither_drops_nor_makes_up_a_request() -> None:
    upgrade = b"host: x\r\nupgrade: h2c\r\nconnection: upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABk\r\n"
    async with served() as known:
        reader, writer = await known.connect()
        writer.write(b"GET /1 HTTP/1.1\r\n%b\r\n" % upgrade + GET % b"2")
        assert await answer(reader) == (200, b"x")
        assert await answer(reader) == (200, b"xx")
        inner = GET % b"smuggled"
        writer.write(
            b"POST /echo HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (upgrade, len(inner), inner) + GET % b"3"
        )
        assert await answer(reader) == (200, inner), "a body is a body"
        assert await answer(reader) == (200, b"xxx")
        assert known.asked == ["/1", "/2", "/echo", "/3"]


async def test_clients_are_not_held_to_account_for_a_stall_of_the_server() -> None:
    async with served(header_timeout_s=0.6, body_timeout_s=0.6) as known:
        streams = [await known.connect() for _ in range(10)]
        for _, writer in streams[:5]:
            writer.write((GET % b"2")[:-2])
        for _, writer in streams[5:]:
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n")
        await until(lambda: len(known.asked) == 5, "the bodies are waited for")
        time.sleep(2.0)  # noqa: ASYNC251 - the stall
        await asyncio.sleep(0.1)
        for _, writer in streams[:5]:
            writer.write(b"\r\n")
        for _, writer in streams[5:]:
            writer.write(b"xx")
        for reader, _ in streams:
            assert await answer(reader) == (200, b"xx")


async def test_request_that_is_being_answered_is_told_when_its_client_is_cut_off() -> None:
    async with served() as known:
        known.deaf().send(GET % b"gone" + GET % b"1")
        await until(lambda: known.connections and known.connections[0].pipeline, "the other waits for its turn")
        known.connections[0].cut()
        await until(lambda: known.left_early == 1, "it is told")
        await until(known.idle, "nothing is left")
        assert known.asked == ["/gone"]


async def test_bounds_leave_file_descriptors_for_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def limits(soft: int) -> Callable[[int], tuple[int, int]]:
        return lambda _: (soft, soft)

    for soft, most in ((1024, 768), (100, 50), (1 << 20, 4096)):
        monkeypatch.setattr(resource, "getrlimit", limits(soft))
        async with served() as known:
            assert known.server.max_connections == most
