"""When a worker has lived long enough: for agents that leak, a limit on queries or on resident memory."""

from __future__ import annotations

import os
import random
import time
from typing import Final

from shared.config import Agent
from shared.ipc import Counters

JITTER: Final = 0.1
"""Up to this part is left off each limit, so that workers that started together do not leave together."""

ASK_AGAIN_S: Final = 60.0
"""When a worker whose replacement did not come up asks for one again."""

_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")


class Limits:
    """One worker's limits; reaching one is told once a minute."""

    def __init__(self, agent: Agent) -> None:
        self._max_queries = _jittered(agent.max_queries)
        self._max_rss_bytes = _jittered(None if agent.max_rss_mb is None else agent.max_rss_mb * 1024 * 1024)
        self._told_s: float | None = None

    def begin(self) -> str:
        """Look before the first query; return why a limit cannot be held to, in words, or an empty text.

        A successor is no smaller than what it inherits: replacing it would go on for ever.
        """
        if self._max_rss_bytes is not None and (rss := rss_bytes()) >= self._max_rss_bytes:
            self._max_rss_bytes = None
            return f"it holds {rss >> 20} MB before its first query, more than max_rss_mb"
        return ""

    def reached(self, counters: Counters) -> str:
        """Return which limit is reached, in words; empty when none is, or it was told a moment ago."""
        now = time.monotonic()
        if self._told_s is not None and now - self._told_s < ASK_AGAIN_S:
            return ""
        reason = self._look(counters)
        if reason:
            self._told_s = now
        return reason

    def _look(self, counters: Counters) -> str:
        queries = counters.queries_node + counters.queries_http
        if self._max_queries is not None and queries >= self._max_queries:
            return f"it has answered {queries} queries (max_queries)"
        if self._max_rss_bytes is not None and (rss := rss_bytes()) >= self._max_rss_bytes:
            return f"it holds {rss >> 20} MB of memory (max_rss_mb)"
        return ""


def rss_bytes() -> int:
    """Return how much memory of this process is resident."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def _jittered(limit: int | None) -> float | None:
    return None if limit is None else limit * (1 - JITTER * random.random())
