"""`worker.connection`: how long it waits between two attempts."""

from __future__ import annotations

from pathlib import Path

import anyio
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
