"""A node inside another program, and as a program itself."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import httpx
import pytest

from disco import Node, NodeSettings, serve
from shared.config.tokens import Secret
from shared.errors import ConfigError, StartError
from tests.disco.harness import LIMIT_S, SECRET, agent, eventually, node_with, raw_agent, raw_socket
from tests.disco.test_disco_http import events, next_names

pytestmark = pytest.mark.anyio

PROMPTLY_S = 10.0
ROOT = Path(__file__).parents[2]


async def error_of(kind: type[Exception], **settings: object) -> str:
    """Return the message of the error with which a node refuses to start."""
    with pytest.raises(kind) as caught:
        async with serve(NodeSettings(**settings)):  # type: ignore[arg-type]
            pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_port_in_use_is_refused_and_named_in_the_error(anyio_backend: object) -> None:
    async with node_with() as node:
        message = await error_of(StartError, port=node.port)
    assert f"127.0.0.1:{node.port}" in message


@pytest.mark.message_text
async def test_error_for_a_port_in_use_suggests_another_port(anyio_backend: object) -> None:
    async with node_with() as node:
        assert "choose another port" in await error_of(StartError, port=node.port)


async def test_stopped_node_releases_its_port_although_agents_were_connected(
    reserved_port: int,
) -> None:
    async with node_with(port=reserved_port) as node, agent(node, "a"):
        pass
    async with serve(NodeSettings(port=reserved_port)) as again:
        assert again.port == reserved_port


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_address_open_to_other_machines_requires_a_secret(
    anyio_backend: object, host: str
) -> None:
    await error_of(ConfigError, host=host, port=0)


@pytest.mark.message_text
async def test_error_for_an_open_address_says_that_no_secret_is_set(anyio_backend: object) -> None:
    assert "no secret is set" in await error_of(ConfigError, host="0.0.0.0", port=0)


async def test_url_of_a_wildcard_address_uses_loopback(anyio_backend: object) -> None:
    async with node_with(host="0.0.0.0", secret=Secret(SECRET)) as node:
        assert node.url == f"ws://127.0.0.1:{node.port}"


async def test_short_secret_is_refused(anyio_backend: object) -> None:
    await error_of(ConfigError, port=0, secret=Secret("short"))


@pytest.mark.message_text
async def test_error_for_a_short_secret_has_the_minimum_length(anyio_backend: object) -> None:
    assert "at least 32 are needed" in await error_of(ConfigError, port=0, secret=Secret("short"))


UNKNOWN_HOSTS = [
    ("no such host", "no address for host"),
    ("192.0.2.1", "no such address"),  # of another machine
]


@pytest.mark.parametrize("host", [host for host, _ in UNKNOWN_HOSTS])
async def test_unknown_host_is_refused(anyio_backend: object, host: str) -> None:
    await error_of(StartError, host=host, port=0, secret=Secret(SECRET))


@pytest.mark.message_text
@pytest.mark.parametrize(("host", "text"), UNKNOWN_HOSTS)
async def test_error_for_an_unknown_host_has_the_reason(
    anyio_backend: object, host: str, text: str
) -> None:
    assert text in await error_of(StartError, host=host, port=0, secret=Secret(SECRET))


async def test_stop_promptly_ends_agents_event_streams_and_queries(
    anyio_backend: object,
) -> None:
    before = asyncio.all_tasks()
    async with anyio.create_task_group() as tasks:
        async with node_with(query_timeout_ms=60_000) as node:
            closed = [anyio.Event() for _ in range(3)]
            for number, event in enumerate(closed):
                tasks.start_soon(wait_for_close_1001, node, f"agent {number}", event)
                await node.wait_for(f"agent {number}")
            streaming, answered = anyio.Event(), anyio.Event()
            tasks.start_soon(read_all_events, f"http://{node.address.authority}", streaming)
            tasks.start_soon(query_until_answered, f"http://{node.address.authority}", answered)
            await streaming.wait()
            await eventually(lambda: node.in_flight == 1)
            started = time.monotonic()
        assert time.monotonic() - started < PROMPTLY_S
        assert len(node.registry) == 0
        for event in (*closed, answered):
            await event.wait()
    await eventually(lambda: asyncio.all_tasks() == before)


async def wait_for_close_1001(node: Node, name: str, closed: anyio.Event) -> None:
    async with agent(node, name) as fake:
        assert await fake.wait_closed() == 1001
        closed.set()


async def read_all_events(url: str, streaming: anyio.Event) -> None:
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=LIMIT_S) as http,
        events(http) as lines,
    ):
        await next_names(lines)
        streaming.set()
        async for _ in lines:
            pass


async def query_until_answered(url: str, answered: anyio.Event) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=None) as http:
        response = await http.post("/query", json={"query": "q"})
    assert response.json() == {"embryo_list": []}
    answered.set()


async def test_stop_does_not_wait_for_clients_that_stay_connected(
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


async def test_node_stops_when_the_surrounding_scope_is_cancelled(anyio_backend: object) -> None:
    before = asyncio.all_tasks()
    with anyio.CancelScope() as scope:
        async with node_with() as node, agent(node, "a"):
            scope.cancel()
            await anyio.sleep_forever()
    assert len(node.registry) == 0
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(node.host, node.port)


async def test_node_does_not_change_the_signal_handlers_of_its_program(
    anyio_backend: object,
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with node_with():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


async def test_wait_for_an_absent_agent_times_out(anyio_backend: object) -> None:
    async with node_with() as node:
        with pytest.raises(TimeoutError):
            await node.wait_for("a", timeout_s=0.01)


STANDALONE = """
import anyio
from disco import NodeSettings
from disco.main import run

async def main():
    await run(NodeSettings(port=0), announce=lambda node: print(node.url, flush=True))

anyio.run(main, backend_options={"use_uvloop": True})
print("done")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_standalone_node_serves_until_it_is_signalled(
    anyio_backend: object, number: signal.Signals
) -> None:
    with anyio.fail_after(LIMIT_S):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            STANDALONE,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        url = (await process.stdout.readline()).decode().strip()
        async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S) as http:
            assert (await http.get(f"http{url.removeprefix('ws')}/registry")).json() == {
                "agents": []
            }
        process.send_signal(number)
        output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (0, b"done\n", b"")


FLOODED = """
import anyio
import disco._log
from disco import NodeSettings
from disco.main import run
from shared.logs import logger

def flood(node):
    for _ in range(disco._log.REFUSALS_PER_WINDOW + 3):
        node._hub.log.refused("no token")

disco._log.WINDOW_S = 0.5
logger.configure("info", "json")
anyio.run(lambda: run(NodeSettings(port=0), announce=flood))
"""


async def test_standalone_node_reports_suppressed_events_after_a_burst(
    anyio_backend: object,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        FLOODED,
        cwd=ROOT,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    line = {}
    try:
        with anyio.fail_after(20):
            while line.get("event") != "repeated":
                line = json.loads(await process.stderr.readline())
    finally:
        process.kill()
        await process.communicate()
    assert (line["what"], line["suppressed"]) == ("agent_refused", 3)
