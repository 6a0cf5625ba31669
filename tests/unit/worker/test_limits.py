"""`worker.limits`: when a worker has reached a limit and needs a successor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.config.handlers import HandlerRef
from shared.config.load import Agent
from shared.config.nodes import parse_node
from shared.ipc import Counters
from worker.limits import ASK_AGAIN_S, JITTER, Limits


def limits(**options: Any) -> Limits:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    return Limits(Agent(name="a", handler=handler, nodes=(parse_node("h"),), **options))


def counted(*, node: int = 0, direct: int = 0) -> Counters:
    """Return the counters of a worker that has answered these numbers of queries."""
    return Counters(node_answers=[node, 0, 0, 0, 0], direct_answers=[direct, 0, 0, 0, 0])


def test_worker_without_limits_reaches_none() -> None:
    assert limits().reached(counted(node=1 << 40, direct=1 << 40)) is None


def test_queries_from_the_node_and_direct_ones_count_together() -> None:
    found = limits(max_queries=100)
    assert found.reached(counted(node=40, direct=40)) is None
    assert found.reached(counted(node=50, direct=50)) is not None


def test_reached_limit_is_reported_once() -> None:
    found = limits(max_queries=100)
    assert found.reached(counted(direct=100)) is not None
    assert found.reached(counted(direct=120)) is None


@pytest.mark.message_text
def test_reason_names_the_number_of_queries_and_the_setting() -> None:
    reason = limits(max_queries=100).reached(counted(node=50, direct=50))
    assert reason == "it has answered 100 queries (max_queries)"


def test_workers_reach_their_limits_spread_over_the_last_tenth() -> None:
    def reached_at() -> int:
        found = limits(max_queries=1000)
        return next(queries for queries in range(1001) if found.reached(counted(direct=queries)))

    reached = [reached_at() for _ in range(100)]
    assert min(reached) >= 1000 * (1 - JITTER)
    assert max(reached) <= 1000
    assert len(set(reached)) > 10


def test_resident_memory_above_its_limit_is_reported() -> None:
    current_mb = psutil.Process().memory_info().rss >> 20
    assert limits(max_rss_mb=max(current_mb // 2, 1)).reached(Counters()) is not None
    assert limits(max_rss_mb=current_mb * 2 + 16).reached(Counters()) is None


@pytest.mark.message_text
def test_reason_names_the_setting_for_memory() -> None:
    reason = limits(max_rss_mb=1).reached(Counters())
    assert reason is not None
    assert "(max_rss_mb)" in reason


def test_freed_memory_is_not_counted() -> None:
    limit_mb = (psutil.Process().memory_info().rss >> 20) + 128
    allocated = b"x" * (256 << 20)
    assert limits(max_rss_mb=limit_mb).reached(Counters()) is not None
    del allocated
    assert limits(max_rss_mb=limit_mb).reached(Counters()) is None


def test_worker_that_starts_above_its_memory_limit_is_not_replaced() -> None:
    found = limits(max_rss_mb=16)
    assert found.check_at_start() is not None
    assert found.reached(Counters()) is None


def test_memory_limit_that_is_not_reached_at_the_start_stays() -> None:
    assert limits(max_rss_mb=1 << 20).check_at_start() is None


@pytest.mark.message_text
def test_reason_at_the_start_says_that_no_query_was_answered() -> None:
    reason = limits(max_rss_mb=16).check_at_start()
    assert reason is not None
    assert "before its first query" in reason


@pytest.mark.message_text
def test_reason_at_the_start_names_the_limit_that_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("worker.limits.random.random", lambda: 1.0)
    max_rss_mb = round(psutil.Process().memory_info().rss / (1 << 20) * 1.05)
    reason = limits(max_rss_mb=max_rss_mb).check_at_start()
    assert reason is not None
    assert f"its limit is {max_rss_mb * (1 - JITTER):.0f} MB" in reason


def test_missing_successor_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = limits(max_queries=1)
    now_s = 0.0
    monkeypatch.setattr("worker.limits.time.monotonic", lambda: now_s)
    assert found.reached(counted(direct=2))
    now_s = ASK_AGAIN_S - 1
    assert not found.reached(counted(direct=2))
    now_s = ASK_AGAIN_S
    assert found.reached(counted(direct=2))
