"""What the supervisor knows about one worker at one moment, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from runner.supervision.restarts import FailureKind, ReplacementKind
from runner.table import WorkerRow
from shared.ipc import Counters, Outcome


class Sample(NamedTuple):
    """One worker at one moment.

    Attributes:
        row: the worker as operators see it.
        counted: the counters of all its processes at the present node together.
        restarts, replacements: how many, by kind.
        in_flight, outcomes: its direct queries, as the router counts them.
        silent_s: the time since the last message of its process.
    """

    row: WorkerRow
    counted: Counters
    restarts: Mapping[FailureKind, int]
    in_flight: int
    silent_s: float
    outcomes: Mapping[Outcome, int]
    replacements: Mapping[ReplacementKind, int]
