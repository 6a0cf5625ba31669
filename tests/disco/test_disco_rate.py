"""The limit of connections and queries per second, and of log lines about refusals."""

from __future__ import annotations

from collections import Counter

import pytest

from disco._log import REFUSALS_PER_WINDOW, WINDOW_S, NodeLog
from disco._rate import TokenBucket
from disco._registry import RegisteredAgent
from shared.logs.logger import report_suppressed
from tests.logs import capture_logs


def test_token_bucket_admits_one_second_of_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(2.0)
    assert [bucket.admit(10.0) for _ in range(3)] == [True, True, False]
    assert [bucket.admit(10.5) for _ in range(2)] == [True, False]


def test_token_bucket_below_one_per_second_still_admits_one() -> None:
    bucket = TokenBucket(0.1)
    assert [bucket.admit(at) for at in (0.0, 5.0, 11.0)] == [True, False, True]


def test_token_bucket_without_a_rate_admits_everything() -> None:
    bucket = TokenBucket(None)
    assert all(bucket.admit(0.0) for _ in range(1000))


@pytest.mark.parametrize("clients", [1000])
def test_refusals_of_hostile_clients_do_not_flood_the_log(clients: int) -> None:
    now = 0.0
    with capture_logs() as lines:
        log = NodeLog("ws://127.0.0.1:8080", clock=lambda: now)
        for _ in range(clients):
            log.refused("no token")
        now = WINDOW_S
        log.refused("no token")
    assert len(lines) == REFUSALS_PER_WINDOW + 1
    assert lines[-1]["node"] == "ws://127.0.0.1:8080"
    assert lines[-1]["suppressed"] == clients - REFUSALS_PER_WINDOW


def test_suppressed_changes_are_reported_under_their_event() -> None:
    now = 0.0
    changes = 2000
    with capture_logs() as lines:
        log = NodeLog("ws://127.0.0.1:8080", clock=lambda: now)
        for _ in range(changes):
            log.registered(RegisteredAgent("a", (), 0))
            log.gone(RegisteredAgent("a", (), 0), "it closed")
        logged = Counter(line["event"] for line in lines)
        now = WINDOW_S
        report_suppressed()
    repeated = {line["what"]: line["suppressed"] for line in lines if line["event"] == "repeated"}
    assert set(logged) == {"agent_registered", "agent_gone"}
    assert repeated == {event: changes - count for event, count in logged.items()}
