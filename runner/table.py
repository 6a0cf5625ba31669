"""The table of workers, as operators see it: one row each, over HTTP and in a terminal."""

from __future__ import annotations

from typing import Literal

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


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the table of workers; `uptime_s` is its process's, 0 without one."""

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
    errors: int
    reconnects: int
    ignored: dict[str, int]
    last_error: str


class Table(msgspec.Struct, frozen=True):
    """What GET /workers answers."""

    workers: list[WorkerRow]
