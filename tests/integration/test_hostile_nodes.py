"""Hostile nodes: the worker keeps running with its memory, and other workers are not affected."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode

from disco import Node
from tests.cluster import TIMEOUT_S, Cluster, agent, cluster, until
from tests.integration.wire import AGENT_REGISTERED, Script, Wire, scripted

pytestmark = pytest.mark.anyio

QUERY = {"action": "query", "id": "after", "body": "are you there?"}


async def _finish_with_a_query(wire: Wire) -> None:
    """Check that the worker answers a valid query on this connection."""
    await wire.send(QUERY)
    while (answer := await wire.json())["id"] != "after":
        pass
    assert answer["data"]["properties"]["body"] == "are you there?"
    await wire.until_gone()


def ignored(*texts: bytes) -> Script:
    async def script(wire: Wire) -> None:
        await wire.register()
        for text in texts:
            await wire.text(text)
        await _finish_with_a_query(wire)

    return script


def echoed(query_id: Any, body: Any) -> Script:
    async def script(wire: Wire) -> None:
        await wire.register()
        await wire.send({"action": "query", "id": query_id, "body": body, "extra": [1]})
        answer = await wire.json()
        assert answer["action"] == "result"
        assert answer["id"] == query_id
        expected = body if isinstance(body, str) else json.dumps(body)
        assert answer["data"]["properties"]["body"] == expected
        await _finish_with_a_query(wire)

    return script


async def query_without_body(wire: Wire) -> None:
    await wire.register()
    await wire.send({"action": "query", "id": 7})
    assert await wire.json() == {"action": "result", "id": 7, "data": None}
    await _finish_with_a_query(wire)


async def values_that_python_cannot_represent(wire: Wire) -> None:
    await wire.register()
    await wire.text(b'{"action":"query","id":1,"body":1e999}')
    assert (await wire.json())["data"]["properties"]["body"] == "1e999"
    await wire.text(b'{"action":"query","id":"\\ud800","body":"x","status":1e999}')
    assert (await wire.frame(Opcode.TEXT)).data == b'{"action":"result","id":"\\ud800","data":null}'
    await wire.text(b'{"action":"query","id":3,"body":"\\ud800"}')
    assert await wire.json() == {"action": "result", "id": 3, "data": None}
    await _finish_with_a_query(wire)


async def closes_together_with_the_upgrade(wire: Wire) -> None:
    wire.request = await wire._event()
    wire.protocol.send_response(wire.protocol.accept(wire.request))
    wire.protocol.send_close(1000, "go away")
    wire.writer.write(b"".join(wire.protocol.data_to_send()))
    await wire.until_gone()


async def text_in_fragments(wire: Wire) -> None:
    await wire.register()
    text = json.dumps(
        {"action": "query", "id": "f", "body": "in ünit parts"}, ensure_ascii=False
    ).encode()
    wire.protocol.send_text(text[:1], fin=False)
    for byte in text[1:-1]:
        wire.protocol.send_continuation(bytes([byte]), fin=False)
        wire.protocol.send_ping(b"between")
    wire.protocol.send_continuation(text[-1:], fin=True)
    await wire.flush()
    answer = await wire.json()
    assert answer["data"]["properties"]["body"] == "in ünit parts"
    await _finish_with_a_query(wire)


async def binary_frames(wire: Wire) -> None:
    await wire.register()
    wire.protocol.send_binary(json.dumps(QUERY).encode())
    wire.protocol.send_binary(b"\x00\xff", fin=False)
    wire.protocol.send_continuation(b"\x01", fin=True)
    await wire.flush()
    await _finish_with_a_query(wire)


async def query_before_the_handshake_is_answered(wire: Wire) -> None:
    await wire.upgrade()
    await wire.text(b"{}")
    await wire.send({"action": "query", "id": "early", "body": "x"})
    assert (await wire.json())["action"] == "register"
    assert (await wire.json())["action"] == "agent_hello"
    assert (await wire.json())["id"] == "early"
    await wire.send(AGENT_REGISTERED)
    await _finish_with_a_query(wire)


async def oversized_frame(wire: Wire) -> None:
    await wire.register()
    await wire.raw(b"\x81\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * 1000)
    close = await wire.frame(Opcode.CLOSE)
    assert int.from_bytes(close.data[:2], "big") == 1009
    await wire.until_gone()


async def oversized_message_in_fragments(wire: Wire) -> None:
    await wire.register()
    wire.protocol.send_text(b"x" * 1000, fin=False)
    for _ in range(40):
        wire.protocol.send_continuation(b"x" * 1000, fin=False)
    await wire.flush()
    close = await wire.frame(Opcode.CLOSE)
    assert int.from_bytes(close.data[:2], "big") == 1009
    await wire.until_gone()


async def text_that_is_not_utf8(wire: Wire) -> None:
    await wire.register()
    await wire.text(b'{"action":"query","id":"\xff","body":"x"}')
    close = await wire.frame(Opcode.CLOSE)
    assert int.from_bytes(close.data[:2], "big") == 1007
    await wire.until_gone()


async def close_in_the_middle_of_a_frame(wire: Wire) -> None:
    await wire.register()
    await wire.raw(Frame(Opcode.TEXT, json.dumps(QUERY).encode()).serialize(mask=False)[:-5])


async def garbage_after_the_upgrade(wire: Wire) -> None:
    await wire.register()
    await wire.raw(os.urandom(4096))
    await wire.until_gone()


async def masked_frame(wire: Wire) -> None:
    await wire.register()
    await wire.raw(Frame(Opcode.TEXT, b"{}").serialize(mask=True))
    await wire.until_gone()


def instead_of_the_upgrade(answer: bytes) -> Script:
    async def script(wire: Wire) -> None:
        await wire.reader.readuntil(b"\r\n\r\n")
        await wire.raw(answer)

    return script


async def accepts_and_sends_nothing(wire: Wire) -> None:
    await wire.reader.read(-1)


async def upgrades_and_sends_nothing(wire: Wire) -> None:
    await wire.upgrade()
    await wire.reader.read(-1)


async def answers_no_ping(wire: Wire) -> None:
    await wire.register()
    await wire.reader.read(-1)


async def closes_right_after_registered(wire: Wire) -> None:
    await wire.upgrade()
    await wire.json()
    await wire.send({"status": "ok", "action": "registered"})
    wire.protocol.send_close(1000)
    await wire.flush()


async def resets(wire: Wire) -> None:
    await wire.register()
    wire.writer.transport.abort()


def refuses(reply: dict[str, Any]) -> Script:
    async def script(wire: Wire) -> None:
        await wire.upgrade()
        await wire.json()
        await wire.send(reply)
        await wire.until_gone()

    return script


async def floods_pings_and_reads_nothing(wire: Wire) -> None:
    await wire.register()
    for _ in range(1000):
        await wire.raw(Frame(Opcode.PING, b"x" * 125).serialize(mask=False) * 500)


STAYS = {
    "malformed JSON": (
        ignored(b"{", b"nonsense", b"", b"[1,2]", b"42", b'"x"', b'{"a":' * 5000),
        "malformed",
    ),
    "unknown actions": (ignored(b'{"action":"dance"}', b'{"action":[1]}', b"{}"), "unknown_action"),
    "errors once ready": (
        ignored(b'{"error":"unknown_action"}', b'{"status":"error"}'),
        "error_frame",
    ),
    "a query without an id": (ignored(b'{"action":"query","body":"x"}'), "query_without_id"),
    "a query without a body": (query_without_body, "query_without_body"),
    "an id that is a number": (echoed(1.5e300, "x"), None),
    "an id that is null": (echoed(None, "x"), None),
    "an id that is an object": (echoed({"a": [1, {"b": None}]}, "x"), None),
    "an id that is a long text": (echoed("é" * 3000, "x"), None),
    "a body that is an object": (echoed("i", {"a": 1}), None),
    "a body that is null": (echoed("i", None), None),
    "a body that is a number": (echoed("i", 12.5), None),
    "a body of any text": (echoed("i", ' \n\t "quoted" \\ ☃ \u0000 '), None),
    "values that Python cannot represent": (values_that_python_cannot_represent, "malformed"),
    "text in fragments": (text_in_fragments, None),
    "binary frames": (binary_frames, "binary"),
    "frames before the handshake is answered": (
        query_before_the_handshake_is_answered,
        "unknown_action",
    ),
}

LOSES = {
    "an oversized frame": (oversized_frame, "1009"),
    "an oversized message in fragments": (oversized_message_in_fragments, "1009"),
    "text that is not UTF-8": (text_that_is_not_utf8, "not UTF-8"),
    "a close in the middle of a frame": (close_in_the_middle_of_a_frame, "connection"),
    "garbage after the upgrade": (garbage_after_the_upgrade, "1002"),
    "a masked frame": (masked_frame, "1002"),
    "a redirect": (
        instead_of_the_upgrade(
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
        ),
        "redirects (302)",
    ),
    "a 500": (
        instead_of_the_upgrade(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nOops"),
        "answered 500",
    ),
    "a 401": (
        instead_of_the_upgrade(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"),
        "refused the token (401)",
    ),
    "a 429": (instead_of_the_upgrade(b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n"), "429"),
    "an upgrade without its key": (
        instead_of_the_upgrade(
            b"HTTP/1.1 101 Yes\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        ),
        "not em_disco",
    ),
    "garbage instead of the upgrade": (
        instead_of_the_upgrade(os.urandom(512) + b"\r\n\r\n"),
        "not em_disco",
    ),
    "an endless header": (
        instead_of_the_upgrade(b"HTTP/1.1 101 Yes\r\nA: " + b"x" * 100_000),
        "not em_disco",
    ),
    "silence after the accept": (accepts_and_sends_nothing, "did not answer the upgrade"),
    "silence after the upgrade": (upgrades_and_sends_nothing, "did not register"),
    "no answer to a ping": (answers_no_ping, "no ping"),
    "a flood of pings whose pongs it does not read": (floods_pings_and_reads_nothing, "no ping"),
    "a close right after registered": (closes_right_after_registered, "1000"),
    "a close together with the upgrade": (closes_together_with_the_upgrade, "go away"),
    "a reset": (resets, "connection"),
    "name_mismatch": (
        refuses({"status": "error", "reason": "name_mismatch"}),
        "name_mismatch: the token was issued",
    ),
    "an error in the form of em_disco": (
        refuses({"error": "must register before agent_hello"}),
        "must register",
    ),
    "an error of no known form": (
        refuses({"error": {"a": [1] * 1000}}),
        "refused the registration",
    ),
}

# Long timeouts: on a busy machine the workers would reconnect for another reason.
CONNECTION = """
reconnect_interval_ms = 30
upgrade_timeout_ms = 30000
ping_interval_ms = 30000
max_frame_bytes = 32768
"""
TIMEOUTS = ("did not answer the upgrade", "did not register", "no ping")
SHORT_TIMEOUTS = {"upgrade_timeout_ms": 250, "ping_interval_ms": 250}


async def _assert_unharmed(
    running: Cluster, before: dict[str, Any], asked: int, neighbour: str
) -> None:
    """Check that the worker's process and memory are the same, and the other worker is ready."""
    after = await running.row(before["name"])
    assert after["pid"] == before["pid"]
    assert after["restarts"] == 0
    found = await running.results("x", worker=before["name"])
    assert found["properties"]["count"] >= asked + 1
    row = await running.row(neighbour)
    assert (row["state"], row["connection_failures"], row["restarts"]) == ("ready", 0, 0)


@pytest.mark.parametrize("name", STAYS)
async def test_worker_stays_connected_after(name: str, tmp_path: Path, node: Node) -> None:
    script, kind = STAYS[name]
    done = anyio.Event()

    async def first(wire: Wire) -> None:
        try:
            await script(wire)
        finally:
            done.set()

    async with (
        scripted(first) as (bad, url),
        cluster(tmp_path, agent("count", [node.url, url]), connection=CONNECTION) as running,
    ):
        await running.wait_state("count_server", "ready")
        before = await running.wait_state("count_server_2", "ready")
        await running.results("one", worker="count_server_2")

        async def counted() -> bool:
            row = await running.row("count_server_2")
            return row["queries_node"] >= 1 and (kind is None or row["ignored"].get(kind, 0) >= 1)

        await until(counted, "the frames are counted")
        assert bad.connections == 1
        await _assert_unharmed(running, before, 1, "count_server")
        if kind is not None:
            lines = [line for line in running.events("frames_ignored") if line["kind"] == kind]
            assert len(lines) == 1, "only the first frame is logged"
        assert "Traceback" not in running.log
        await running.stop()
        await done.wait()


@pytest.mark.message_text
@pytest.mark.parametrize("name", LOSES)
async def test_worker_reconnects_after(name: str, tmp_path: Path, node: Node) -> None:
    script, text = LOSES[name]
    # On a busy machine a short timeout may first end the connection at another step. So the node
    # repeats the script until the worker has reported the expected reason.
    repeats = text in TIMEOUTS
    reported, recovered = anyio.Event(), anyio.Event()

    async def then(wire: Wire) -> None:
        if repeats and not reported.is_set():
            await script(wire)
        else:
            await wire.register()
            recovered.set()
            await wire.until_gone()

    async with scripted(script, then) as (_, url):
        agents = [
            agent("calm", [node.url]),
            agent("count", [url], **SHORT_TIMEOUTS if repeats else {}),
        ]
        async with cluster(tmp_path, *agents, connection=CONNECTION) as running:
            await running.wait_state("calm_server", "ready")
            before = await running.wait_up("count_server")
            await running.results("one", worker="count_server")

            async def is_in_the_row() -> bool:
                return text in (await running.row("count_server"))["last_error"]

            await until(is_in_the_row, f"the worker reports the reason\n{running.log}")
            reported.set()
            with anyio.fail_after(TIMEOUT_S):
                await recovered.wait()
            await running.wait_state("count_server", "ready")
            await _assert_unharmed(running, before, 1, "calm_server")
            reasons = [event["reason"] for event in running.events("backoff")]
            assert text in (" ".join(reasons) if repeats else reasons[0])
            assert "Traceback" not in running.log


async def test_pings_are_answered_while_the_handler_blocks(
    tmp_path: Path,
) -> None:
    handlers = f"""
import pathlib, time
gate = pathlib.Path({str(tmp_path / "gate")!r})
def handle(body, memory):
    while body == "block" and not gate.exists():
        time.sleep(0.005)
    return body, memory
"""
    pongs, order = 0, []

    async def script(wire: Wire) -> None:
        nonlocal pongs
        await wire.register()
        for number, body in enumerate(["block", *map(str, range(50))]):
            await wire.send({"action": "query", "id": number, "body": body})
        for _ in range(20):
            wire.protocol.send_ping(b"there?")
            await wire.flush()
            frame = await wire.frame(Opcode.PONG, Opcode.TEXT)
            assert frame.opcode is Opcode.PONG, (
                "only the pings are answered while the handler blocks"
            )
            pongs += 1
        (tmp_path / "gate").touch()
        for _ in range(51):
            order.append((await wire.json())["id"])
        await wire.until_gone()

    async with (
        scripted(script) as (_, url),
        cluster(tmp_path, agent("slow", [url]), handlers=handlers),
    ):
        await until(lambda: len(order) == 51, "all queries are answered")
    assert pongs == 20
    assert order == list(range(51))


async def test_flooding_node_is_read_no_faster_than_the_handler_works(tmp_path: Path) -> None:
    import psutil

    handlers = f"""
import pathlib, time
gate = pathlib.Path({str(tmp_path / "gate")!r})
def handle(body, memory):
    while not gate.exists():
        time.sleep(0.005)
    return None, memory
"""
    sent = answered = 0
    total = 60_000

    async def script(wire: Wire) -> None:
        nonlocal sent, answered
        await wire.register()

        async def blast() -> None:
            nonlocal sent
            frame = Frame(
                Opcode.TEXT, json.dumps({"action": "query", "id": 1, "body": "x" * 2000}).encode()
            )
            data = frame.serialize(mask=False)
            for _ in range(total // 100):
                await wire.raw(data * 100)
                sent += 100

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(blast)
            for _ in range(total):
                await wire.json()
                answered += 1
        await wire.until_gone()

    async with (
        scripted(script) as (_, url),
        cluster(tmp_path, agent("slow", [url]), handlers=handlers) as running,
    ):
        await running.wait_ready()
        pid = await running.worker_pid("slow_server")
        previous = -1

        def stalled() -> bool:
            nonlocal previous
            is_stalled, previous = sent > 1000 and sent == previous, sent
            return is_stalled

        for _ in range(20):  # until the buffers of the sockets are full
            await until(stalled, "the node can send no more")
        assert sent < total
        assert psutil.Process(pid).memory_info().rss < 150 * 1024 * 1024
        (tmp_path / "gate").touch()
        await until(lambda: answered == total, "all queries are answered", 2 * TIMEOUT_S)
        assert (await running.row("slow_server"))["connection_failures"] == 0


async def test_drained_worker_closes_its_socket_as_going_away(tmp_path: Path) -> None:
    closes: list[int] = []

    async def script(wire: Wire) -> None:
        await wire.register()
        closes.append(int.from_bytes((await wire.frame(Opcode.CLOSE)).data[:2], "big"))
        await wire.until_gone()

    async with scripted(script) as (_, url), cluster(tmp_path, agent("count", [url])) as running:
        await running.wait_ready()
        assert await running.stop() == 0
    assert closes == [1001]


async def test_flapping_node_causes_few_log_lines(tmp_path: Path) -> None:
    flaps = 0

    async def script(wire: Wire) -> None:
        nonlocal flaps
        # At the end of the test the worker closes first.
        with contextlib.suppress(InvalidState):
            await wire.register()
            flaps += 1
            wire.protocol.send_close(4000, f"word {flaps}")
        await wire.flush()
        await wire.until_gone()

    options = "reconnect_interval_ms = 10"
    async with (
        scripted(script, script) as (_, url),
        cluster(tmp_path, agent("a", [url]), connection=options) as running,
    ):
        await until(lambda: flaps >= 50, "the node has closed 50 connections")
        assert len(running.events("backoff")) <= 2
        assert len(running.events("ready")) <= 2

        async def counted() -> bool:
            return (await running.row("a_server"))["connection_failures"] >= 40

        await until(counted, "the runner has counted the failures")
