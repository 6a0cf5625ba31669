"""Direct queries in every form that HTTP allows: in pieces, pipelined, chunked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from disco import Node
from tests.cluster import TIMEOUT_S, Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio

HANDLERS = """
import asyncio, pathlib
async def handle(body, memory):
    if body == "wait":
        pathlib.Path("began").touch()
        while not pathlib.Path("gate").exists():
            await asyncio.sleep(0.005)
    if body.startswith("large"):
        return body[5:] * 3_000_000, memory
    return body, memory
"""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def results(self) -> object:
        assert self.status == 200, self
        return json.loads(self.body)["results"]


class Client:
    """One connection whose bytes the test writes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def answer(self) -> Answer:
        status, headers = await self.head()
        length = int(headers.get("content-length", 0))
        body = await asyncio.wait_for(self.reader.readexactly(length), TIMEOUT_S)
        return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)).decode()
        status, _, rest = head.partition("\r\n")
        headers = {
            name.lower(): value
            for name, _, value in (line.partition(": ") for line in rest.split("\r\n") if line)
        }
        return int(status.split()[1]), headers

    async def ended(self) -> bool:
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S) == b""


@asynccontextmanager
async def client(running: Cluster) -> AsyncIterator[Client]:
    url = running.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


def query(text: str, path: str = "/agent/query", version: str = "1.1", **headers: str) -> bytes:
    body = json.dumps({"query": text}).encode()
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/{version}\r\nhost: localhost\r\n"
    head += f"content-length: {len(body)}\r\n{lines}\r\n"
    return head.encode() + body


@asynccontextmanager
async def running_agent(tmp_path: Path, node: Node, **options: str) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS, **options) as running:
        await running.wait_ready()
        yield running


async def test_query_has_the_same_result_in_every_form(tmp_path: Path, node: Node) -> None:
    async with running_agent(tmp_path, node) as running, client(running) as one:
        for byte in query("byte by byte"):
            one.send(bytes([byte]))
            await one.writer.drain()
            await asyncio.sleep(0)
        answer = await one.answer()
        assert answer.results == "byte by byte"
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-worker"] == "a_server"
        assert "GMT" in answer.headers["date"]

        for path in (
            "/agents/a/query",
            "/workers/a_server/query",
            "/agent/query?by=whom",
            "/%61gents/%61/query",
            "http://localhost/agent/query",
        ):
            one.send(query("x", path))
            assert (await one.answer()).results == "x", path
        one.send(query("x", "/agents/zz/query"))
        assert (await one.answer()).status == 404
        one.send(query("x", "/agents//query"))
        assert (await one.answer()).status == 404
        one.send(query("x", "/agent/query/"))
        assert (await one.answer()).status == 404

        head = (
            b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        one.send(head, b'9\r\n{"query":\r\n', b'5\r\n"in p\r\n', b'7\r\nieces"}\r\n0\r\n\r\n')
        assert (await one.answer()).results == "in pieces"


async def test_pipelined_queries_are_answered_in_order(tmp_path: Path, node: Node) -> None:
    async with running_agent(tmp_path, node) as running, client(running) as one:
        one.send(
            query("wait"),
            *(query(f"q{number}") for number in range(200)),
            query("x", "/nowhere"),
            query("last"),
        )
        await until((tmp_path / "began").exists, "the later requests wait")
        (tmp_path / "gate").touch()
        assert (await one.answer()).results == "wait"
        for number in range(200):
            assert (await one.answer()).results == f"q{number}"
        assert (await one.answer()).status == 404, "a request for Starlette, in order"
        assert (await one.answer()).results == "last"


async def test_early_errors_are_answered_in_order(tmp_path: Path, node: Node) -> None:
    wrong = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
    async with running_agent(tmp_path, node) as running, client(running) as one:
        one.send(query("wait"), wrong * 300, query("last"))
        await until((tmp_path / "began").exists, "the later requests wait")
        (tmp_path / "gate").touch()
        assert (await one.answer()).results == "wait"
        for _ in range(300):
            assert (await one.answer()).status == 400
        assert (await one.answer()).results == "last"


async def test_invalid_body_of_an_answered_request_gets_no_second_response(
    tmp_path: Path, node: Node
) -> None:
    async with running_agent(tmp_path, node) as running, client(running) as one:
        one.send(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await one.answer()).status == 404
        one.send(b"this is no chunk\r\n")
        assert await one.ended()


async def test_content_length_may_have_thousands_of_leading_zeros(
    tmp_path: Path, node: Node
) -> None:
    async with running_agent(tmp_path, node) as running, client(running) as one:
        for zeros in (10, 5000):
            one.send(query("x").replace(b"content-length: ", b"content-length: " + b"0" * zeros))
            answer = await one.answer()
            assert answer.results == "x"
        assert not running.events("request_fault")


async def test_connection_is_kept_or_closed_as_the_client_requests(
    tmp_path: Path, node: Node
) -> None:
    async with running_agent(tmp_path, node) as running:
        for request, kept in (
            (query("x"), True),
            (query("x", connection="close"), False),
            (query("x", version="1.0"), False),
            (
                b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999\r\n\r\n",
                False,
            ),
        ):
            async with client(running) as one:
                one.send(request)
                answer = await one.answer()
                assert (answer.headers.get("connection") == "close") or kept or answer.status == 413
                if kept:
                    one.send(query("again"))
                    assert (await one.answer()).results == "again"
                else:
                    assert await one.ended()


async def test_expect_continue_is_answered_unless_the_request_is_refused(
    tmp_path: Path, node: Node
) -> None:
    async with running_agent(tmp_path, node) as running, client(running) as one:
        head, _, body = query("x", expect="100-continue").partition(b"\r\n\r\n")
        one.send(head, b"\r\n\r\n")
        assert (await one.answer()).status == 100
        one.send(body)
        assert (await one.answer()).results == "x"
        head = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\n"
        one.send(head, b"expect: 100-continue\r\ncontent-length: 99999\r\n\r\n")
        assert (await one.answer()).status == 413, "the client need not send the body"


async def test_large_responses_are_complete_and_do_not_block_others(
    tmp_path: Path, node: Node
) -> None:
    async with (
        running_agent(tmp_path, node) as running,
        client(running) as large,
        client(running) as small,
    ):
        large.send(*(query(f"large{letter}") for letter in "abcdef"))
        # The rest of the responses is more than the buffers of the sockets hold.
        status, headers = await large.head()
        for _ in range(5):
            small.send(query("small"))
            assert (await small.answer()).results == "small"
        body = await large.reader.readexactly(int(headers["content-length"]))
        assert Answer(status, headers, body).results == "a" * 3_000_000
        for letter in "bcdef":
            assert (await large.answer()).results == letter * 3_000_000


async def test_clients_that_disconnect_at_any_moment_leak_nothing(
    tmp_path: Path, node: Node
) -> None:
    async with running_agent(tmp_path, node, runner="max_in_flight = 40") as running:
        request = query("wait")
        for cut in range(0, len(request) + 1, 7):
            async with client(running) as one:
                one.send(request[:cut] if cut < len(request) - 7 else request)
                await one.writer.drain()

        async def free() -> bool:
            async with client(running) as one:
                one.send(query("x"))
                (tmp_path / "gate").touch()
                return (await one.answer()).status == 200

        await until(free, "the places of the disconnected clients are free")
        async with client(running) as one:
            one.send(*(query(f"q{number}") for number in range(39)))
            for number in range(39):
                assert (await one.answer()).results == f"q{number}"
        assert "Traceback" not in running.log


async def test_pipelined_query_is_checked_by_its_own_headers(tmp_path: Path, node: Node) -> None:
    (tmp_path / "token").write_text("sekrit")
    (tmp_path / "token").chmod(0o600)
    good = {"authorization": "Bearer sekrit"}
    chunked = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    trailed = b'c\r\n{"query":"x"\r\n1\r\n}\r\n0\r\nauthorization: Bearer sekrit\r\n\r\n'
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, runner='http_token_file = "token"'
    ) as running:
        running.http.headers.update(good)
        await running.wait_ready()
        async with client(running) as one:
            one.send(
                query("wait", **good),
                query("x"),
                query("y", **good),
                chunked,
                trailed,
                query("z", **good),
            )
            await until((tmp_path / "began").exists, "the later requests wait")
            (tmp_path / "gate").touch()
            assert [(await one.answer()).status for _ in range(5)] == [200, 401, 200, 401, 200]


async def test_pipelined_request_of_a_web_page_is_refused(tmp_path: Path, node: Node) -> None:
    evil = (
        b"POST /agent/query HTTP/1.1\r\nhost: evil.example\r\ncontent-length: 13\r\n\r\n"
        + b'{"query":"x"}'
    )
    absolute = evil.replace(b"host: evil.example", b"host: localhost").replace(
        b" /agent", b" http://evil.example/agent"
    )
    async with running_agent(tmp_path, node) as running, client(running) as one:
        one.send(
            query("wait"),
            evil,
            query("x"),
            absolute,
            query("y"),
            query("z", origin="https://localhost"),
        )
        await until((tmp_path / "began").exists, "the later requests wait")
        (tmp_path / "gate").touch()
        assert [(await one.answer()).status for _ in range(6)] == [200, 403, 200, 403, 200, 403]


@pytest.mark.message_text
@pytest.mark.parametrize(
    "hosts", [b"", b"host: localhost\r\nhost: localhost\r\n", b"host: evil\r\nhost: localhost\r\n"]
)
async def test_request_without_exactly_one_host_is_refused(
    hosts: bytes, tmp_path: Path, node: Node
) -> None:
    body = b'{"query":"x"}'
    async with running_agent(tmp_path, node) as running:
        for path in (b"/agent/query", b"/workers"):
            async with client(running) as one:
                one.send(
                    b"POST %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b"
                    % (path, hosts, len(body), body)
                )
                answer = await one.answer()
                assert answer.status == 400
                assert b"one Host header" in answer.body
                assert await one.ended()


@pytest.mark.message_text
async def test_body_of_a_refused_upgrade_is_not_parsed(tmp_path: Path, node: Node) -> None:
    h2c = {
        "connection": "Upgrade, HTTP2-Settings",
        "upgrade": "h2c",
        "http2_settings": "AAMAAABkAARAAAAAAAIAAAAA",
    }
    async with running_agent(tmp_path, node) as running:
        async with client(running) as one:
            one.send(query("as curl --http2 asks", **h2c), query("last"))
            answer = await one.answer()
            assert answer.status == 400
            assert b"send it without Upgrade" in answer.body
            assert await one.ended()
        async with client(running) as one:
            one.send(query("first"), query("as curl --http2 asks", **h2c), query("last"))
            assert (await one.answer()).results == "first"
            assert await one.ended()


async def test_refusal_before_an_announced_body_closes_the_connection(
    tmp_path: Path, node: Node
) -> None:
    head = b"POST /agent/query HTTP/1.1\r\nhost: evil.example\r\n"
    head += b"expect: 100-continue\r\ncontent-length: 200\r\n\r\n"
    async with running_agent(tmp_path, node) as running, client(running) as one:
        one.send(head)
        answer = await one.answer()
        assert (answer.status, answer.headers["connection"]) == (403, "close")
        assert await one.ended(), "the server could take its next request for that body"
