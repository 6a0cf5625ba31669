"""A node's life inside another program, and alone."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import httpx
import pytest

from disco import Node, NodeSettings, serve
from shared.errors import ConfigError, StartError
from shared.tokens import Secret
from tests.disco.harness import SECRET, agent, eventually, node_with, raw_agent, raw_socket
from tests.disco.test_disco_http import events, next_names

pytestmark = pytest.mark.anyio

PROMPTLY_S = 0.9
ROOT = Path(__file__).parents[2]


async def refused(**settings: object) -> str:
    with pytest.raises((ConfigError, StartError)) as caught:
        async with serve(NodeSettings(**settings)):  # type: ignore[arg-type]
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_port_in_use_says_what_to_do(anyio_backend: object) -> None:
    async with node_with() as node:
        said = await refused(port=node.port)
    assert f"127.0.0.1:{node.port}" in said
    assert "choose another port" in said


async def test_stopped_node_gives_its_port_back_though_agents_were_connected(held_port: int) -> None:
    async with node_with(port=held_port) as node, agent(node, "a"):
        pass
    async with serve(NodeSettings(port=held_port)) as again:
        assert again.port == held_port


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_address_open_to_others_needs_a_secret(anyio_backend: object, host: str) -> None:
    assert "no secret is set" in await refused(host=host, port=0)


async def test_address_open_to_others_is_reached_by_loopback(anyio_backend: object) -> None:
    async with node_with(host="0.0.0.0", secret=Secret(SECRET)) as node:
        assert node.url == f"ws://127.0.0.1:{node.port}"


async def test_secret_that_is_too_short_is_refused(anyio_backend: object) -> None:
    assert "at least 32 are needed" in await refused(port=0, secret=Secret("short"))


async def test_host_that_does_not_exist_is_refused(anyio_backend: object) -> None:
    assert "no address for host" in await refused(host="no such host", port=0)
    assert "no such address" in await refused(host="192.0.2.1", port=0, secret=Secret(SECRET))


async def test_stop_closes_agents_with_1001_and_ends_event_streams_and_queries_promptly(anyio_backend: object) -> None:
    before = asyncio.all_tasks()
    async with anyio.create_task_group() as tasks:
        async with node_with(query_timeout_ms=60_000) as node:
            closed = [anyio.Event() for _ in range(3)]
            for number, event in enumerate(closed):
                tasks.start_soon(be_told_1001, node, f"agent {number}", event)
                await node.wait_for(f"agent {number}")
            streaming, asked = anyio.Event(), anyio.Event()
            tasks.start_soon(read_events_to_the_end, node.http_url, streaming)
            tasks.start_soon(ask_to_the_end, node.http_url, asked)
            await streaming.wait()
            await eventually(lambda: node.in_flight == 1)
            started = time.monotonic()
        assert time.monotonic() - started < PROMPTLY_S
        assert len(node.registry) == 0
        for event in (*closed, asked):
            await event.wait()
    await eventually(lambda: asyncio.all_tasks() == before)


async def be_told_1001(node: Node, name: str, told: anyio.Event) -> None:
    async with agent(node, name) as fake:
        assert await fake.closed() == 1001
        told.set()


async def read_events_to_the_end(url: str, streaming: anyio.Event) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http, events(http) as lines:
        await next_names(lines)
        streaming.set()
        async for _ in lines:
            pass


async def ask_to_the_end(url: str, answered: anyio.Event) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=None) as http:
        response = await http.post("/query", json={"query": "q"})
    assert response.json() == {"embryo_list": []}
    answered.set()


async def test_stop_does_not_wait_for_clients_that_do_not_part(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    async with AsyncExitStack() as clients:
        async with node_with() as node:
            await clients.enter_async_context(raw_agent(node))
            for unfinished in (
                b"",
                b"GET /registry HTTP/1.1\r\n",
                b"POST /query HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
                b"GET /registry/events HTTP/1.1\r\nHost: x\r\n\r\n",
            ):
                _, writer = await clients.enter_async_context(raw_socket(node))
                writer.write(unfinished)
            await eventually(lambda: len(asyncio.all_tasks()) >= len(before) + 2)
            started = time.monotonic()
        assert time.monotonic() - started < PROMPTLY_S
        assert asyncio.all_tasks() == before
    assert caplog.records == []


async def test_node_stops_when_what_surrounds_it_is_cancelled(anyio_backend: object) -> None:
    before = asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with node_with() as node, agent(node, "a"):
            scope.cancel()
            await anyio.sleep_forever()
    assert len(node.registry) == 0
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(node.host, node.port)


async def test_node_leaves_the_signals_of_its_program_alone(anyio_backend: object) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with node_with():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


async def test_wait_for_an_agent_that_does_not_come_times_out(anyio_backend: object) -> None:
    async with node_with() as node:
        with pytest.raises(TimeoutError):
            await node.wait_for("a", timeout_s=0.01)


ALONE = """
import anyio
from disco import NodeSettings
from disco.main import run

async def main():
    await run(NodeSettings(port=0), announce=lambda node: print(node.url, flush=True))

anyio.run(main, backend_options={"use_uvloop": True})
print("done")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_node_alone_serves_until_it_is_told_to_stop(anyio_backend: object, number: signal.Signals) -> None:
    with anyio.fail_after(20):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", ALONE, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"http{url.removeprefix('ws')}/registry")).json() == {"agents": []}
        process.send_signal(number)
        output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (0, b"done\n", b"")
