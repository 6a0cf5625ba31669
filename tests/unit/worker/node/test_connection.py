"""`worker.node._connection`: when a node's socket is read, and how answers are written."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from websockets.frames import Frame, Opcode

from shared.config.nodes import parse_node
from shared.config.schema import ConnectionSection
from shared.ipc import Counters, Outcome
from tests.unit.worker.node.test_session import READY, NodePeer
from worker.dispatching.jobs import Job
from worker.node._connection import MAX_PENDING, MAX_PENDING_SIZE, NodeConnection
from worker.node.session import Session

pytestmark = pytest.mark.anyio


class Transport(asyncio.Transport):
    """A transport that records how it is used."""

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
    """A dispatcher that answers when the test asks it to."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, jobs: list[Job]) -> None:
        self.jobs += jobs

    def answer(self, count: int, payload: bytes = b"1") -> None:
        for job in self.jobs[:count]:
            job.source.answer(job, (Outcome.OK, payload))
        del self.jobs[:count]


class FakeNode:
    """The node at the other end of a registered connection."""

    def __init__(self) -> None:
        session = Session(parse_node("localhost:8080"), "echo", (), None, 1 << 24)
        self.dispatcher, self.transport = Dispatcher(), Transport()
        self.connection = NodeConnection(
            session,
            ConnectionSection(),
            self.dispatcher,
            Counters(),
            lambda state: None,
            lambda ignored: None,  # type: ignore[arg-type]
        )
        peer = NodePeer(session)
        self.connection.connection_made(self.transport)
        self.send(peer.upgrade, *(json.dumps(each).encode() for each in READY))

    def send(self, *texts: bytes) -> None:
        head, *frames = texts
        self.connection.data_received(
            head + b"".join(Frame(Opcode.TEXT, each).serialize(mask=False) for each in frames)
        )

    def query(self, count: int, query_id: str = "i", body: str = "b") -> None:
        text = json.dumps({"action": "query", "id": query_id, "body": body}).encode()
        for _ in range(count):
            self.send(b"", text)


@pytest.mark.parametrize("part", ["body", "query_id"])
async def test_reading_pauses_while_pending_queries_have_too_many_bytes(part: str) -> None:
    node = FakeNode()
    megabyte = "x" * 1_000_000
    sent = 0
    while node.transport.reads:
        node.query(1, **{part: megabyte})
        sent += 1
        assert sent < 20, "20 MB are pending"
    assert sent * 1_000_000 >= MAX_PENDING_SIZE
    node.dispatcher.answer(sent // 2)
    await asyncio.sleep(0)
    assert node.transport.reads


async def test_reading_pauses_while_too_many_queries_are_pending() -> None:
    node = FakeNode()
    node.query(MAX_PENDING - 1)
    assert node.transport.reads
    node.query(1)
    assert not node.transport.reads
    node.dispatcher.answer(1)
    await asyncio.sleep(0)
    assert node.transport.reads


async def test_reading_pauses_while_the_node_does_not_read_its_answers() -> None:
    node = FakeNode()
    node.query(3)
    node.transport.buffered = MAX_PENDING_SIZE
    node.connection.pause_writing()
    assert not node.transport.reads
    node.transport.buffered = 0
    node.connection.resume_writing()
    assert node.transport.reads


async def test_answers_of_one_loop_iteration_are_written_together() -> None:
    node = FakeNode()
    node.query(50)
    before = node.transport.written
    node.dispatcher.answer(50)
    assert node.transport.written == before, "the loop has not run yet"
    await asyncio.sleep(0)
    assert len(node.transport.written) > len(before) + 50 * 30


async def test_queries_of_a_lost_connection_release_their_text_and_id() -> None:
    node = FakeNode()
    node.query(5, query_id="i" * 10_000, body="b" * 10_000)
    running = asyncio.ensure_future(node.connection.run())
    await asyncio.sleep(0)
    node.connection.connection_lost(None)
    await running
    assert all(job.skipped_as for job in node.dispatcher.jobs)
    assert sum(len(job.body) + len(job.ticket) for job in node.dispatcher.jobs) == 0
    node.dispatcher.answer(5)
    gc.collect()


async def test_pending_write_is_dropped_when_the_connection_is_lost() -> None:
    node = FakeNode()
    node.query(1)
    node.dispatcher.answer(1)
    before = node.transport.written
    node.connection.connection_lost(ConnectionResetError())
    await asyncio.sleep(0)
    assert node.transport.written == before
