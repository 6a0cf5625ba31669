"""The table of workers, as operators see it: over HTTP, in a terminal and on the page, in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from shared.ipc import Mishap

ChildState = Literal[
    "starting",
    "standby",
    "connecting",
    "registering",
    "ready",
    "backoff",
    "draining",
    "stopped",
    "crashed",
    "restarting",
    "failed",
]
STATES: Final[tuple[ChildState, ...]] = get_args(ChildState)

_SPANS: Final = ((86_400, "d"), (3600, "h"), (60, "m"))


ErrorSource = Literal["handler", "connection", "process"]


class LastError(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong last in one part of a worker."""

    source: Annotated[
        ErrorSource,
        Meta(description="The handler, the connection to the node, or the process that ended unexpectedly."),
    ]
    at: Annotated[datetime, Meta(description="When, in UTC.")]
    error: Annotated[str, Meta(description="What, in words.")]


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of workers."""

    name: Annotated[str, Meta(description="The worker's name.")]
    agent: Annotated[str, Meta(description="Its agent's name.")]
    node: Annotated[str, Meta(description="Its node's address.")]
    state: Annotated[ChildState, Meta(description="Its state.")]
    detail: Annotated[str, Meta(description="Why it is in this state, in words; empty when there is nothing to say.")]
    pid: Annotated[int | None, Meta(description="Its process's id, null without one.")]
    incarnation: Annotated[int, Meta(description="The number of its process, from 1.")]
    uptime_s: Annotated[float, Meta(description="How long its process has been running, 0 without one.")]
    restarts: Annotated[int, Meta(description="How often its process ended unexpectedly.")]
    queries: Annotated[
        int,
        Meta(description="How many queries it answered since the runner began; of its node and over HTTP together."),
    ]
    queries_node: Annotated[int, Meta(description="Those of its node.")]
    queries_http: Annotated[int, Meta(description="Those over HTTP.")]
    queries_per_s: Annotated[float, Meta(description="How many a second in the last five seconds.")]
    p50_s: Annotated[
        float | None,
        Meta(
            description="The time within which half of the last five minutes' queries were answered; null without any."
        ),
    ]
    p99_s: Annotated[float | None, Meta(description="The same for 99 of 100.")]
    errors: Annotated[int, Meta(description="Queries whose handler failed or took too long.")]
    unanswered: Annotated[
        int,
        Meta(
            description="Direct queries whose client was told 503 or 504, whatever the handler did; "
            "those at which the handler took too long are among `errors` too."
        ),
    ]
    reconnects: Annotated[int, Meta(description="Connections to the node that were lost, or could not be made.")]
    ignored: Annotated[dict[str, int], Meta(description="Frames of the node that meant nothing, by reason.")]
    last_error: Annotated[str, Meta(description="The last thing that went wrong in it; empty when nothing has.")]
    last_errors: Annotated[
        list[LastError],
        Meta(description="The last error of each part of it that had one, the newest first."),
    ]


class Table(msgspec.Struct, frozen=True):
    """What GET /workers answers."""

    workers: list[WorkerRow]


class AgentReady(msgspec.Struct, frozen=True):
    """Whether one of an agent's workers is ready; of each its state, and why it is in it."""

    ready: bool
    workers: dict[str, str]


class Ready(msgspec.Struct, frozen=True):
    """What GET /ready answers."""

    ready: bool
    agents: dict[str, AgentReady]


def last_errors(handler: Mishap | None, connection: Mishap | None, process: Mishap | None) -> list[LastError]:
    """Return what went wrong last in each part of a worker, the newest first."""
    named: dict[ErrorSource, Mishap | None] = {"handler": handler, "connection": connection, "process": process}
    found = [
        LastError(source=source, at=datetime.fromtimestamp(round(each.at_s, 3), UTC), error=each.words)
        for source, each in named.items()
        if each is not None
    ]
    return sorted(found, key=lambda each: each.at, reverse=True)


def ago(at: datetime) -> str:
    """Return how long ago something was, such as `3m 2s ago`."""
    return f"{uptime(max((datetime.now(UTC) - at).total_seconds(), 0.0))} ago"


def readiness(rows: Sequence[WorkerRow], agents: Mapping[str, Sequence[str]]) -> dict[str, AgentReady]:
    """Return how each agent stands; `agents` names their workers."""
    known = {row.name: row for row in rows}
    return {
        agent: AgentReady(
            any(known[name].state == "ready" for name in workers if name in known),
            {name: _state(known[name]) for name in workers if name in known},
        )
        for agent, workers in agents.items()
    }


def _state(row: WorkerRow) -> str:
    return f"{row.state}: {row.detail}" if row.detail else row.state


def why(row: WorkerRow) -> str:
    """Return why a worker is in its state, with what comes next where that is not plain; empty with nothing to say."""
    if row.state != "failed":
        return row.detail
    return f"{row.detail}; it is tried again within a minute".removeprefix("; ")


def brief(text: str, longest: int) -> str:
    """Return a text, or as much of its beginning as there is room for, with a sign that it goes on."""
    return text if len(text) <= longest else f"{text[: longest - 1]}\u2026"


def summary(ready: int, workers: int) -> str:
    """Return one line that says how it stands."""
    return f"{ready} of {workers} worker{'' if workers == 1 else 's'} ready"


def uptime(seconds: float) -> str:
    """Return a time in its two largest units, such as `2d 3h`."""
    left = int(seconds)
    parts: list[str] = []
    for size, unit in _SPANS:
        if left >= size or parts:
            parts.append(f"{left // size}{unit}")
            left %= size
    parts.append(f"{left}s")
    return " ".join(parts[:2])


def latency(seconds: float | None) -> str:
    """Return how long a handler took, with two digits or three, such as `1.3 ms`; nothing for nothing."""
    if seconds is None:
        return ""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:{'.0f' if seconds / size >= 9.95 else '.1f'}} {unit}"
    return f"{seconds * 1e6:.0f} us"


def count(number: int) -> str:
    """Return a number of at most seven characters: `999,999`, then `1.23 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{number:,}"


def rate(per_s: float) -> str:
    """Return queries a second, with a decimal place only where it says something."""
    if per_s >= 99_999.5:
        return count(round(per_s)) if per_s >= 999_999.5 else f"{per_s / 1000:.0f} k"
    return f"{per_s:,.0f}" if per_s >= 9.95 or not per_s else f"{per_s:.1f}"
