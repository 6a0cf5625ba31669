"""`worker.link`: what a worker sends to its runner, and how often."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio.lowlevel
import pytest
import zmq

from shared import ipc
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import parse_node
from shared.ipc import Launch, Status
from worker.link import Link

pytestmark = pytest.mark.anyio

AGENT = Agent(
    name="a",
    handler=HandlerRef("worker.echo", None, "handle", Path("/")),
    nodes=(parse_node("h"),),
)
SPEC = WorkerSpec(name="a_server", agent=AGENT, node=AGENT.nodes[0])


async def test_many_errors_of_a_handler_cost_few_messages(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    launch = Launch(spec=SPEC, incarnation=1, endpoint=endpoint, key=b"")
    link = Link(launch, on_drain=lambda _: None, on_promote=lambda _: None)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as runner:
        runner.bind(endpoint)
        link.open()
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        for _ in range(1000):
            for _ in range(10):
                link.report_error()
            await anyio.lowlevel.checkpoint()
        took_s = loop.time() - started_s
        link.send(ipc.DrainRequest())
        statuses = 0
        runner.setsockopt(zmq.RCVTIMEO, 60_000)
        while not isinstance(message := receive(runner), ipc.DrainRequest):
            statuses += isinstance(message, Status)
        link.close()
    first = 1  # at the start, without an error
    assert first + 1 <= statuses <= first + 2 + took_s


def receive(runner: zmq.Socket[bytes]) -> ipc.WorkerMessage:
    _, data = runner.recv_multipart()
    return ipc.decode_worker_message(data)
