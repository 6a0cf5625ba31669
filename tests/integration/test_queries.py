"""Queries over WebSocket and HTTP, through real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest

from disco import Node
from tests.cluster import TIMEOUT_S, agent, cluster, keep_alive_connection, until
from tests.integration.wire import Wire, scripted

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_every_query_is_answered_once_under_load_from_both_sides(
    kind: str, tmp_path: Path
) -> None:
    handlers = f"""
{kind} handle(body, memory):
    count = memory.get("count", 0) + 1
    return {{"type": "t", "properties": {{"body": body, "count": count}}}}, {{"count": count}}
"""
    total, burst = 10_000, 64
    by_node: dict[int, tuple[str, int]] = {}
    by_http: list[tuple[int, str, int]] = []
    done = anyio.Event()

    async def script(wire: Wire) -> None:
        await wire.register()
        for start in range(0, total, burst):
            numbers = range(start, min(start + burst, total))
            for number in numbers:
                query = {"action": "query", "id": number, "body": f"w{number}"}
                wire.protocol.send_text(json.dumps(query).encode())
            await wire.flush()
            for _ in numbers:
                answer = await wire.json()
                assert answer["action"] == "result"
                assert answer["id"] not in by_node, "answered twice"
                properties = answer["data"]["properties"]
                by_node[answer["id"]] = (properties["body"], properties["count"])
        done.set()
        await wire.until_gone()

    async with (
        scripted(script) as (_, url),
        cluster(tmp_path, agent("count", [url]), handlers=handlers) as running,
    ):
        await running.wait_up("count_server")
        left = iter(range(total))

        async def client() -> None:
            async with keep_alive_connection(running) as ask:
                for number in left:
                    found = (await ask(f"h{number}"))["properties"]
                    by_http.append((number, found["body"], found["count"]))

        async with anyio.create_task_group() as tasks:
            for _ in range(64):
                tasks.start_soon(client)
        with anyio.fail_after(TIMEOUT_S):
            await done.wait()
        last = await running.results("last")
    assert last["properties"]["count"] == 2 * total + 1
    assert {number: f"w{number}" for number in range(total)} == {
        n: body for n, (body, _) in by_node.items()
    }
    assert sorted(number for number, _, _ in by_http) == list(range(total))
    assert all(body == f"h{number}" for number, body, _ in by_http)
    counts = [count for _, count in by_node.values()] + [count for _, _, count in by_http]
    assert sorted(counts) == list(range(1, 2 * total + 1)), "each query is counted once"


FAILING = """
import json

def handle(body, memory):
    memory["touched"] = memory.get("touched", 0) + 1
    memory.setdefault("nested", []).append(body)
    if body == "raise":
        raise ValueError("a secret of the handler")
    if body == "exit":
        raise SystemExit(3)
    if body == "set":
        return object(), memory
    if body == "shape":
        return [1]
    return dict(memory), memory
"""


async def test_exception_of_a_handler_fails_only_its_own_query(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("fail", [node.url]), handlers=FAILING) as running:
        await running.wait_ready()
        pid = await running.worker_pid("fail_server")
        assert await running.results("one") == {"touched": 1, "nested": ["one"]}
        for bad in ("raise", "exit", "set", "shape"):
            answer = await running.ask(bad)
            assert answer.status_code == 500
            refusal = {"error": "handler_failed", "code": "handler_failed"}
            assert answer.json() == refusal, "clients do not get the text of the exception"
        assert await node.query("raise") == []
        assert await running.results("two") == {"touched": 2, "nested": ["one", "two"]}
        assert await running.worker_pid("fail_server") == pid

        async def counted() -> bool:
            return (await running.row("fail_server"))["errors"] == 5

        await until(counted, "the failures are counted")
        assert "shape" not in (await running.row("fail_server"))["last_error"]
        await running.stop()
        failures = running.events("handler_failed")
        assert len(failures) == 4, "each kind of failure is logged once"
        assert "Traceback" in failures[0]["exception"]
        assert "a secret of the handler" in failures[0]["exception"]


async def test_node_gets_null_for_a_failed_query(tmp_path: Path) -> None:
    answers: list[Any] = []

    async def script(wire: Wire) -> None:
        await wire.register()
        for body in ("raise", "exit", "set", "shape", "good"):
            await wire.send({"action": "query", "id": body, "body": body})
            answers.append(await wire.json())
        await wire.until_gone()

    async with (
        scripted(script) as (_, url),
        cluster(tmp_path, agent("fail", [url]), handlers=FAILING),
    ):
        await until(lambda: len(answers) == 5, "all queries are answered")
    for answer, body in zip(answers[:4], ("raise", "exit", "set", "shape"), strict=True):
        assert answer == {"action": "result", "id": body, "data": None}
    assert answers[4]["data"]["touched"] == 1


async def test_results_have_the_form_of_em_filter(tmp_path: Path) -> None:
    handlers = """
RESULTS = {
    "list": [{"type": "t"}], "text": "plain", "json text": '[{"a":1}]', "bytes": b'{"a":[1, 2]}',
    "null": None, "number": 1.5, "bad bytes": b"{nonsense",
}
def handle(body, memory):
    return RESULTS[body], memory
"""
    to_node: dict[str, Any] = {}
    names = ["list", "text", "json text", "bytes", "null", "number", "bad bytes"]

    async def script(wire: Wire) -> None:
        await wire.register()
        for name in names:
            await wire.send({"action": "query", "id": name, "body": name})
            to_node[name] = (await wire.json())["data"]
        await wire.until_gone()

    async with (
        scripted(script) as (_, url),
        cluster(tmp_path, agent("r", [url]), handlers=handlers) as running,
    ):
        await running.wait_ready()
        by_http = {name: (await running.ask(name)).text for name in names}
        await until(lambda: len(to_node) == len(names), "the node has all results")
    assert by_http == {
        "list": '{"results":[{"type":"t"}]}',
        "text": '{"results":"plain"}',
        "json text": '{"results":[{"a":1}]}',
        "bytes": '{"results":{"a":[1, 2]}}',
        "null": '{"results":null}',
        "number": '{"results":1.5}',
        "bad bytes": '{"error":"handler_failed","code":"handler_failed"}',
    }
    assert to_node == {
        "list": [{"type": "t"}],
        "text": "plain",
        "json text": '[{"a":1}]',
        "bytes": {"a": [1, 2]},
        "null": None,
        "number": 1.5,
        "bad bytes": None,
    }


async def test_queries_of_both_transports_share_one_memory(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        counts = []
        for _ in range(3):
            counts.append((await running.results("h"))["properties"]["count"])
            counts.append((await node.query("w"))[0]["properties"]["count"])
        assert counts == [1, 2, 3, 4, 5, 6]


async def test_concurrent_queries_run_at_once_without_a_memory(tmp_path: Path, node: Node) -> None:
    handlers = """
import asyncio, threading
met = asyncio.Event()
here = 0
barrier = threading.Barrier(4, timeout=25)
async def on_the_loop(body, memory):
    global here
    here += 1
    if here == 4:
        met.set()
    await met.wait()
    return memory, {"kept": True}
def on_threads(body, memory):
    barrier.wait()
    return memory, {"kept": True}
"""
    options = {"memory": "none", "concurrency": 4}
    async with cluster(
        tmp_path,
        agent("loop", [node.url], handler="handlers.py:on_the_loop", **options),
        agent("threads", [node.url], handler="handlers.py:on_threads", **options),
        handlers=handlers,
    ) as running:
        await running.wait_ready()
        found = []

        async def ask(name: str) -> None:
            found.append(await running.results("x", agent=name))

        async with anyio.create_task_group() as tasks:
            for name in ["loop", "threads"] * 4:
                tasks.start_soon(ask, name)
        assert found == [{}] * 8


async def test_setup_runs_before_and_close_after_the_queries(tmp_path: Path, node: Node) -> None:
    handlers = """
import pathlib, threading
class Agent:
    def capabilities(self):
        return ["own"]
    def setup(self):
        self.thread = threading.current_thread().name
    def handle(self, body, memory):
        return [self.thread, threading.current_thread().name], memory
    def close(self):
        pathlib.Path("closed").write_text(threading.current_thread().name)
"""
    async with cluster(
        tmp_path, agent("a", [node.url], handler="handlers.py:Agent"), handlers=handlers
    ) as running:
        await running.wait_ready()
        assert [found.capabilities for found in node.registry.agents()] == [("own",)]
        here = await running.results("x")
        assert here[0] == here[1]
        assert await running.stop() == 0
        assert (tmp_path / "closed").read_text() == here[0]


async def test_failed_setup_is_logged_and_tried_again(tmp_path: Path, node: Node) -> None:
    handlers = """
import pathlib
class Agent:
    def setup(self):
        if not pathlib.Path("open").exists():
            raise OSError("the database is closed")
    def handle(self, body, memory):
        return body, memory
"""
    async with cluster(
        tmp_path, agent("a", [node.url], handler="handlers.py:Agent"), handlers=handlers
    ) as running:

        async def is_in_the_row() -> bool:
            return "the database is closed" in (await running.row("a_server"))["last_error"]

        await until(is_in_the_row, "the failure is shown")
        assert running.events("worker_ended_itself")
        assert not running.events("worker_fault"), "the failure of a handler is not a crash"
        (tmp_path / "open").touch()
        await running.wait_ready()
        assert await running.results("x") == "x"
