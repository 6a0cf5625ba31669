"""The HTTP server with small limits. Its clients send slowly, send too much or do not read.

Each test runs twice: once with an ASGI application, once with a responder, as for direct queries.
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

from shared.http._connection import PIECE_BYTES, HttpConnection
from shared.http.exchange import Channel, Responder
from shared.http.head import RequestHead
from shared.http.limits import HttpLimits
from shared.http.server import Address, HttpServer
from tests.cluster import TIMEOUT_S, until

pytestmark = pytest.mark.anyio

GET = b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
KINDS = ("ASGI", "direct")
_kind = KINDS[0]


@pytest.fixture(params=KINDS, autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `served` use an ASGI application or a responder."""
    monkeypatch.setattr(f"{__name__}._kind", request.param)


class Served:
    """A server, and what its application has seen.

    Attributes:
        requests: the paths of the requests that it has got.
        disconnects: how many requests were notified that their client had disconnected.
        gate: lets `/wait` respond.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.disconnects = 0
        self.gate = asyncio.Event()
        self.port = 0
        self.server: HttpServer
        self.streams: list[Stream] = []
        self.sockets: list[socket.socket] = []

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """Respond to a request.

        The response to `/SIZE` is SIZE bytes long, the response to a POST is its body. The response
        to `/wait` waits for the gate. There is none to `/never`.
        """
        request = Request(scope, receive)
        self.requests.append(scope["path"])
        try:
            body = await request.body()
        except ClientDisconnect:
            self.disconnects += 1
            return
        if scope["path"] == "/never":
            assert (await receive())["type"] == "http.disconnect"
            self.disconnects += 1
            return
        if scope["path"] == "/wait":
            await self.gate.wait()
        if scope["path"][1:].isdigit():
            body = b"x" * int(scope["path"][1:])
        await Response(body or b"ok")(scope, receive, send)

    def direct(self, head: RequestHead, channel: Channel) -> Responder:
        """Respond as `app` does, without ASGI."""
        return DirectResponder(self, head, channel)

    @property
    def connections(self) -> list[HttpConnection]:
        return self.server._http_connections()

    async def connect(self) -> Stream:
        stream = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 26)
        self.streams.append(stream)
        return stream

    def connect_without_reading(self) -> socket.socket:
        """Connect a client that reads nothing."""
        client = socket.create_connection(("127.0.0.1", self.port))
        self.sockets.append(client)
        return client

    async def is_idle(self) -> bool:
        return not self.connections and not self.server._tasks


class DirectResponder(Responder):
    """Responds to one request as `Served.app` does."""

    def __init__(self, target: Served, head: RequestHead, channel: Channel) -> None:
        super().__init__(head, channel)
        self.target = target
        self.path = head.url.decode()
        self.notified = False
        self.waiting: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.target.requests.append(self.path)
        super().start()

    def proceed(self) -> None:
        if self.disconnected:
            self.target.disconnects += not self.notified and (
                self.more_body or self.path == "/never"
            )
            self.notified = True
        elif self.more_body:
            self.ask_for_body()
        elif self.path == "/wait" and not self.target.gate.is_set():
            self.waiting = self.waiting or asyncio.ensure_future(self.wait())
        elif self.path != "/never":
            body = b"x" * int(self.path[1:]) if self.path[1:].isdigit() else bytes(self.body)
            self.answer(200, b"", body or b"ok")

    async def wait(self) -> None:
        await self.target.gate.wait()
        self.notify()


@asynccontextmanager
async def served(**limits: Any) -> AsyncIterator[Served]:
    target = Served()
    listener = Address.resolve("127.0.0.1", 0, hint="").listen()
    target.port = listener.getsockname()[1]
    direct = target.direct if _kind == "direct" else None
    target.server = HttpServer(
        target.app,
        listener,
        limits=HttpLimits(**limits),
        respond_first=direct,
    )
    await target.server.start()
    try:
        yield target
    finally:
        for _, writer in target.streams:
            writer.transport.abort()
        for client in target.sockets:
            client.close()
        await target.server.stop(0)


async def read_response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    return int(head.split()[1]), await asyncio.wait_for(reader.readexactly(length), TIMEOUT_S)


async def read_until_end(reader: asyncio.StreamReader) -> bytes:
    """Return all bytes that arrive until the server ends the connection."""
    try:
        return await asyncio.wait_for(reader.read(-1), TIMEOUT_S)
    except ConnectionResetError:
        return b""


def check_error(response: bytes, status: int, code: str) -> None:
    """Check that bytes are exactly one error response, with this status and code."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), response[:300]
    assert json.loads(body)["code"] == code


async def test_connection_without_a_request_is_closed_without_a_response() -> None:
    async with served(header_timeout_s=0.1) as target:
        reader, _ = await target.connect()
        assert await read_until_end(reader) == b""
        assert await target.is_idle()


async def drip(target: Served, data: bytes) -> bytes:
    """Send one byte at a time until the server ends the connection, and return its response."""
    reader, writer = await target.connect()
    response = asyncio.ensure_future(read_until_end(reader))
    for byte in data:
        if response.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.005)
    await response
    writer.close()
    return response.result()


async def drip_many(target: Served, count: int, data: bytes) -> list[bytes]:
    """Send the same bytes slowly on many connections, and return the responses."""
    return await asyncio.gather(*[drip(target, data) for _ in range(count)])


SLOW_HEAD = b"GET /x HTTP/1.1\r\na: " + b"x" * 500
SLOW_BODY = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n" + b"x" * 500


async def test_slow_head_gets_408_while_other_requests_are_answered() -> None:
    async with served(header_timeout_s=0.4) as target:
        slow = asyncio.ensure_future(drip_many(target, 100, SLOW_HEAD))
        reader, writer = await target.connect()
        while not slow.done():
            writer.write(GET % b"3")
            assert await read_response(reader) == (200, b"xxx")
            await asyncio.sleep(0)
        for response in await slow:
            check_error(response, 408, "request_timeout")
        writer.close()
        await until(target.is_idle, "no connection and no task is left")


async def test_slow_body_gets_408_and_its_request_is_notified() -> None:
    async with served(body_timeout_s=0.3) as target:
        for response in await drip_many(target, 20, SLOW_BODY):
            check_error(response, 408, "request_timeout")
        await until(target.is_idle, "no connection and no task is left")
        assert target.disconnects == 20


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("data", "limit", "text"),
    [
        (SLOW_HEAD, "header_timeout_s", b"the request was not sent within 0.1 s"),
        (SLOW_BODY, "body_timeout_s", b"the body was not sent within 0.1 s"),
    ],
    ids=["head", "body"],
)
async def test_408_names_the_part_that_is_missing_and_its_timeout(
    data: bytes, limit: str, text: bytes
) -> None:
    async with served(**{limit: 0.1}) as target:
        assert text in await drip(target, data)


async def test_time_of_a_response_does_not_count_for_the_next_request() -> None:
    async with served(header_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2) as target:
        reader, writer = await target.connect()
        head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\n\r\n"
        writer.write(GET % b"wait" + head + b"y" * 5000)
        await until(lambda: target.requests, "the first request is being answered")
        await asyncio.sleep(0.6)  # three timeouts, none of which may apply
        target.gate.set()
        assert await read_response(reader) == (200, b"ok")
        assert await read_response(reader) == (200, b"y" * 5000)


async def test_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    async with served(idle_timeout_s=0.3) as target:
        idle, writer = await target.connect()
        writer.write(GET % b"1")
        assert await read_response(idle) == (200, b"x")
        busy, writer = await target.connect()
        closed = asyncio.ensure_future(read_until_end(idle))
        while not closed.done():
            writer.write(GET % b"2")
            assert await read_response(busy) == (200, b"xx")
            await asyncio.sleep(0.02)
        assert closed.result() == b""


CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HEADS: dict[str, bytes] = {
    "one long header": b"GET / HTTP/1.1\r\na: " + b"x" * 10_000 + b"\r\n\r\n",
    "a header without an end": b"GET / HTTP/1.1\r\na: " + b"x" * 10_000,
    "a name without an end": b"GET / HTTP/1.1\r\n" + b"x" * 10_000,
    "a long target": b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
    "a method without an end": b"\r\n" * 5000,
    "many small headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 33 + b"\r\n",
    "many headers that are large together": b"GET / HTTP/1.1\r\n"
    + (b"a: " + b"b" * 200 + b"\r\n") * 30
    + b"\r\n",
    "a chunk's extension without an end": CHUNKED + b"1;" + b"x" * 10_000,
    "a long trailer": CHUNKED + b"0\r\na: " + b"x" * 10_000,
    "many trailers": CHUNKED + b"0\r\n" + b"a: b\r\n" * 40,
}


@pytest.mark.parametrize("name", HEADS)
async def test_head_over_its_limits_is_refused(name: str) -> None:
    async with served(max_header_bytes=4096, max_headers=32) as target:
        reader, writer = await target.connect()
        writer.write(HEADS[name])
        check_error(await read_until_end(reader), 431, "head_too_large")
        writer.close()
        await until(target.is_idle, "no connection and no task is left")


async def test_head_within_its_limits_is_served() -> None:
    async with served(max_header_bytes=4096, max_headers=32) as target:
        reader, writer = await target.connect()
        headers = (b"a: " + b"b" * 100 + b"\r\n") * 30
        for _ in range(3):  # each request is counted from zero
            writer.write(b"GET /7 HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
            assert await read_response(reader) == (200, b"x" * 7)


async def test_connection_over_the_limit_replaces_an_idle_one() -> None:
    async with served(max_connections=2) as target:
        idle, writer = await target.connect()
        writer.write(GET % b"1")
        assert await read_response(idle) == (200, b"x")
        busy, writer = await target.connect()
        writer.write(GET % b"wait")
        await until(lambda: len(target.requests) == 2, "a request is being answered")
        newcomer, writer = await target.connect()
        writer.write(GET % b"2")
        assert await read_response(newcomer) == (200, b"xx")
        assert await read_until_end(idle) == b"", "the idle connection is closed"
        target.gate.set()
        assert await read_response(busy) == (200, b"ok")


async def test_connection_over_the_limit_gets_503_if_no_other_is_idle() -> None:
    async with served(max_connections=4) as target:
        streams = [await target.connect() for _ in range(4)]
        for _, writer in streams:
            writer.write(GET % b"wait")
        await until(lambda: len(target.requests) == 4, "four requests are being answered")
        reader, _ = await target.connect()
        response = await read_until_end(reader)
        check_error(response, 503, "too_many_connections")
        assert b"retry-after: 1\r\n" in response
        target.gate.set()
        for reader, _ in streams:
            assert await read_response(reader) == (200, b"ok")


async def test_client_that_reads_nothing_is_disconnected_and_a_slow_one_is_not() -> None:
    async with served(write_timeout_s=0.4) as target:
        target.connect_without_reading().send(GET % b"20000000")
        await until(lambda: target.connections, "the client is connected")
        unread = target.connections[0]
        slow, slow_writer = await target.connect()
        slow_writer.write(b"GET /20000000 HTTP/1.0\r\n\r\n")
        read = 0
        while data := await asyncio.wait_for(slow.read(1 << 18), TIMEOUT_S):
            read += len(data)
            await asyncio.sleep(0.01)
        assert read > 20_000_000
        assert unread not in target.connections
        await until(target.is_idle, "no connection and no task is left")


async def test_unread_responses_have_a_common_limit_and_other_clients_get_theirs() -> None:
    size = 8_000_000
    async with served(max_unsent_bytes=3 * size) as target:
        for _ in range(12):
            target.connect_without_reading().send(GET % b"%d" % size * 5)
            reader, writer = await target.connect()
            writer.write(GET % b"%d" % size)
            status, body = await read_response(reader)
            assert (status, len(body)) == (200, size)
            writer.close()
            assert sum(connection.unsent_bytes for connection in target.connections) <= 4 * size
        assert 1 <= len(target.connections) <= 6, "most of the twelve were disconnected"


async def test_next_request_waits_until_its_client_reads_its_responses() -> None:
    size = 8_000_000
    async with served() as target:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)  # a small buffer
        target.streams.append((reader, writer))
        writer.write(GET % b"%d" % size * 3)
        await until(
            lambda: target.connections and target.connections[0].write_paused,
            "the first response is not read",
        )
        writer.write(GET % b"%d" % size)
        await asyncio.sleep(0.1)  # the other requests must not start in this time
        assert len(target.requests) == 1
        for _ in range(4):
            status, body = await read_response(reader)
            assert (status, len(body)) == (200, size)
        assert len(target.requests) == 4


async def test_many_pipelined_requests_wait_unparsed_and_are_answered_in_order() -> None:
    async with served() as target:
        reader, writer = await target.connect()
        count = 5000
        writer.write(b"".join(GET % b"%d" % (1 + number % 7) for number in range(count)))
        most = 0
        for number in range(count):
            most = max(most, *(len(each.pipeline) for each in target.connections))
            assert await read_response(reader) == (200, b"x" * (1 + number % 7))
        assert most <= PIECE_BYTES // len(GET % b"1") + 1
        assert most > 1 or _kind == "direct", "only requests with immediate responses never wait"


async def test_invalid_bytes_after_requests_do_not_stop_their_responses() -> None:
    async with served() as target:
        reader, writer = await target.connect()
        writer.write(GET % b"3" + GET % b"4" + b"\x00 nonsense\r\n\r\n")
        assert await read_response(reader) == (200, b"xxx")
        assert await read_response(reader) == (200, b"xxxx")
        rest = await read_until_end(reader)
        if _kind == "direct":
            check_error(rest, 400, "invalid_request")
        else:
            assert rest == b""


async def test_ignored_upgrade_neither_drops_nor_creates_a_request() -> None:
    upgrade = (
        b"host: x\r\nupgrade: h2c\r\nconnection: upgrade, HTTP2-Settings\r\n"
        b"http2-settings: AAMAAABk\r\n"
    )
    async with served() as target:
        reader, writer = await target.connect()
        writer.write(b"GET /1 HTTP/1.1\r\n%b\r\n" % upgrade + GET % b"2")
        assert await read_response(reader) == (200, b"x")
        assert await read_response(reader) == (200, b"xx")
        inner = GET % b"smuggled"
        for body in (
            b"content-length: %d\r\n\r\n%b" % (len(inner), inner),
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner),
        ):
            reader, writer = await target.connect()
            writer.write(b"POST /echo HTTP/1.1\r\n%b" % upgrade + body + GET % b"3")
            # There is one response, so the body is not parsed as a request.
            check_error(await read_until_end(reader), 400, "invalid_request")
        assert target.requests == ["/1", "/2"]


async def test_connect_is_refused_and_the_connection_closed() -> None:
    async with served() as target:
        reader, writer = await target.connect()
        writer.write(b"CONNECT h:1 HTTP/1.1\r\nhost: h:1\r\n\r\n" + GET % b"1")
        check_error(await read_until_end(reader), 400, "invalid_request")
        assert target.requests == []


async def test_stall_of_the_server_does_not_count_for_timeouts_of_clients() -> None:
    async with served(header_timeout_s=0.6, body_timeout_s=0.6) as target:
        streams = [await target.connect() for _ in range(10)]
        for _, writer in streams[:5]:
            writer.write((GET % b"2")[:-2])
        for _, writer in streams[5:]:
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n")
        await until(lambda: len(target.requests) == 5, "the server waits for the bodies")
        time.sleep(2.0)  # noqa: ASYNC251 - it stalls the server
        await asyncio.sleep(0.1)
        for _, writer in streams[:5]:
            writer.write(b"\r\n")
        for _, writer in streams[5:]:
            writer.write(b"xx")
        for reader, _ in streams:
            assert await read_response(reader) == (200, b"xx")


async def test_request_in_progress_is_notified_when_its_client_is_disconnected() -> None:
    async with served() as target:
        target.connect_without_reading().send(GET % b"never" + GET % b"1")
        await until(
            lambda: target.connections and target.connections[0].pipeline,
            "the second request waits",
        )
        target.connections[0].cut()
        await until(lambda: target.disconnects == 1, "the first request is notified")
        await until(target.is_idle, "no connection and no task is left")
        assert target.requests == ["/never"]


async def test_connection_limit_leaves_file_descriptors_for_other_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    def limits(soft: int) -> Callable[[int], tuple[int, int]]:
        return lambda _: (soft, soft)

    for soft, admitted in ((1024, 768), (100, 50), (1 << 20, 4096)):
        monkeypatch.setattr(resource, "getrlimit", limits(soft))
        async with served() as target:
            assert target.server.admitted_connections == admitted
