"""The messages between runner and worker: msgpack over ZeroMQ.

One message is one ZeroMQ frame. It has everything that one turn of the event loop gathered, so
that a burst of queries costs one send.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from enum import IntEnum
from operator import add
from typing import Any, Final, Literal

import msgspec
from msgspec import field

from shared.config.load import WorkerSpec

WorkerState = Literal[
    "starting",
    "standby",
    "connecting",
    "registering",
    "ready",
    "backoff",
    "draining",
    "stopped",
]
"""The states that a worker reports. The supervisor adds `crashed`, `restarting` and `failed`."""

_HEARTBEAT_INTERVAL_S: Final = 1.0
_IDLE_HEARTBEAT_INTERVAL_S: Final = 5.0

KEY_BYTES: Final = 32


class Outcome(IntEnum):
    """How a query ended. Metrics, spans and pages use `label`. A worker sends only the first four.

    Attributes:
        HANDLER_FAILED: the handler raised, or returned an invalid value.
        TIMED_OUT: the handler or the whole query took too long.
        GIVEN_BACK: the handler never saw the query, so another worker may answer it.
        CANCELLED: no one waits for the query any more, so no reply is sent.
        WORKER_UNAVAILABLE: no worker is up, or it died before it answered.
        WORKER_BUSY: too many queries wait already.
    """

    OK = 0
    HANDLER_FAILED = 1
    TIMED_OUT = 2
    GIVEN_BACK = 3
    CANCELLED = 4
    WORKER_UNAVAILABLE = 5
    WORKER_BUSY = 6

    @property
    def label(self) -> str:
        """The outcome's name in metrics, spans and documentation."""
        return self.name.lower()


def heartbeat_interval_s(liveness_timeout_s: float, *, idle: bool = False) -> float:
    """Return the time between two heartbeats of a worker, in seconds."""
    # An idle worker has nothing new to report. A hundred of them with a heartbeat each second use
    # a noticeable part of a core.
    interval_s = _IDLE_HEARTBEAT_INTERVAL_S if idle else _HEARTBEAT_INTERVAL_S
    # A quarter of the timeout: three heartbeats may be late before the worker is killed.
    return min(interval_s, liveness_timeout_s / 4)


# --- runner -> worker ------------------------------------------------------------------------

Trace = tuple[str, str]
"""The trace of a query: `traceparent` and `tracestate`, as in W3C Trace Context's HTTP headers."""

NO_TRACE: Final[Trace] = ("", "")


class Queries(msgspec.Struct, array_like=True, tag=1):
    """Queries to answer: (sequence number, query text)."""

    items: list[tuple[int, str]]
    # One for each item; none at all if the runner does not trace.
    traces: list[Trace] = []


class Cancel(msgspec.Struct, array_like=True, tag=2):
    """Queries that no one waits for any more. The worker drops those that have not started."""

    sequences: list[int]


class Drain(msgspec.Struct, array_like=True, tag=3):
    """Finish the queries that came before this message, then exit. No query follows it.

    With `hand_over`, a successor waits: give back the direct queries that have not started, and
    send the memory in a `Handover` before exiting.
    """

    hand_over: bool = False


class Promote(msgspec.Struct, array_like=True, tag=4):
    """The predecessor has exited: take its place, with its memory if it sent one."""

    memory: bytes | None = None


RunnerMessage = Queries | Cancel | Drain | Promote

# --- worker -> runner ------------------------------------------------------------------------


class Hello(msgspec.Struct, array_like=True, tag=1):
    """The first message of a worker. `key` is the one that the runner gave it at the fork."""

    key: bytes


class Replies(msgspec.Struct, array_like=True, tag=2):
    """Replies: (sequence number, outcome, payload). The payload is JSON for OK, else a message."""

    items: list[tuple[int, Outcome, bytes]]


BUCKETS: Final = 64
"""The length of `Counters.durations`: 2**63 nanoseconds are 292 years."""

IGNORED_KINDS: Final = (
    "binary",
    "not_utf8",
    "malformed",
    "unknown_action",
    "query_without_id",
    "query_without_body",
    "error_frame",
)
"""The kinds of frames of its node that a worker ignores."""


class LastError(msgspec.Struct, frozen=True, array_like=True):
    """The most recent error of one part of a worker, with its time in seconds since 1970."""

    at_s: float
    error: str

    @classmethod
    def now(cls, error: str) -> LastError:
        """Return an error that happens now."""
        return cls(time.time(), error)


class Counters(msgspec.Struct, kw_only=True):
    """What a worker has counted since its process started, and its last errors.

    Attributes:
        node_answers, direct_answers: answers by `Outcome`, to queries from the node and to direct
            queries.
        errors: queries that ended as HANDLER_FAILED or TIMED_OUT.
        late: answers that came after their connection was lost.
        connection_failures: connections that were lost or failed.
        ignored: invalid or unknown frames, by kind (see `IGNORED_KINDS`).
        durations: how long handlers took. Index n counts the durations in [2**(n-1), 2**n)
            nanoseconds: n is the duration's `bit_length`.
        busy_s: the sum of these durations. It is updated less often, so it may lack the last ones.
        in_flight_node: the node's queries without an answer. A gauge, which `add` leaves out.
        handler_error, connection_error: the last error of the handler, and of the connection to
            the node.
    """

    node_answers: list[int] = field(default_factory=lambda: [0] * len(Outcome))
    direct_answers: list[int] = field(default_factory=lambda: [0] * len(Outcome))
    errors: int = 0
    late: int = 0
    connection_failures: int = 0
    ignored: dict[str, int] = {}
    durations: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    busy_s: float = 0.0
    in_flight_node: int = 0
    handler_error: LastError | None = None
    connection_error: LastError | None = None

    @property
    def answered_node(self) -> int:
        """The number of answers to queries of the node."""
        return sum(self.node_answers)

    @property
    def answered_direct(self) -> int:
        """The number of answers to direct queries."""
        return sum(self.direct_answers)

    def add(self, other: Counters) -> None:
        """Add the counters of another part or process of the same worker."""
        self.node_answers = list(map(add, self.node_answers, other.node_answers))
        self.direct_answers = list(map(add, self.direct_answers, other.direct_answers))
        self.durations = list(map(add, self.durations, other.durations))
        self.errors += other.errors
        self.late += other.late
        self.connection_failures += other.connection_failures
        self.busy_s += other.busy_s
        self.ignored = dict(Counter(self.ignored) + Counter(other.ignored))
        self.handler_error = _latest(self.handler_error, other.handler_error)
        self.connection_error = _latest(self.connection_error, other.connection_error)


def _latest(*errors: LastError | None) -> LastError | None:
    return max(
        filter(None, errors),
        key=lambda error: error.at_s,
        default=None,
    )


class Status(msgspec.Struct, array_like=True, tag=3):
    """A worker's state, sent at each change and as its heartbeat (see `heartbeat_interval_s`).

    `reason` says why it is in this state, for operators. It may be empty.
    """

    state: WorkerState
    reason: str
    counters: Counters


class DrainRequest(msgspec.Struct, array_like=True, tag=4):
    """The worker got SIGTERM and asks for a `Drain`, after which no query can come."""


class Failed(msgspec.Struct, array_like=True, tag=5):
    """The worker cannot start or continue, and exits. `reason` says why, and what to do."""

    reason: str


class ReplaceRequest(msgspec.Struct, array_like=True, tag=6):
    """The worker has reached a limit of its agent, named in `reason`, and asks for a successor."""

    reason: str


class Handover(msgspec.Struct, array_like=True, tag=7):
    """The memory of a draining worker for its successor.

    `memory` is None if it has nothing to hand over, or after an error, which it logged.
    """

    # The runner passes the bytes on. Only a worker process decodes them, because to decode what a
    # handler has made (a pickle) is to run its code.
    memory: bytes | None


Report = Status | Failed | ReplaceRequest | Handover
"""What a worker reports about itself. The router passes it on to the supervisor."""

WorkerMessage = Hello | Replies | DrainRequest | Report

encode = msgspec.msgpack.Encoder().encode
decode_runner_message = msgspec.msgpack.Decoder(RunnerMessage).decode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What the runner gives a worker process. With `standby` it waits for a `Promote`."""

    spec: WorkerSpec
    incarnation: int
    endpoint: str
    key: bytes
    standby: bool = False

    @property
    def log_context(self) -> dict[str, Any]:
        """The fields of every log line about this incarnation."""
        spec = self.spec
        return {
            "worker": spec.name,
            "agent": spec.agent.name,
            "node": str(spec.node),
            "incarnation": self.incarnation,
        }

    @property
    def routing_id(self) -> bytes:
        """The name under which the runner's ROUTER knows this incarnation."""
        # The incarnation is a part of it, so a late reply of a dead process is never taken for one
        # of its successor. So is a hash of the key: a ROUTER gives a name to the first socket that
        # claims it, and no other process can guess this one. The key itself stays secret, because
        # routing ids are logged.
        key_hash = hashlib.sha256(self.key).hexdigest()[:16]
        return f"{self.spec.name}#{self.incarnation}#{key_hash}".encode()

    def __repr__(self) -> str:
        # Without the key, and without the token in the spec: the text may reach a log.
        return f"Launch({self.spec.name}#{self.incarnation})"
