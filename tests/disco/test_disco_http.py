"""The HTTP routes: invalid requests, and the registry with its events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import msgspec
import pytest

from disco import Node, NodeSettings, serve
from tests.disco.harness import LIMIT_S, agent, eventually, node_with

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"{}",
        b'"text"',
        b'{"query":""}',
        b'{"query":7}',
        b'{"query":null}',
        b'{"query":"a","capabilities":"x"}',
        b'{"query":"a","capabilities":[1]}',
        b'{"query":"\xff"}',
        b'{"query":"\\ud800"}',
        b"[" * 60_000,
    ],
)
async def test_invalid_query_is_answered_400(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post("/query", content=body)
    assert (response.status_code, response.json()) == (400, {"error": "invalid_request"})


async def test_body_over_64_kib_is_answered_413(
    http: httpx.AsyncClient,
) -> None:
    frame = b'{"query":"%b"}'
    longest = frame % (b"x" * (64 * 1024 - len(frame) + 2))
    assert (await http.post("/query", content=longest)).status_code == 200
    response = await http.post("/query", content=longest + b" ")
    assert (response.status_code, response.json()) == (413, {"error": "body_too_large"})


async def test_body_of_unknown_length_over_the_limit_is_answered_413(
    http: httpx.AsyncClient,
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1024

    assert (await http.post("/query", content=chunks())).status_code == 413


async def test_body_declared_over_the_limit_is_refused_unread(node: Node) -> None:
    reader, writer = await asyncio.open_connection(node.host, node.port)
    writer.write(b"POST /query HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    assert b" 413 " in await reader.readline()
    writer.close()


async def test_content_length_with_thousands_of_leading_zeros_is_accepted(node: Node) -> None:
    reader, writer = await asyncio.open_connection(node.host, node.port)
    body = b'{"value": "x"}'
    writer.write(
        b"POST /query HTTP/1.1\r\nHost: x\r\nContent-Length: %s%d\r\n\r\n%s"
        % (b"0" * 5000, len(body), body)
    )
    assert b" 200 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [
        ("GET", "/query", 405, "method_not_allowed"),
        ("POST", "/registry", 405, "method_not_allowed"),
        ("DELETE", "/registry/events", 405, "method_not_allowed"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/registry/", 404, "not_found"),
        ("GET", "/ws", 426, "upgrade_required"),
    ],
)
async def test_request_errors_are_answered_in_json(
    http: httpx.AsyncClient, method: str, path: str, status: int, error: str
) -> None:
    response = await http.request(method, path)
    assert (response.status_code, response.json()) == (status, {"error": error})
    assert response.headers["content-type"] == "application/json"


async def test_queries_over_the_rate_limit_are_answered_429(anyio_backend: object) -> None:
    async with (
        node_with(queries_per_s=0.001) as node,
        httpx.AsyncClient(
            base_url=f"http://{node.address.authority}", trust_env=False, timeout=LIMIT_S
        ) as http,
    ):
        assert (await http.post("/query", json={"query": "q"})).status_code == 200
        response = await http.post("/query", json={"query": "q"})
        assert (response.status_code, response.json()) == (429, {"error": "rate_limited"})


async def test_answer_is_passed_on_verbatim(node: Node, http: httpx.AsyncClient) -> None:
    async with agent(node, "a") as fake:
        asked = asyncio.create_task(http.post("/query", json={"query": "q"}))
        query = await fake.receive()
        data = '[{"n": 1.10, "big": 1e999}]'
        await fake.socket.send(
            f'{{"action":"result","id":"{query["id"]}","data":{data}}}'.replace("/", "\\/")
        )
        assert (await asked).content == f'{{"embryo_list":{data}}}'.encode()


async def test_registry_lists_the_agents(node: Node, http: httpx.AsyncClient) -> None:
    assert (await http.get("/registry")).json() == {"agents": []}
    async with agent(node, "a", "x", "y"):
        (listed,) = (await http.get("/registry")).json()["agents"]
    assert (listed["name"], listed["capabilities"]) == ("a", ["x", "y"])
    assert isinstance(listed["connected_at"], int)
    assert abs(time.time() - listed["connected_at"]) < 60


@asynccontextmanager
async def events(http: httpx.AsyncClient) -> AsyncIterator[AsyncIterator[str]]:
    async with http.stream("GET", "/registry/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.aiter_lines()


async def next_names(lines: AsyncIterator[str]) -> list[str]:
    data = (await anext(lines)).removeprefix("data: ")
    assert await anext(lines) == ""
    listed: Any = msgspec.json.decode(data)
    return [one["name"] for one in listed["agents"]]


async def test_registry_events_report_the_state_and_each_change(
    node: Node, http: httpx.AsyncClient
) -> None:
    async with events(http) as lines:
        assert await next_names(lines) == []
        async with agent(node, "a"):
            assert await next_names(lines) == ["a"]
            async with agent(node, "b"):
                assert await next_names(lines) == ["a", "b"]
            assert await next_names(lines) == ["a"]
        assert await next_names(lines) == []


async def test_idle_event_stream_is_kept_open_by_comments(anyio_backend: object) -> None:
    async with (
        node_with(sse_ping_interval_ms=10) as node,
        httpx.AsyncClient(
            base_url=f"http://{node.address.authority}", trust_env=False, timeout=LIMIT_S
        ) as http,
        events(http) as lines,
    ):
        assert await next_names(lines) == []
        assert [await anext(lines) for _ in range(4)] == [": ping", "", ": ping", ""]


async def test_event_stream_ends_when_its_reader_disconnects(node: Node) -> None:
    before = asyncio.all_tasks()
    async with httpx.AsyncClient(
        base_url=f"http://{node.address.authority}", trust_env=False, timeout=LIMIT_S
    ) as http:
        async with events(http) as lines:
            await next_names(lines)
            assert asyncio.all_tasks() != before
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_event_stream_ends_cleanly_when_the_node_stops(
    anyio_backend: object,
) -> None:
    async with (
        AsyncExitStack() as stack,
        httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as http,
    ):
        node = await stack.enter_async_context(serve(NodeSettings(port=0)))
        async with http.stream(
            "GET", f"http://{node.address.authority}/registry/events"
        ) as response:
            lines = response.aiter_lines()
            assert await next_names(lines) == []
            await stack.aclose()
            assert [line async for line in lines] == []


async def test_head_request_for_the_event_stream_ends(http: httpx.AsyncClient) -> None:
    assert (await http.head("/registry/events")).status_code == 200
    # The connection is free for the next request.
    assert (await http.get("/registry")).status_code == 200
