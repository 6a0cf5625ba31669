"""What runner and worker say to each other over ZeroMQ, as msgpack.

One message is one ZeroMQ frame and holds whatever one loop turn gathered, so that a burst of
queries costs one send. The runner's ROUTER knows a worker by its routing id, which carries the
incarnation: a reply of a dead process is never taken for one of its successor.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final, Literal

import msgspec
from msgspec import field

from shared.config import WorkerSpec

WorkerState = Literal["starting", "standby", "connecting", "registering", "ready", "backoff", "draining", "stopped"]
"""The states that a worker reports of itself; the supervisor adds `crashed`, `restarting`, `failed`."""

HEARTBEAT_INTERVAL_S: Final = 1.0
IDLE_HEARTBEAT_INTERVAL_S: Final = 5.0

KEY_BYTES: Final = 32


class Outcome(IntEnum):
    """How a query ended in its worker. `payload` is JSON for OK, and words in UTF-8 otherwise.

    `RETURNED`: the handler never saw it, and another worker may have it.
    """

    OK = 0
    HANDLER_FAILED = 1
    CANCELLED = 2
    TIMED_OUT = 3
    RETURNED = 4


def heartbeat_interval_s(liveness_timeout_s: float, *, idle: bool = False) -> float:
    """Return how often a worker beats: four times at least before it would be taken for dead.

    An idle one has nothing new to tell, and a hundred of them that tell it each second keep a core warm.
    """
    return min(IDLE_HEARTBEAT_INTERVAL_S if idle else HEARTBEAT_INTERVAL_S, liveness_timeout_s / 4)


# --- runner -> worker ------------------------------------------------------------------------


class Queries(msgspec.Struct, array_like=True, tag=1):
    """Queries to answer: (sequence number, query text)."""

    items: list[tuple[int, str]]


class Cancel(msgspec.Struct, array_like=True, tag=2):
    """Queries that nobody waits for any more; those not begun are dropped."""

    sequences: list[int]


class Drain(msgspec.Struct, array_like=True, tag=3):
    """Finish what came before this message, then leave. No query comes after it.

    With `hand_over`, send the memory in a `Legacy` before leaving: a successor waits for it.
    """

    hand_over: bool = False


class Go(msgspec.Struct, array_like=True, tag=4):
    """The predecessor has left: take its place, with what it remembered (None: nothing came)."""

    legacy: bytes | None = None


class TracedQueries(msgspec.Struct, array_like=True, tag=5):
    """`Queries` in place of which a runner that traces sends these: each with its `Trace` behind it."""

    items: list[tuple[int, str, str, str]]


RunnerMessage = Queries | Cancel | Drain | Go | TracedQueries

Trace = tuple[str, str]
"""Which trace a query belongs to: `traceparent` and `tracestate`, as W3C Trace Context writes them in headers."""

NO_TRACE: Final[Trace] = ("", "")

# --- worker -> runner ------------------------------------------------------------------------


class Hello(msgspec.Struct, array_like=True, tag=1):
    """First message of a worker. `key` is the one that its runner gave it at the fork."""

    key: bytes
    pid: int


class Replies(msgspec.Struct, array_like=True, tag=2):
    """Answers: (sequence number, outcome, payload)."""

    items: list[tuple[int, int, bytes]]


OUTCOMES: Final = len(Outcome)
BUCKETS: Final = 64


def _none_yet(length: int) -> Callable[[], list[int]]:
    return lambda: [0] * length


IGNORED: Final = (
    "binary",
    "not_utf8",
    "malformed",
    "unknown_action",
    "query_without_id",
    "query_without_body",
    "error_frame",
)
"""Why a node's frame may mean nothing to a worker."""


class Mishap(msgspec.Struct, frozen=True, array_like=True):
    """Something that went wrong: when, in seconds since 1970, and what, in words."""

    at_s: float
    words: str

    @classmethod
    def now(cls, words: str) -> Mishap:
        """Return one that has just happened."""
        return cls(time.time(), words)


def _later(one: Mishap | None, other: Mishap | None) -> Mishap | None:
    return max((each for each in (one, other) if each is not None), key=lambda each: each.at_s, default=None)


class Counters(msgspec.Struct, kw_only=True):
    """What a worker counted since its process began, and what went wrong in it last.

    Attributes:
        node, http: answers by `Outcome`, to the node and to direct queries.
        errors: handlers that failed or took too long.
        late: answers that came after their connection had gone.
        reconnects: connections that were lost, or could not be made.
        ignored: frames that meant nothing, by reason.
        durations: how long handlers took: how many times in [2**(n-1), 2**n) nanoseconds, at index n, which is
            the duration's `bit_length`. `busy_s` is the sum; of what runs just now, a little may be missing.
        in_flight_node: how many queries of the node were there and not answered; no count, but how it is just now.
        handler_error, connection_error: what went wrong last in the handler, and with the connection to the node.
    """

    node: list[int] = field(default_factory=_none_yet(OUTCOMES))
    http: list[int] = field(default_factory=_none_yet(OUTCOMES))
    errors: int = 0
    late: int = 0
    reconnects: int = 0
    ignored: dict[str, int] = {}
    durations: list[int] = field(default_factory=_none_yet(BUCKETS))
    busy_s: float = 0.0
    in_flight_node: int = 0
    handler_error: Mishap | None = None
    connection_error: Mishap | None = None

    @property
    def queries_node(self) -> int:
        """How many queries of the node were answered."""
        return sum(self.node)

    @property
    def queries_http(self) -> int:
        """How many direct queries were answered."""
        return sum(self.http)

    def add(self, other: Counters) -> None:
        """Count on from what another process of this worker had counted."""
        self.node = [one + more for one, more in zip(self.node, other.node, strict=True)]
        self.http = [one + more for one, more in zip(self.http, other.http, strict=True)]
        self.durations = [one + more for one, more in zip(self.durations, other.durations, strict=True)]
        self.errors += other.errors
        self.late += other.late
        self.reconnects += other.reconnects
        self.busy_s += other.busy_s
        self.ignored = {
            reason: self.ignored.get(reason, 0) + other.ignored.get(reason, 0)
            for reason in self.ignored | other.ignored
        }
        self.handler_error = _later(self.handler_error, other.handler_error)
        self.connection_error = _later(self.connection_error, other.connection_error)


class Status(msgspec.Struct, array_like=True, tag=3):
    """A worker's state, sent at each change and as its heartbeat, see `heartbeat_interval_s`.

    `detail` says why it is in this state, in words for an operator, or is empty.
    """

    state: WorkerState
    detail: str
    counters: Counters


class DrainRequest(msgspec.Struct, array_like=True, tag=4):
    """The worker was told to leave by a signal: send it nothing more, and `Drain` as the mark."""


class RecycleRequest(msgspec.Struct, array_like=True, tag=6):
    """The worker has reached one of its own limits and wants a successor; `reason` says which."""

    reason: str


class Legacy(msgspec.Struct, array_like=True, tag=7):
    """What a draining worker remembers, for its successor alone to read."""

    memory: bytes


class Failed(msgspec.Struct, array_like=True, tag=5):
    """The worker cannot start, and leaves; `reason` says what to do."""

    reason: str


WorkerMessage = Hello | Replies | Status | DrainRequest | Failed | RecycleRequest | Legacy

encode = msgspec.msgpack.Encoder().encode
decode_runner_message = msgspec.msgpack.Decoder(RunnerMessage).decode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What the runner hands a worker process at its fork. On `standby` it waits for `Go` before it serves."""

    spec: WorkerSpec
    incarnation: int
    endpoint: str
    key: bytes
    standby: bool = False

    @property
    def which(self) -> dict[str, Any]:
        """What every line of the log about this incarnation carries."""
        spec = self.spec
        return {
            "worker": spec.name,
            "agent": spec.agent.name,
            "node": str(spec.node),
            "incarnation": self.incarnation,
        }

    @property
    def routing_id(self) -> bytes:
        """The name under which the ROUTER knows this incarnation; nobody can guess it and take it first."""
        return f"{self.spec.name}#{self.incarnation}#{hashlib.sha256(self.key).hexdigest()[:16]}".encode()

    def __repr__(self) -> str:
        return f"Launch({self.spec.name}#{self.incarnation})"
