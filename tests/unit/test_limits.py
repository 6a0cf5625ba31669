"""`worker.limits`: when a worker has lived long enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.config import Agent
from shared.handlers import HandlerRef
from shared.ipc import Counters
from shared.nodes import parse_node
from worker.limits import ASK_AGAIN_S, JITTER, Limits, rss_bytes


def limits(**options: Any) -> Limits:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    return Limits(Agent(name="a", handler=handler, nodes=(parse_node("h"),), **options))


def test_worker_without_limits_reaches_none() -> None:
    assert limits().reached(Counters(node=[1 << 40, 0, 0, 0, 0], http=[1 << 40, 0, 0, 0, 0])) == ""


def test_queries_of_both_kinds_count_and_the_limit_is_told_once() -> None:
    found = limits(max_queries=100)
    assert found.reached(Counters(node=[40, 0, 0, 0, 0], http=[40, 0, 0, 0, 0])) == ""
    assert (
        found.reached(Counters(node=[50, 0, 0, 0, 0], http=[50, 0, 0, 0, 0]))
        == "it has answered 100 queries (max_queries)"
    )
    assert found.reached(Counters(node=[60, 0, 0, 0, 0], http=[60, 0, 0, 0, 0])) == ""


def test_limit_is_reached_early_by_a_tenth_at_the_most_and_not_by_all_at_once() -> None:
    def reached_at() -> int:
        found = limits(max_queries=1000)
        return next(queries for queries in range(1001) if found.reached(Counters(http=[queries, 0, 0, 0, 0])))

    reached = [reached_at() for _ in range(100)]
    assert min(reached) >= 1000 * (1 - JITTER)
    assert max(reached) <= 1000
    assert len(set(reached)) > 10


def test_resident_memory_is_measured_in_bytes_and_held_to_its_limit() -> None:
    ours_mb = rss_bytes() >> 20
    assert 10 < ours_mb < 10_000
    assert "(max_rss_mb)" in limits(max_rss_mb=max(ours_mb // 2, 1)).reached(Counters())
    assert limits(max_rss_mb=ours_mb * 2 + 16).reached(Counters()) == ""


def test_memory_that_is_let_go_is_not_counted() -> None:
    before = rss_bytes()
    eaten = b"x" * (64 << 20)
    assert rss_bytes() - before > 48 << 20
    del eaten
    assert rss_bytes() - before < 48 << 20


def test_worker_that_is_too_large_from_the_start_is_not_replaced_over_and_over() -> None:
    found = limits(max_rss_mb=16)
    assert "before its first query" in found.begin()
    assert found.reached(Counters()) == ""
    assert limits(max_rss_mb=1 << 20).begin() == ""


def test_successor_that_did_not_come_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits(max_queries=1)
    now = 0.0
    monkeypatch.setattr("worker.limits.time.monotonic", lambda: now)
    assert found.reached(Counters(http=[2, 0, 0, 0, 0]))
    now = ASK_AGAIN_S - 1
    assert not found.reached(Counters(http=[2, 0, 0, 0, 0]))
    now = ASK_AGAIN_S
    assert found.reached(Counters(http=[2, 0, 0, 0, 0]))
