"""`worker.node.client`: the choice among a node's addresses, and the delay between attempts."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import NodeAddress
from shared.config.schema import ConnectionSection
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.handler import load
from worker.memory.base import Memory
from worker.node import client
from worker.node.losses import Loss, LossKind

pytestmark = pytest.mark.anyio


async def test_reconnect_delays_spread_over_the_last_fifth_of_the_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delays: list[float] = []

    async def refuse(self: client.NodeClient, token: str | None) -> None:
        raise OSError("refused")

    async def record(delay_s: float) -> None:
        delays.append(delay_s)
        if len(delays) == 200:
            scope.cancel()
        await anyio.lowlevel.checkpoint()

    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    agent = Agent(
        name="a",
        handler=handler,
        nodes=(),
        connection=ConnectionSection(reconnect_interval_ms=1000),
    )
    spec = WorkerSpec(name="a_server", agent=agent, node=NodeAddress("localhost", 9, False))
    dispatcher = create_dispatcher(load(handler), Memory())
    monkeypatch.setattr(client.NodeClient, "_connect", refuse)
    monkeypatch.setattr(client.anyio, "sleep", record)
    with anyio.CancelScope() as scope:
        await client.NodeClient(spec, (), dispatcher, lambda *_: None).run()
    assert all(0.8 <= delay_s <= 1.0 for delay_s in delays), "no delay exceeds the interval"
    assert max(delays) - min(delays) > 0.15, "the delays differ"


@pytest.mark.parametrize("unreachable", ["refuses", "does not answer"])
async def test_client_connects_to_the_address_of_a_host_that_is_reachable(
    unreachable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        connected.set()
        await stream.aclose()

    with (
        socket.create_server(("127.0.0.2", 0), backlog=0) as silent,
        contextlib.ExitStack() as backlog,
    ):
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        address = ("127.0.0.3", 1)
        # No program accepts there, and the backlog is full.
        if unreachable == "does not answer":
            address = silent.getsockname()
            for _ in range(3):
                pending = backlog.enter_context(socket.socket())
                pending.setblocking(False)
                pending.connect_ex(address)

        async def resolve(self: client.NodeClient) -> list[tuple[Any, ...]]:
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*kind, address), (*kind, ("127.0.0.1", port))]

        monkeypatch.setattr(client.NodeClient, "_resolve", resolve)
        spec = spec_for("somewhere.example", port)
        dispatcher = create_dispatcher(load(spec.agent.handler), Memory())
        node_client = client.NodeClient(spec, (), dispatcher, lambda *_: None)
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            tasks.start_soon(node_client.run)
            with anyio.fail_after(60):
                await connected.wait()
            tasks.cancel_scope.cancel()


async def loss_when_all_addresses_refuse(monkeypatch: pytest.MonkeyPatch) -> Loss:
    """Return the loss that is reported after the first attempt."""

    async def resolve(self: client.NodeClient) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 1))
            for host in ("127.0.0.1", "127.0.0.2")
        ]

    monkeypatch.setattr(client.NodeClient, "_resolve", resolve)
    spec = spec_for("somewhere.example", 1)
    dispatcher = create_dispatcher(load(spec.agent.handler), Memory())
    states: list[tuple[str, Loss | None]] = []
    node_client = client.NodeClient(
        spec, (), dispatcher, lambda state, loss: states.append((state, loss))
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(node_client.run)
        with anyio.fail_after(60):
            while len(states) < 2:  # noqa: ASYNC110 - a list has no event
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    state, loss = states[1]
    assert state == "backoff"
    assert loss is not None
    return loss


async def test_one_reason_is_reported_when_all_addresses_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = await loss_when_all_addresses_refuse(monkeypatch)
    assert loss.kind is LossKind.CONNECT_FAILED


@pytest.mark.message_text
async def test_message_for_a_refused_connection_names_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss = await loss_when_all_addresses_refuse(monkeypatch)
    assert loss.reason == "cannot connect to somewhere.example:1: Connection refused"


def spec_for(host: str, port: int) -> WorkerSpec:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    options = ConnectionSection(reconnect_interval_ms=1000)
    agent = Agent(name="a", handler=handler, nodes=(), connection=options)
    return WorkerSpec(name="a_server", agent=agent, node=NodeAddress(host, port, False))
