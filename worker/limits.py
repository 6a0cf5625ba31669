"""Limits on a worker's queries and resident memory. A worker that reaches one is replaced."""

from __future__ import annotations

import math
import os
import random
import time
from typing import Final

from shared.config.load import Agent
from shared.ipc import Counters

JITTER: Final = 0.1
"""Each limit is lowered by a random part of itself, up to this.

Otherwise workers that started together would all be replaced together.
"""

ASK_AGAIN_S: Final = 60.0
"""A worker that was not replaced asks for a successor again after this time."""

_PAGE_MB: Final = os.sysconf("SC_PAGESIZE") / (1024 * 1024)


class Limits:
    """The limits of one worker. A limit that the agent does not set is infinite."""

    def __init__(self, agent: Agent) -> None:
        self._max_queries = _jittered(agent.max_queries or math.inf)
        self._max_rss_mb = _jittered(agent.max_rss_mb or math.inf)
        self._next_request_s = 0.0

    def check_at_start(self) -> str | None:
        """Check before the first query. Return why a limit is ignored from now on, or None."""
        rss_mb = _rss_mb()
        limit_mb = self._max_rss_mb
        if rss_mb < limit_mb:
            return None
        # A successor would be as large, because it gets the same agent memory. Workers would be
        # replaced forever.
        self._max_rss_mb = math.inf
        return (
            f"it holds {rss_mb:.0f} MB before its first query, and its limit is {limit_mb:.0f} MB "
            f"(max_rss_mb, lowered by up to {JITTER:.0%})"
        )

    def reached(self, counters: Counters) -> str | None:
        """Return which limit is reached, or None. At most once in `ASK_AGAIN_S`."""
        now_s = time.monotonic()
        if now_s < self._next_request_s:
            return None
        queries = counters.answered_node + counters.answered_direct
        rss_mb = _rss_mb()
        if queries >= self._max_queries:
            reason = f"it has answered {queries} queries (max_queries)"
        elif rss_mb >= self._max_rss_mb:
            reason = f"it holds {rss_mb:.0f} MB of memory (max_rss_mb)"
        else:
            return None
        self._next_request_s = now_s + ASK_AGAIN_S
        return reason


def _rss_mb() -> float:
    """Return the resident memory of this process, as it is now.

    `resource.getrusage` would return the highest that it ever was.
    """
    with open("/proc/self/statm", "rb") as file:
        fields = file.read().split()
    return int(fields[1]) * _PAGE_MB


def _jittered(limit: float) -> float:
    return limit * (1 - JITTER * random.random())
