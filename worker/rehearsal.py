"""What a worker does in its first second, done once in the fork server: no worker pays for it again.

Python adapts code to its use where it lies, and libraries make at first what they need later. After
the fork each of these writes copies a page of memory for one worker alone. Nothing here touches a
socket, a file or a thread, and nothing of it is left but what was learnt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import anyio
from websockets.http11 import Request
from websockets.server import ServerProtocol

from shared import frames, ipc
from shared.config import Agent, WorkerSpec
from shared.handlers import HandlerRef
from shared.ipc import Counters, Launch, Outcome
from shared.nodes import NodeAddress
from worker.dispatchers import dispatcher_for
from worker.handler import Handler
from worker.jobs import Answer, Job
from worker.memories import memory_for
from worker.results import encode_result
from worker.session import Session

ROUNDS: Final = 32
"""How often a query is answered: code is adapted after some eight calls (PEP 659)."""

_NODE: Final = NodeAddress("127.0.0.1", 1, False)


def rehearse() -> None:
    """Answer some queries of a node that is not there."""
    session = Session(_NODE, "rehearsal", ("a",), "token", 1 << 20)
    node = ServerProtocol()
    node.receive_data(session.take_output())
    request = node.events_received()[0]
    assert isinstance(request, Request)
    node.send_response(node.accept(request))
    node.send_text(frames.encode({"action": frames.REGISTERED, "status": "ok"}))
    node.send_text(frames.encode({"action": frames.AGENT_REGISTERED, "capabilities": []}))
    session.receive(b"".join(node.data_to_send()))
    session.ping()
    for number in range(ROUNDS):
        node.send_text(frames.encode(frames.Query(str(number), "a query")))
        for query_id, body in session.receive(b"".join(node.data_to_send())):
            session.answer(query_id, encode_result(body))
        session.take_output()
    _talk_to_runner()
    anyio.run(_dispatch, backend_options={"use_uvloop": True})


class _Nobody:
    """A source whose answers nobody reads."""

    def encode(self, result: Any) -> bytes:
        """Return a result as JSON."""
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        """Drop it."""

    def flush(self) -> None:
        """There is nothing."""


async def _echo(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return body, memory


async def _dispatch() -> None:
    handler = Handler(handle=_echo, is_async=True)
    dispatcher = dispatcher_for(handler, memory_for("ram", "rehearsal", Path()), Counters())
    async with dispatcher.running():
        for number in range(ROUNDS):
            dispatcher.submit([Job(_Nobody(), number, "a query")])
            await dispatcher.idle()


def _talk_to_runner() -> None:
    handler = HandlerRef("rehearsal", None, "handle", Path())
    spec = WorkerSpec(
        name="rehearsal", agent=Agent(name="rehearsal", handler=handler, nodes=(_NODE,)), node=_NODE, index=1
    )
    launch = Launch(spec=spec, incarnation=1, endpoint="ipc://", key=b"k")
    for number in range(ROUNDS):
        ipc.decode_runner_message(ipc.encode(ipc.Queries([(number, "a query")])))
        ipc.encode(ipc.Replies([(number, int(Outcome.OK), launch.routing_id)]))
        ipc.encode(ipc.Status("ready", "", Counters()))
