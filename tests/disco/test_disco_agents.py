"""Agents on real sockets: tokens, handshake, keep-alive and disconnection."""

from __future__ import annotations

import asyncio
import socket as sockets
import struct
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from disco import Node
from disco._log import REFUSALS_PER_WINDOW
from shared.config.tokens import Secret, mint
from tests.disco.harness import (
    HANDSHAKE,
    SECRET,
    UPGRADE,
    FakeAgent,
    agent,
    connected,
    eventually,
    masked,
    node_with,
    raw_agent,
    raw_socket,
    token_for,
)
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio

OTHER_SECRET = "another secret that is long enough for HS256"


async def refusal(node: Node, target: str) -> tuple[int, bytes, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(f"{node.url}{target}", proxy=None):
            pass
    response = caught.value.response
    return response.status_code, bytes(response.body), response.headers["Content-Type"]


@pytest.mark.parametrize(
    "query",
    [
        lambda: "",
        lambda: "?token=",
        lambda: "?token=nonsense",
        lambda: "?token=%FF%00.%20.x",
        lambda: f"?token={token_for('a', ttl_s=-10)}",
        lambda: f"?token={mint(OTHER_SECRET, 'a', ttl_s=60)}",
        lambda: f"?jwt={token_for('a')}",
    ],
    ids=["none", "empty", "malformed", "binary", "expired", "other secret", "other parameter"],
)
async def test_upgrade_without_a_valid_token_is_answered_401(
    guarded: Node, query: Callable[[], str]
) -> None:
    assert await refusal(guarded, f"/ws{query()}") == (
        401,
        b'{"error":"unauthorized"}',
        "application/json",
    )


async def test_token_signed_with_another_secret_is_refused(anyio_backend: object) -> None:
    async with node_with(secret=Secret(OTHER_SECRET)) as node:
        assert (await refusal(node, f"/ws?token={mint(SECRET, 'a', ttl_s=60)}"))[0] == 401


async def test_agent_with_a_valid_token_is_registered(guarded: Node) -> None:
    async with connected(guarded, token_for("a")) as fake:
        assert await fake.register("a") == {"status": "ok", "action": "registered"}
        assert await fake.hello("x", "y") == {
            "status": "ok",
            "action": "agent_registered",
            "capabilities": ["x", "y"],
        }
        assert "a" in guarded.registry


async def test_name_other_than_the_tokens_subject_is_refused_without_closing(
    guarded: Node,
) -> None:
    async with connected(guarded, token_for("a")) as fake:
        assert await fake.register("b") == {"status": "error", "reason": "name_mismatch"}
        assert await fake.register("a") == {"status": "ok", "action": "registered"}


async def test_tokens_are_never_logged(guarded: Node, caplog: pytest.LogCaptureFixture) -> None:
    token, invalid = token_for("a"), mint(OTHER_SECRET, "a", ttl_s=60)
    caplog.set_level(0)
    with capture_logs() as lines:
        async with connected(guarded, token) as fake:
            await fake.register("b")
        await refusal(guarded, f"/ws?token={invalid}")
    messages = [
        record.getMessage() for record in caplog.records if record.name != "websockets.client"
    ]
    assert len(lines) == 2
    assert token not in str((lines, messages))
    assert invalid not in str((lines, messages))


async def test_upgrade_on_another_path_is_answered_404(node: Node) -> None:
    for target in ("/", "/ws/", "/query", "/registry/events"):
        assert await refusal(node, target) == (404, b'{"error":"not_found"}', "application/json")


async def test_connections_over_the_rate_limit_are_answered_429(anyio_backend: object) -> None:
    async with node_with(connections_per_s=0.001) as node, connected(node):
        assert (await refusal(node, "/ws"))[:2] == (429, b'{"error":"rate_limited"}')


async def test_both_handshake_frames_may_be_sent_without_waiting_for_answers(node: Node) -> None:
    async with connected(node) as fake:
        await fake.send({"action": "register", "name": "a"})
        await fake.send({"action": "agent_hello", "capabilities": []})
        assert (await fake.receive())["action"] == "registered"
        assert await fake.receive() == {
            "status": "ok",
            "action": "agent_registered",
            "capabilities": [],
        }


async def test_taken_name_is_refused_until_its_agent_disconnects(node: Node) -> None:
    async with connected(node) as second:
        async with agent(node, "a"):
            assert (await second.register("a"))["action"] == "registered"
            assert await second.hello() == {"status": "error", "reason": "name_taken"}
            assert await node.query("not for the second", timeout_ms=0) == []
        await node.wait_until(lambda: "a" not in node.registry)
        # The first frame received answers this hello, so no query came before it.
        assert (await second.hello())["action"] == "agent_registered"
        assert "a" in node.registry


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (
            '{"action":"agent_hello","capabilities":[]}',
            {"error": "must register before agent_hello"},
        ),
        ('{"action":"dance"}', {"error": "unknown_action"}),
        ("[]", {"error": "unknown_action"}),
    ],
)
async def test_error_frame_does_not_close_the_socket(node: Node, text: str, answer: Any) -> None:
    async with connected(node) as fake:
        await fake.socket.send(text)
        assert await fake.receive() == answer
        assert (await fake.register("a"))["action"] == "registered"


async def test_text_that_is_not_json_closes_with_1011_and_frees_the_name(node: Node) -> None:
    async with agent(node, "a") as fake:
        await fake.socket.send("hello")
        assert await fake.wait_closed() == 1011
        assert "a" not in node.registry


async def test_frames_after_the_nodes_close_are_ignored(node: Node) -> None:
    texts = (
        b"not json",
        b'{"action":"register","name":"a"}',
        b'{"action":"agent_hello","capabilities":[]}',
    )
    async with raw_agent(node) as (reader, writer):
        writer.write(b"".join(masked(0x1, text) for text in texts))
        assert await reader.readexactly(4) == b"\x88\x02\x03\xf3"
        writer.write(masked(0x8, b"\x03\xf3"))
        assert await reader.read() == b""
        assert "a" not in node.registry


async def test_text_that_is_not_utf8_closes_with_1007(node: Node) -> None:
    async with connected(node) as fake:
        await fake.socket.send(b'"\xff"', text=True)
        assert await fake.wait_closed() == 1007


async def test_message_over_the_limit_closes_with_1009(anyio_backend: object) -> None:
    async with node_with(max_frame_bytes=1024) as node, agent(node, "a") as fake:
        await fake.socket.send("x" * 1_000_000)
        assert await fake.wait_closed() == 1009
        assert "a" not in node.registry


async def test_fragments_are_joined_and_binary_messages_are_ignored(node: Node) -> None:
    async with connected(node) as fake:
        await fake.socket.send([b"not", b"json"])
        await fake.socket.send(b"not json")
        await fake.socket.send(['{"action":"regi', 'ster","na', 'me":"a"}'])
        assert (await fake.receive())["action"] == "registered"


async def test_idle_socket_is_closed_and_its_name_freed(anyio_backend: object) -> None:
    async with node_with(idle_timeout_ms=1000) as node, agent(node, "a") as fake:
        assert await fake.wait_closed() == 1000
        assert "a" not in node.registry


async def test_idle_socket_without_a_registration_is_closed(anyio_backend: object) -> None:
    async with node_with(idle_timeout_ms=500) as node, connected(node) as fake:
        assert await fake.wait_closed() == 1000


@pytest.mark.parametrize("kind", ["ping", "pong"])
async def test_pings_and_pongs_keep_an_idle_socket_open(anyio_backend: object, kind: str) -> None:
    async with (
        node_with(idle_timeout_ms=1000) as node,
        agent(node, "quiet"),
        agent(node, "a") as fake,
    ):
        # "quiet" has the same idle timeout, so to outlive it twice is not chance.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_alive, fake, kind)
            await node.wait_until(lambda: "quiet" not in node.registry)
            async with agent(node, "quiet"):
                await node.wait_until(lambda: "quiet" not in node.registry)
            assert "a" in node.registry
            tasks.cancel_scope.cancel()


async def keep_alive(fake: FakeAgent, kind: str) -> None:
    while True:
        await (fake.socket.ping() if kind == "ping" else fake.socket.pong())
        await anyio.sleep(0.02)


async def test_node_answers_pings_and_sends_none(anyio_backend: object) -> None:
    async with node_with(idle_timeout_ms=1000) as node, raw_agent(node) as (reader, writer):
        writer.write(masked(0x9, b"hi"))
        # The pong, then the close with 1000, and nothing else.
        assert await reader.readexactly(8) == b"\x8a\x02hi" + b"\x88\x02\x03\xe8"
        writer.write(masked(0x8, b"\x03\xe8"))
        assert await reader.read() == b""


async def test_name_is_freed_when_the_socket_is_closed_or_reset(node: Node) -> None:
    for reset in (False, True):
        async with raw_agent(node) as (_, writer):
            writer.write(HANDSHAKE)
            await node.wait_for("a")
            if reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    sockets.SOL_SOCKET, sockets.SO_LINGER, linger
                )
                writer.transport.abort()
            else:
                writer.write_eof()
            await node.wait_until(lambda: "a" not in node.registry)


async def test_dropped_agent_gets_no_close_frame(node: Node) -> None:
    async with agent(node, "a") as fake:
        assert node.drop("a")
        assert "a" not in node.registry
        assert await fake.wait_closed() == 1006
    assert not node.drop("a")


async def test_agent_that_does_not_read_is_dropped_before_it_fills_memory(
    anyio_backend: object,
) -> None:
    async with (
        node_with(max_unsent_bytes=1_000_000, query_timeout_ms=60_000) as node,
        raw_agent(node) as (_, writer),
        anyio.create_task_group() as tasks,
    ):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(HANDSHAKE)
        await node.wait_for("a")
        asked = 0
        while "a" in node.registry:
            tasks.start_soon(node.query, "x" * 100_000)
            await anyio.lowlevel.checkpoint()
            asked += 1
            # The socket buffers of both ends hold some of the queries.
            assert asked < 500


async def test_each_registration_and_disconnection_is_logged_once(node: Node) -> None:
    with capture_logs() as lines:
        async with agent(node, "a", "x") as fake:
            await fake.hello("y")
            async with connected(node) as rival:
                await rival.register("a")
                await rival.hello()
        await node.wait_until(lambda: "a" not in node.registry)
    assert [(line["event"], line["agent"]) for line in lines] == [
        ("agent_registered", "a"),
        ("agent_refused", "a"),
        ("agent_gone", "a"),
    ]
    assert lines[0]["capabilities"] == ["x"]


@pytest.mark.message_text
async def test_logged_disconnection_has_a_reason(node: Node) -> None:
    with capture_logs() as lines:
        async with agent(node, "a"):
            pass
        await node.wait_until(lambda: "a" not in node.registry)
    assert lines[-1]["reason"] == "the agent closed"


async def test_hostile_clients_neither_flood_the_log_nor_stop_the_node(
    guarded: Node, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    with capture_logs() as lines:
        for garbage in (
            b"\x00\xff" * 100,
            b"GET /ws HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        ):
            for _ in range(30):
                await raw_exchange(guarded, garbage)
        for _ in range(30):
            await raw_exchange(guarded, UPGRADE)
        for header in (
            b"Sec-WebSocket-Version: 12\r\n",
            b"Content-Length: 5\r\n",
            b"X: " + b"x" * 10_000 + b"\r\n",
        ):
            await raw_exchange(guarded, UPGRADE.replace(b"\r\n\r\n", b"\r\n" + header + b"\r\n"))
    assert len(lines) == REFUSALS_PER_WINDOW
    assert caplog.records == []
    await eventually(lambda: asyncio.all_tasks() == before)
    async with connected(guarded, token_for("a")) as fake:
        assert (await fake.register("a"))["action"] == "registered"


async def test_upgrade_pipelined_after_an_unfinished_response_ends_both(node: Node) -> None:
    before = asyncio.all_tasks()
    await raw_exchange(node, b"GET /registry/events HTTP/1.1\r\nHost: x\r\n\r\n" + UPGRADE)
    await eventually(lambda: asyncio.all_tasks() == before)


async def test_several_nodes_run_in_one_loop(
    node: Node, guarded: Node, http: httpx.AsyncClient
) -> None:
    async with node_with() as third, agent(node, "a"), agent(third, "b"):
        assert [len(one.registry) for one in (node, guarded, third)] == [1, 0, 1]
        assert len({node.port, guarded.port, third.port}) == 3


async def raw_exchange(node: Node, request: bytes) -> bytes:
    """Send bytes, half-close, and return the response."""
    async with raw_socket(node) as (reader, writer):
        writer.write(request)
        writer.write_eof()
        try:
            return await reader.read()
        except ConnectionError:
            return b""
