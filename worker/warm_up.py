"""Runs some queries in the fork server, which saves each worker time and memory.

When code runs for the first time, Python adapts it in place, and libraries create objects that they
need later. In a worker, each of these writes would copy a page of memory that all workers share
otherwise. A fork would share connections and lose threads, so nothing here opens or starts one.
libuv keeps one pipe open, and replaces it in each forked process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import anyio
from websockets.http11 import Request
from websockets.server import ServerProtocol

from shared import frames, ipc
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import NodeAddress
from shared.ipc import Counters, Launch, Outcome
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.handler import Handler
from worker.dispatching.jobs import Answer, Job
from worker.dispatching.results import encode_result
from worker.memory.base import RamMemory
from worker.node.session import Session

_ROUNDS: Final = 32
"""The number of queries: enough for Python to adapt the code, which takes a few calls (PEP 659)."""

_NAME: Final = "warm_up"
_NODE: Final = NodeAddress("127.0.0.1", 1, False)


def warm_up() -> None:
    """Answer some queries of a node and a runner that do not exist."""
    _answer_node()
    _answer_runner()
    anyio.run(_dispatch, backend_options={"use_uvloop": True})


def _answer_node() -> None:
    session = Session(
        _NODE,
        _NAME,
        ("a capability",),
        "token",
        1 << 20,
    )
    node = ServerProtocol()
    node.receive_data(session.take_output())
    request = node.events_received()[0]
    assert isinstance(request, Request)
    node.send_response(node.accept(request))
    registered = {"action": frames.REGISTERED, "status": "ok"}
    node.send_text(frames.encode(registered))
    agent_registered = {"action": frames.AGENT_REGISTERED, "capabilities": []}
    node.send_text(frames.encode(agent_registered))
    session.receive(b"".join(node.data_to_send()))
    session.ping()
    for number in range(_ROUNDS):
        query = frames.Query(str(number), "a query")
        node.send_text(frames.encode(query))
        data = b"".join(node.data_to_send())
        for query_id, body in session.receive(data):
            session.answer(query_id, encode_result(body))
        session.take_output()


def _answer_runner() -> None:
    # A worker gets these four objects from the runner. If none were created here, each worker would
    # need 50 kB more.
    handler = HandlerRef(_NAME, None, "handle", Path())
    agent = Agent(
        name=_NAME,
        handler=handler,
        nodes=(_NODE,),
    )
    spec = WorkerSpec(
        name=_NAME,
        agent=agent,
        node=_NODE,
    )
    launch = Launch(
        spec=spec,
        incarnation=1,
        endpoint="ipc://",
        key=b"a key",
    )
    for number in range(_ROUNDS):
        queries = ipc.Queries([(number, "a query")])
        ipc.decode_runner_message(ipc.encode(queries))
        replies = ipc.Replies([(number, Outcome.OK, launch.routing_id)])
        ipc.encode(replies)
        status = ipc.Status("ready", "", Counters())
        ipc.encode(status)


async def _dispatch() -> None:
    handler = Handler(handle=_echo, is_async=True)
    dispatcher = create_dispatcher(handler, RamMemory())
    source = _Source()
    async with dispatcher.running():
        for number in range(_ROUNDS):
            job = Job(source, number, "a query")
            dispatcher.submit([job])
            await dispatcher.wait_until_idle()


async def _echo(
    body: str,
    memory: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    return body, memory


class _Source:
    """A source that drops its answers."""

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        pass

    def send_answers(self) -> None:
        pass
