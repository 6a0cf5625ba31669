"""Queries through real sockets: the agents asked, their answers and the timeouts."""

from __future__ import annotations

import asyncio
import base64
import time
from contextlib import AsyncExitStack
from typing import Any

import anyio
import httpx
import pytest

from disco import Node
from tests.disco.harness import FakeAgent, agent, node_with

pytestmark = pytest.mark.anyio


async def answer_each(fake: FakeAgent, data: Any) -> None:
    while True:
        query = await fake.receive()
        await fake.answer(query, data(query) if callable(data) else data)


async def post(http: httpx.AsyncClient, **body: Any) -> Any:
    response = await http.post("/query", json=body)
    assert response.status_code == 200
    return response.json()["embryo_list"]


async def test_query_text_reaches_the_agent_unchanged(node: Node, http: httpx.AsyncClient) -> None:
    received: list[Any] = []

    def found(query: Any) -> list[Any]:
        received.append(query)
        return [{"type": "url"}]

    async with agent(node, "a") as fake, anyio.create_task_group() as tasks:
        tasks.start_soon(answer_each, fake, found)
        assert await post(http, query='  {"json": "é\\n"} ') == [{"type": "url"}]
        assert await post(http, value="by value") == [{"type": "url"}]
        assert await node.query("in process") == [{"type": "url"}]
        tasks.cancel_scope.cancel()
    assert [query["body"] for query in received] == [
        '  {"json": "é\\n"} ',
        "by value",
        "in process",
    ]
    assert {query["action"] for query in received} == {"query"}
    assert all(base64.b64decode(query["id"], validate=True) for query in received)
    assert len({query["id"] for query in received}) == 3


async def test_answers_of_all_agents_are_flattened_and_grouped(
    node: Node, http: httpx.AsyncClient
) -> None:
    answers: list[Any] = [
        [{"type": "a"}, {"type": "b", "n": 1}],
        {"type": "b", "n": 2},
        None,
        "text",
        7,
    ]
    async with anyio.create_task_group() as tasks:
        async with AsyncExitStack() as stack:
            for number, data in enumerate(answers):
                fake = await stack.enter_async_context(agent(node, f"agent {number}"))
                tasks.start_soon(answer_each, fake, data)
            found = await post(http, query="q")
            tasks.cancel_scope.cancel()
    assert [item["type"] for item in found] == ["b", "b", "a"]
    assert {item.get("n") for item in found[:2]} == {1, 2}


async def test_agents_with_the_capability_are_asked_or_else_all(
    node: Node, http: httpx.AsyncClient
) -> None:
    async with (
        anyio.create_task_group() as tasks,
        agent(node, "a", "x", "y") as a,
        agent(node, "b", "z") as b,
    ):
        tasks.start_soon(answer_each, a, [{"by": "a"}])
        tasks.start_soon(answer_each, b, [{"by": "b"}])
        assert await post(http, query="q", capabilities=["y"]) == [{"by": "a"}]
        assert await node.query("q", ["z"]) == [{"by": "b"}]
        for capabilities in (["unknown"], [], None):
            found = await post(http, query="q", capabilities=capabilities)
            assert sorted(item["by"] for item in found) == ["a", "b"]
        tasks.cancel_scope.cancel()


async def test_query_without_agents_is_answered_at_once(http: httpx.AsyncClient) -> None:
    assert await post(http, query="q") == []


async def test_timed_out_query_returns_early_results_and_drops_late_ones(
    anyio_backend: object,
) -> None:
    async with (
        node_with(query_timeout_ms=1500) as node,
        agent(node, "quick") as quick,
        agent(node, "slow") as slow,
    ):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer_each, quick, [{"by": "quick"}])
            started = time.monotonic()
            assert await node.query("first") == [{"by": "quick"}]
            # uvloop's timers count in milliseconds, so one may fire slightly early.
            assert time.monotonic() - started >= 1.49
            late = await slow.receive()
            assert late["body"] == "first"
            await slow.answer(late, [{"by": "late"}])
            tasks.start_soon(answer_each, slow, [{"by": "slow"}])
            assert sorted(item["by"] for item in await node.query("second", timeout_ms=30_000)) == [
                "quick",
                "slow",
            ]
            tasks.cancel_scope.cancel()
        assert node.in_flight == 0


async def test_query_does_not_wait_for_an_agent_that_disconnects(anyio_backend: object) -> None:
    async with node_with(query_timeout_ms=60_000) as node, agent(node, "stays") as stays:
        for how in ("closes", "is dropped"):
            async with anyio.create_task_group() as tasks, agent(node, "leaves") as leaves:
                tasks.start_soon(disconnect_when_asked, node, leaves, how)
                tasks.start_soon(answer_each, stays, [{"by": "stays"}])
                assert await node.query("q") == [{"by": "stays"}]
                tasks.cancel_scope.cancel()


async def disconnect_when_asked(node: Node, fake: FakeAgent, how: str) -> None:
    await fake.receive()
    if how == "closes":
        await fake.socket.close()
    else:
        node.drop("leaves")


async def test_result_sent_just_before_the_close_is_used(anyio_backend: object) -> None:
    async with node_with(query_timeout_ms=60_000) as node, agent(node, "a") as fake:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answer_and_close, fake)
            assert await node.query("q") == [{"by": "a"}]


async def answer_and_close(fake: FakeAgent) -> None:
    await fake.answer(await fake.receive(), [{"by": "a"}])
    await fake.socket.close(1001)


async def test_only_the_first_answer_of_an_asked_agent_is_used(anyio_backend: object) -> None:
    async with node_with(query_timeout_ms=60_000) as node:
        async with agent(node, "a", "x") as a, agent(node, "b", "x") as b, agent(node, "c") as c:
            async with anyio.create_task_group() as tasks:
                found: list[Any] = []
                tasks.start_soon(collect, node, found)
                query = await a.receive()
                await a.answer(query, [{"by": "a"}])
                await a.answer(query, [{"by": "a again"}])
                await c.answer(query, [{"by": "c, which was not asked"}])
                for fake in (a, c):
                    # The answer shows that the node has read everything before it.
                    await fake.request({"action": "unknown"})
                await b.answer(await b.receive(), [{"by": "b"}])
    assert found == [{"by": "a"}, {"by": "b"}]


async def collect(node: Node, found: list[Any]) -> None:
    found += await node.query("q", ["x"])


async def test_each_of_a_thousand_concurrent_queries_gets_its_own_answer(
    node: Node, http: httpx.AsyncClient
) -> None:
    def echo(query: Any) -> list[Any]:
        return [{"body": query["body"]}]

    async with anyio.create_task_group() as tasks, agent(node, "a") as a, agent(node, "b") as b:
        tasks.start_soon(answer_each, a, echo)
        tasks.start_soon(answer_out_of_order, b, echo)
        found = await asyncio.gather(*(node.query(f"query {number}") for number in range(1000)))
        tasks.cancel_scope.cancel()
    assert found == [[{"body": f"query {number}"}] * 2 for number in range(1000)]
    assert node.in_flight == 0


async def answer_out_of_order(fake: FakeAgent, data: Any) -> None:
    while True:
        queries = [await fake.receive() for _ in range(10)]
        for query in reversed(queries):
            await fake.answer(query, data(query))


async def test_frames_of_one_loop_iteration_are_written_together(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent(node, "a") as fake, anyio.create_task_group() as tasks:
        socket: Any = node.registry.connection("a")
        writes: list[bytes] = []
        transport = CountingTransport(socket.transport, writes)
        monkeypatch.setattr(socket, "transport", transport)
        for number in range(100):
            tasks.start_soon(node.query, f"query {number}")
        for _ in range(100):
            await fake.answer(await fake.receive(), None)
        assert len(writes) == 1


class CountingTransport:
    def __init__(self, transport: asyncio.Transport, writes: list[bytes]) -> None:
        self._transport = transport
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_cancelled_query_is_not_kept_in_flight(node: Node) -> None:
    async with agent(node, "a") as fake:
        with anyio.move_on_after(0.02):
            await node.query("q")
        assert node.in_flight == 0
        await fake.answer(await fake.receive(), [{"late": True}])
        assert await fake.request({"action": "unknown"}) == {"error": "unknown_action"}
