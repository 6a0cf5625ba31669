"""The table of workers as operators see it: over HTTP, in a terminal, on the status page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from shared.ipc import LastError, WorkerState

ChildState = Literal[
    WorkerState,
    "crashed",
    "restarting",
    "failed",
]
STATES: Final[tuple[ChildState, ...]] = get_args(ChildState)

_MAGNITUDES: Final = (
    (10**12, "T"),
    (10**9, "G"),
    (10**6, "M"),
)
_UNITS: Final = (
    (86_400, "d"),
    (3600, "h"),
    (60, "m"),
    (1, "s"),
)


ErrorSource = Literal["handler", "connection", "process"]


class ErrorRow(msgspec.Struct, frozen=True, kw_only=True):
    """The last error of one part of a worker."""

    source: Annotated[
        ErrorSource,
        Meta(description="The handler, the connection to the node, or the process that exited."),
    ]
    at: Annotated[datetime, Meta(description="The time, in UTC.")]
    error: Annotated[str, Meta(description="The error message.")]


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of workers."""

    name: Annotated[str, Meta(description="The worker's name.")]
    agent: Annotated[str, Meta(description="Its agent's name.")]
    node: Annotated[str, Meta(description="Its node's address.")]
    state: Annotated[ChildState, Meta(description="Its state.")]
    reason: Annotated[
        str,
        Meta(description="Why it is in this state; empty if there is nothing to explain."),
    ]
    pid: Annotated[int | None, Meta(description="Its process's id, null if it has none.")]
    incarnation: Annotated[int, Meta(description="The number of its process, from 1.")]
    uptime_s: Annotated[
        float, Meta(description="How long its process has been running, 0 if it has none.")
    ]
    restarts: Annotated[int, Meta(description="How often its process exited unexpectedly.")]
    queries: Annotated[
        int,
        Meta(description="All queries that it answered at this node since the runner started."),
    ]
    queries_node: Annotated[int, Meta(description="The queries from its node.")]
    queries_direct: Annotated[int, Meta(description="The direct queries, over HTTP.")]
    queries_per_s: Annotated[
        float, Meta(description="Queries per second in the last five seconds.")
    ]
    p50_s: Annotated[
        float | None,
        Meta(description="Median time of the last five minutes' queries; null without queries."),
    ]
    p99_s: Annotated[float | None, Meta(description="Their 99th percentile.")]
    errors: Annotated[int, Meta(description="Queries whose handler failed or timed out.")]
    unserved: Annotated[
        int,
        Meta(
            description="Direct queries whose client got 503 or 504: `timed_out`, "
            "`worker_unavailable` and `worker_busy`. If the handler timed out, the query counts in "
            "`errors`, too."
        ),
    ]
    connection_failures: Annotated[
        int, Meta(description="Connections to the node that were lost or failed.")
    ]
    ignored: Annotated[dict[str, int], Meta(description="Ignored frames of the node, by kind.")]
    last_error: Annotated[str, Meta(description="Its last error; empty if there was none.")]
    last_errors: Annotated[
        list[ErrorRow],
        Meta(description="The last error of each of its parts that had one, the newest first."),
    ]


class Table(msgspec.Struct, frozen=True):
    """The body of GET /workers."""

    workers: list[WorkerRow]


class AgentReady(msgspec.Struct, frozen=True):
    """Whether an agent has a ready worker, and the state of each worker with its reason."""

    ready: bool
    workers: dict[str, str]


class Ready(msgspec.Struct, frozen=True):
    """The body of GET /ready."""

    ready: bool
    agents: dict[str, AgentReady]


def last_errors(
    handler: LastError | None,
    connection: LastError | None,
    process: LastError | None,
) -> list[ErrorRow]:
    """Return the last error of each part of a worker that had one, the newest first."""
    by_source: dict[ErrorSource, LastError | None] = {
        "handler": handler,
        "connection": connection,
        "process": process,
    }
    found = []
    for source, error in by_source.items():
        if error is not None:
            # Milliseconds, because the microseconds of a float are noise.
            at = datetime.fromtimestamp(round(error.at_s, 3), UTC)
            found.append(ErrorRow(source=source, at=at, error=error.error))
    return sorted(found, key=lambda row: row.at, reverse=True)


def readiness(
    rows: Sequence[WorkerRow],
    agents: Mapping[str, Sequence[str]],
) -> dict[str, AgentReady]:
    """Return whether each agent is ready.

    Args:
        rows: the table of workers.
        agents: the names of each agent's workers.
    """
    known = {row.name: row for row in rows}
    found = {}
    for agent, workers in agents.items():
        # A reload names an added worker here before it is in the table.
        its_rows = [known[name] for name in workers if name in known]
        ready = any(row.state == "ready" for row in its_rows)
        states = {row.name: _state(row) for row in its_rows}
        found[agent] = AgentReady(ready, states)
    return found


def _state(row: WorkerRow) -> str:
    return f"{row.state}: {row.reason}" if row.reason else row.state


def displayed_reason(row: WorkerRow) -> str | None:
    """Return why a worker is in its state; None if there is nothing to explain."""
    if row.state != "failed":
        return row.reason or None
    # "failed" reads as final, but it is not.
    retried = "it is tried again within a minute"
    return f"{row.reason}; {retried}" if row.reason else retried


def summary(states: Sequence[str]) -> str:
    """Return one line: how many workers are ready, given the states of all."""
    ready = states.count("ready")
    return f"{ready} of {len(states)} worker{'' if len(states) == 1 else 's'} ready"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `2d 3h`."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in _UNITS:
        if left >= size or parts or unit == "s":
            parts.append(f"{left // size}{unit}")
            left %= size
    return " ".join(parts[:2])


def ago(at: datetime) -> str:
    """Return how long ago something was, such as `3m 2s ago`."""
    seconds = (datetime.now(UTC) - at).total_seconds()
    # The clock may have been set back since.
    return f"{duration(max(seconds, 0.0))} ago"


def latency(seconds: float | None) -> str:
    """Return a duration, such as `1.3 ms` or `5 us`; empty for None."""
    if seconds is None:
        return ""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            value = seconds / size
            # From 9.95 on, one decimal place would show three digits: "10.0".
            return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def count(number: int) -> str:
    """Return a number in at most seven characters: `999,999`, then `1.23 M`."""
    for size, unit in _MAGNITUDES:
        if number >= size:
            value = number / size
            # Three digits in all.
            places = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{places}f} {unit}"
    return f"{number:,}"


def rate(per_s: float) -> str:
    """Return queries per second; below ten, with a decimal place."""
    # A rate of 0 has no queries at all. "0" shows that better than "0.0", which is rounded.
    if per_s >= 9.95 or not per_s:
        return count(round(per_s))
    return f"{per_s:.1f}"
