"""The table of workers, as operators see it: over HTTP, in a terminal and on the page, in the same words."""

from __future__ import annotations

from typing import Final, Literal, get_args

import msgspec

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


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of workers.

    Attributes:
        name: the worker's name.
        agent: its agent's name.
        node: its node's address.
        state: what it is at.
        detail: why it is in this state, in words; empty when there is nothing to say.
        pid: its process, null without one.
        incarnation: the number of its process, from 1.
        uptime_s: how long its process runs, 0 without one.
        restarts: how often its process ended unplanned.
        queries: how many queries it answered since the runner began; of its node and over HTTP together.
        queries_node: those of its node.
        queries_http: those over HTTP.
        queries_per_s: how many a second in the last five seconds.
        p50_s: in what time the handler did half of the last five minutes' queries; null without any.
        p99_s: in what time 99 of 100.
        errors: queries whose handler failed or took too long.
        reconnects: connections to the node that were lost, or not had.
        ignored: frames of the node that meant nothing, by reason.
        last_error: the last thing that went wrong in it.
    """

    name: str
    agent: str
    node: str
    state: ChildState
    detail: str
    pid: int | None
    incarnation: int
    uptime_s: float
    restarts: int
    queries: int
    queries_node: int
    queries_http: int
    queries_per_s: float
    p50_s: float | None
    p99_s: float | None
    errors: int
    reconnects: int
    ignored: dict[str, int]
    last_error: str


class Table(msgspec.Struct, frozen=True):
    """What GET /workers answers."""

    workers: list[WorkerRow]


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
            return f"{seconds / size:{'.0f' if seconds / size >= 10 else '.1f'}} {unit}"
    return f"{seconds * 1e6:.0f} us"


def rate(per_s: float) -> str:
    """Return queries a second, with a decimal place only where it says something."""
    return f"{per_s:,.0f}" if per_s >= 10 or not per_s else f"{per_s:.1f}"
