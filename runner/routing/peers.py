"""What the router records of each incarnation of a worker, and of each query without a reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from shared import ipc
from shared.ipc import Launch, Outcome, Trace

UNSERVED: Final = (
    Outcome.TIMED_OUT,
    Outcome.WORKER_UNAVAILABLE,
    Outcome.WORKER_BUSY,
)
"""The outcomes for which a direct query's client gets 503 or 504."""


class Reply(NamedTuple):
    """How a query ended.

    Attributes:
        payload: JSON for OK, else a message.
        worker: the worker that had the query last, or would have had it.
    """

    outcome: Outcome
    payload: bytes
    worker: str


OnReply = Callable[[Reply], None]

OnReport = Callable[[int, ipc.Report], None]
"""Called with an incarnation's number, and what it reports."""


# Structs, because they are created in C: a `Pending` is created for each direct query. They are
# compared by identity: no two are equal, and a `Peer` is a key.
class Peer(msgspec.Struct, eq=False):
    """One incarnation of a worker.

    Attributes:
        launch: what the process was started with.
        on_report: called with what it reports.
        routing_id: its address at the router's socket.
        authenticated: whether it has presented its key. Until then it is ignored.
        accepting: whether it can be given a query.
        draining: whether it finishes its queries, and gets no more.
        last_message_s: when its last message arrived, by the event loop's clock.
        in_flight: its queries without a reply, by sequence number.
        outbox: those of them that are not sent yet, and perhaps some that were cancelled.
        cancelled: the sequence numbers of cancelled queries that were not reported to it yet.
    """

    launch: Launch
    on_report: OnReport
    routing_id: bytes = b""
    authenticated: bool = False
    accepting: bool = False
    draining: bool = False
    last_message_s: float = 0.0
    in_flight: dict[int, Pending] = {}
    outbox: list[Pending] = []
    cancelled: list[int] = []

    def __post_init__(self) -> None:
        # It contains a hash, which is too slow to compute for each query.
        self.routing_id = self.launch.routing_id

    @property
    def name(self) -> str:
        """The worker's name."""
        return self.launch.spec.name


class Pending(msgspec.Struct, eq=False):
    """One query without a reply.

    Attributes:
        sequence: its number, which no other query of this runner has.
        name: the worker that was chosen for it. Another one has it if it was rerouted.
        query: the text.
        deadline_s: when it expires, by the event loop's clock.
        on_reply: called with its reply.
        alternatives: the workers that may get it instead, while no handler has started it.
        trace: its trace context.
        peer: the incarnation that has it. None while it is held for the next one.
    """

    sequence: int
    name: str
    query: str
    deadline_s: float
    on_reply: OnReply
    alternatives: Sequence[str]
    trace: Trace
    peer: Peer | None = None
