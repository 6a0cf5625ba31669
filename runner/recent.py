"""What one worker did in the last five minutes: its queries a second, and how long its handler took."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from shared.ipc import BUCKETS, Counters

STEP_S: Final = 5.0
"""How far apart the points are. A worker tells its counts each second at the most."""

STEPS: Final = 60


class _Point(NamedTuple):
    at_s: float
    queries: int
    durations: tuple[int, ...]


class Recent:
    """The counts of one worker at the ends of the last steps.

    Args:
        now_s: the time on a clock that only goes forward; by then the worker had counted nothing.
    """

    def __init__(self, now_s: float) -> None:
        self._points = deque([_Point(now_s, 0, (0,) * BUCKETS)], maxlen=STEPS + 1)

    def note(self, now_s: float, counted: Counters) -> None:
        """Take what the worker has counted until now."""
        durations = tuple(counted.durations)
        last = self._points[-1].durations
        queries = counted.queries_node + counted.queries_http
        # Of workers at rest one is kept, not sixty.
        self._points.append(_Point(now_s, queries, last if durations == last else durations))

    @property
    def rates(self) -> list[float]:
        """Queries a second in each of the steps, the last one last."""
        return [
            max(after.queries - before.queries, 0) / (after.at_s - before.at_s)
            for before, after in pairwise(self._points)
        ]

    @property
    def rate(self) -> float:
        """Queries a second in the last step; 0.0 before there is one."""
        rates = self.rates
        return rates[-1] if rates else 0.0

    def quantile(self, part: float) -> float | None:
        """Return the time in seconds in which that part of the queries, such as 0.99, was done; None without any."""
        first, last = self._points[0].durations, self._points[-1].durations
        return quantile([after - before for before, after in zip(first, last, strict=True)], part)


def quantile(durations: Sequence[int], part: float) -> float | None:
    """Return a quantile in seconds of durations that are counted by powers of two, see `Counters.durations`.

    Inside of a power of two they are taken to lie evenly on a logarithmic scale: it is never wrong by more than
    a factor of two.
    """
    rank = part * sum(durations)
    if not rank:
        return None
    below = 0
    for exponent, count in enumerate(durations):
        if count and below + count >= rank:
            return float(2.0 ** (exponent - 1 + (rank - below) / count)) / 1e9
        below += count
    raise AssertionError("the counts are not as many as their sum")
