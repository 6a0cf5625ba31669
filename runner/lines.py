"""What the router keeps: a line for each incarnation of a worker, and the queries that wait for a reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from shared import ipc
from shared.ipc import Launch, Trace


class Ending(Enum):
    """How a routed query ended; `WITHDRAWN` is told to nobody, for there is nobody any more."""

    OK = "ok"
    HANDLER_FAILED = "handler_failed"
    TIMED_OUT = "timed_out"
    WORKER_GONE = "worker_gone"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


class Reply(NamedTuple):
    """A query's end. `payload` is JSON for OK, else words in UTF-8. `worker` is who was asked."""

    ending: Ending
    payload: bytes
    worker: str


OnReply = Callable[[Reply], None]


class Listener(Protocol):
    """Who is told what a worker says of itself."""

    def on_status(self, incarnation: int, status: ipc.Status) -> None:
        """Take a state change or a heartbeat."""

    def on_failed(self, incarnation: int, reason: str) -> None:
        """Take the reason why a worker cannot go on; its process ends by itself."""

    def on_recycle(self, incarnation: int, reason: str) -> None:
        """Take a worker's wish for a successor."""

    def on_legacy(self, incarnation: int, memory: bytes) -> None:
        """Take what a draining worker leaves to its successor."""


class Line:
    """One incarnation of a worker, as the router knows it."""

    __slots__ = (
        "accepting",
        "draining",
        "heard_s",
        "in_flight",
        "incarnation",
        "key",
        "known",
        "listener",
        "name",
        "outbox",
        "routing_id",
        "which",
        "withdrawn",
    )

    def __init__(self, launch: Launch, listener: Listener) -> None:
        self.name = launch.spec.name
        self.incarnation = launch.incarnation
        self.which = launch.which
        self.routing_id = launch.routing_id
        self.key = launch.key
        self.listener = listener
        self.known = False
        self.accepting = False
        self.draining = False
        self.heard_s = 0.0
        self.in_flight: dict[int, Pending] = {}
        self.outbox: list[Pending] = []
        self.withdrawn: list[int] = []


class Pending:
    """One query that waits for its reply: at a worker (`line`), or held for the next one (no line)."""

    __slots__ = ("deadline", "elsewhere", "line", "name", "on_reply", "query", "sequence", "trace")

    def __init__(
        self,
        sequence: int,
        name: str,
        query: str,
        deadline: float,
        on_reply: OnReply,
        elsewhere: Sequence[str],
        trace: Trace,
    ) -> None:
        self.sequence = sequence
        self.name = name
        self.query = query
        self.deadline = deadline
        self.on_reply = on_reply
        self.elsewhere = elsewhere
        self.trace = trace
        self.line: Line | None = None
