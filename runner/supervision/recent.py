"""One worker's last five minutes: its queries per second, and how long its handler took."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from operator import sub
from typing import Final, NamedTuple

from shared.ipc import BUCKETS, Counters

STEP_S: Final = 5.0
"""The time between two points: longer than that between two heartbeats of a busy worker."""

STEPS: Final = 60
"""How many steps are kept: five minutes."""


class _Point(NamedTuple):
    at_s: float
    queries: int
    durations: tuple[int, ...]


class Recent:
    """The counts of one worker at the ends of the last `STEPS` steps.

    Args:
        now_s: the time on a monotonic clock. Before it, the worker has counted nothing.
    """

    def __init__(self, now_s: float) -> None:
        start = _Point(now_s, 0, (0,) * BUCKETS)
        self._points = deque([start], maxlen=STEPS + 1)

    def record(self, now_s: float, counted: Counters) -> None:
        """Record what the worker has counted until now."""
        durations = tuple(counted.durations)
        # An idle worker keeps one tuple of 64 numbers, not sixty equal ones.
        last = self._points[-1].durations
        if durations == last:
            durations = last
        queries = counted.answered_node + counted.answered_direct
        self._points.append(_Point(now_s, queries, durations))

    @property
    def rates(self) -> list[float]:
        """Queries per second in each step, the last step last."""
        return [
            (after.queries - before.queries) / (after.at_s - before.at_s)
            for before, after in pairwise(self._points)
        ]

    @property
    def rate(self) -> float:
        """Queries per second in the last step; 0.0 before the first step has ended."""
        rates = self.rates
        return rates[-1] if rates else 0.0

    def quantile(self, fraction: float) -> float | None:
        """Return a quantile of the durations in seconds; None without queries.

        It is wrong by a factor of two at most.

        Args:
            fraction: which quantile, such as 0.99.
        """
        first = self._points[0].durations
        last = self._points[-1].durations
        durations = list(map(sub, last, first))
        rank = fraction * sum(durations)
        if not rank:
            return None
        below = 0
        for exponent, count in enumerate(durations):
            if count and below + count >= rank:
                # Within a power of two the durations are assumed to be spread evenly on a
                # logarithmic scale. That is more accurate than to return either end of the range.
                share = (rank - below) / count
                nanoseconds = 2.0 ** (exponent - 1 + share)
                return float(nanoseconds) / 1e9
            below += count
        raise AssertionError("the rank is above the number of durations")
