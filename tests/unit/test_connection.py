"""`worker.connection`: which of a node's addresses it takes, and how long it waits between two attempts."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import pytest

from shared.config import Agent, Connection, WorkerSpec
from shared.handlers import HandlerRef
from shared.ipc import Counters
from shared.nodes import NodeAddress
from worker import connection
from worker.dispatchers import dispatcher_for
from worker.handler import load
from worker.memory import NoMemory

pytestmark = pytest.mark.anyio


async def test_delays_are_spread_over_the_last_fifth_of_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def refuse(self: connection.Connection, token: str | None) -> None:
        raise OSError("refused")

    async def count(delay_s: float) -> None:
        delays.append(delay_s)
        if len(delays) == 200:
            scope.cancel()
        await anyio.lowlevel.checkpoint()

    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    agent = Agent(name="a", handler=handler, nodes=(), connection=Connection(reconnect_interval_ms=1000))
    spec = WorkerSpec(name="a_server", agent=agent, node=NodeAddress("localhost", 9, False), index=1)
    dispatcher = dispatcher_for(load(handler), NoMemory(), Counters())
    monkeypatch.setattr(connection.Connection, "_connect", refuse)
    monkeypatch.setattr(connection.anyio, "sleep", count)
    with anyio.CancelScope() as scope:
        await connection.Connection(spec, (), dispatcher, Counters(), lambda *_: None).run()
    assert all(0.8 <= delay_s <= 1.0 for delay_s in delays), "never longer than the interval"
    assert max(delays) - min(delays) > 0.15, "and not all at once"


@pytest.mark.parametrize("dead", ["refuses", "says nothing"])
async def test_name_with_a_dead_address_leads_to_the_one_that_lives(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = anyio.Event()

    async def serve(stream: anyio.abc.SocketStream) -> None:
        connected.set()
        await stream.aclose()

    with socket.create_server(("127.0.0.2", 0), backlog=0) as mute, contextlib.ExitStack() as filling:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        address = ("127.0.0.3", 1)
        if dead == "says nothing":  # nobody accepts, and its backlog is full
            address = mute.getsockname()
            for _ in range(3):
                one = filling.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(address)

        async def resolve(self: connection.Connection) -> list[tuple[Any, ...]]:
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*kind, address), (*kind, ("127.0.0.1", port))]

        monkeypatch.setattr(connection.Connection, "_resolve", resolve)
        states: list[tuple[str, str]] = []
        spec = specified("somewhere.example", port)
        handler = load(spec.agent.handler)
        tried = connection.Connection(
            spec, (), dispatcher_for(handler, NoMemory(), Counters()), Counters(), lambda *state: states.append(state)
        )
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, serve)
            tasks.start_soon(tried.run)
            with anyio.fail_after(5):
                await connected.wait()
            tasks.cancel_scope.cancel()


async def test_name_whose_addresses_all_refuse_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: connection.Connection) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 1)) for host in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(connection.Connection, "_resolve", resolve)
    spec = specified("somewhere.example", 1)
    states: list[tuple[str, str]] = []
    tried = connection.Connection(
        spec,
        (),
        dispatcher_for(load(spec.agent.handler), NoMemory(), Counters()),
        Counters(),
        lambda *state: states.append(state),
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tried.run)
        with anyio.fail_after(5):
            while len(states) < 2:  # noqa: ASYNC110 - a list has no event
                await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    assert states[1] == ("backoff", "cannot connect to somewhere.example:1: Connection refused")


def specified(host: str, port: int) -> WorkerSpec:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    options = Connection(reconnect_interval_ms=1000)
    agent = Agent(name="a", handler=handler, nodes=(), connection=options)
    return WorkerSpec(name="a_server", agent=agent, node=NodeAddress(host, port, False), index=1)
