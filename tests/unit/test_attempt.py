"""`worker.attempt`: how far a node may be ahead, and what of it is kept."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from shared.config import Connection as Options
from shared.ipc import Counters, Outcome
from shared.nodes import parse_node
from tests.unit.test_session import READY, Peer
from worker.attempt import MAX_PENDING, MAX_PENDING_BYTES, Attempt
from worker.jobs import Job
from worker.session import Session

pytestmark = pytest.mark.anyio


class Transport(asyncio.Transport):
    """What a socket would be told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reads = True
        self.buffered = 0
        self.closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


class Dispatcher:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, jobs: list[Job]) -> None:
        self.jobs += jobs

    def answer(self, count: int, payload: bytes = b"1") -> None:
        for job in self.jobs[:count]:
            job.source.answer(job, (Outcome.OK, payload))
        del self.jobs[:count]


class Line:
    """An attempt that is registered, with a node at its other end."""

    def __init__(self) -> None:
        session = Session(parse_node("localhost:8080"), "echo", (), None, 1 << 24)
        self.dispatcher, self.transport = Dispatcher(), Transport()
        self.attempt = Attempt(
            session,
            Options(),
            self.dispatcher,
            Counters(),
            lambda state: None,
            lambda reason, number: None,  # type: ignore[arg-type]
        )
        node = Peer(session)
        self.attempt.connection_made(self.transport)
        self.say(node.upgrade, *(json.dumps(each).encode() for each in READY))

    def say(self, *texts: bytes) -> None:
        head, *frames = texts
        self.attempt.data_received(head + b"".join(Frame(Opcode.TEXT, each).serialize(mask=False) for each in frames))

    def ask(self, count: int, query_id: str = "i", body: str = "b") -> None:
        text = json.dumps({"action": "query", "id": query_id, "body": body}).encode()
        for _ in range(count):
            self.say(b"", text)


@pytest.mark.parametrize("where", ["the body", "the id"])
async def test_node_is_read_no_further_once_its_queries_are_too_large_together(where: str) -> None:
    line = Line()
    megabyte = "x" * 1_000_000
    asked = 0
    while line.transport.reads:
        line.ask(1, **{"body" if where == "the body" else "query_id": megabyte})
        asked += 1
        assert asked < 20, "8 MB are enough"
    assert asked * 1_000_000 >= MAX_PENDING_BYTES
    line.dispatcher.answer(asked // 2)
    await asyncio.sleep(0)
    assert line.transport.reads, "the handler has caught up"


async def test_node_is_read_no_further_once_its_queries_are_too_many() -> None:
    line = Line()
    line.ask(MAX_PENDING - 1)
    assert line.transport.reads
    line.ask(1)
    assert not line.transport.reads
    line.dispatcher.answer(1)
    await asyncio.sleep(0)
    assert line.transport.reads


async def test_node_that_leaves_its_answers_unread_is_read_no_further() -> None:
    line = Line()
    line.ask(3)
    line.transport.buffered = MAX_PENDING_BYTES
    line.attempt.pause_writing()
    assert not line.transport.reads
    line.transport.buffered = 0
    line.attempt.resume_writing()
    assert line.transport.reads


async def test_answers_of_one_loop_turn_are_one_write() -> None:
    line = Line()
    line.ask(50)
    before = line.transport.written
    line.dispatcher.answer(50)
    assert line.transport.written == before, "not yet"
    await asyncio.sleep(0)
    assert len(line.transport.written) > len(before) + 50 * 30


async def test_queries_of_a_connection_that_is_gone_keep_neither_text_nor_id() -> None:
    line = Line()
    line.ask(5, query_id="i" * 10_000, body="b" * 10_000)
    running = asyncio.ensure_future(line.attempt.run())
    await asyncio.sleep(0)
    line.attempt.connection_lost(None)
    await running
    assert all(job.cancelled for job in line.dispatcher.jobs)
    assert sum(len(job.body) + len(job.ticket) for job in line.dispatcher.jobs) == 0
    line.dispatcher.answer(5)
    gc.collect()


async def test_write_that_was_due_when_the_socket_went_is_dropped() -> None:
    line = Line()
    line.ask(1)
    line.dispatcher.answer(1)
    before = line.transport.written
    line.attempt.connection_lost(ConnectionResetError())
    await asyncio.sleep(0)
    assert line.transport.written == before
