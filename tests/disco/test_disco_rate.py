from __future__ import annotations

import pytest

from disco.journal import REFUSALS_PER_WINDOW, WINDOW_S, Journal
from disco.rate import Bucket, Throttle
from tests.logs import capture_logs


def test_bucket_admits_a_second_s_worth_at_once_and_then_its_rate() -> None:
    bucket = Bucket(2.0)
    assert [bucket.admit(10.0) for _ in range(3)] == [True, True, False]
    assert [bucket.admit(10.5) for _ in range(2)] == [True, False]


def test_bucket_slower_than_one_a_second_still_admits_one() -> None:
    bucket = Bucket(0.1)
    assert [bucket.admit(at) for at in (0.0, 5.0, 11.0)] == [True, False, True]


def test_bucket_without_a_rate_admits_everything() -> None:
    bucket = Bucket(None)
    assert all(bucket.admit(0.0) for _ in range(1000))


def test_throttle_counts_what_it_holds_back_until_the_next_window() -> None:
    throttle = Throttle(limit=2, window_s=10)
    assert [throttle.admit(at) for at in (0, 1, 2, 3, 10, 11)] == [0, 0, None, None, 2, 0]


@pytest.mark.parametrize("clients", [1000])
def test_refusals_of_hostile_clients_do_not_flood_the_log(clients: int) -> None:
    now = 0.0
    with capture_logs() as lines:
        journal = Journal("ws://127.0.0.1:8080", clock=lambda: now)
        for _ in range(clients):
            journal.refused("no token")
        now = WINDOW_S
        journal.refused("no token")
    assert len(lines) == REFUSALS_PER_WINDOW + 1
    assert lines[-1]["node"] == "ws://127.0.0.1:8080"
    assert lines[-1]["suppressed"] == clients - REFUSALS_PER_WINDOW
