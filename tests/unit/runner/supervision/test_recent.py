"""`runner.supervision.recent`: rate and latency of a worker in the last five minutes."""

from __future__ import annotations

import random

import pytest

from runner.supervision.recent import STEPS, Recent
from shared.ipc import Counters


def counted(durations_s: list[float]) -> Counters:
    found = Counters(direct_answers=[len(durations_s), 0, 0, 0])
    for duration_s in durations_s:
        found.durations[int(duration_s * 1e9).bit_length()] += 1
    return found


def quantile(durations_s: list[float], part: float) -> float | None:
    recent = Recent(0.0)
    recent.record(5.0, counted(durations_s))
    return recent.quantile(part)


def test_rate_is_that_of_the_last_step() -> None:
    recent = Recent(100.0)
    assert (recent.rate, recent.rates) == (0.0, [])
    recent.record(105.0, Counters(node_answers=[10, 0, 0, 0], direct_answers=[0, 5, 0, 0]))
    assert recent.rate == 3.0
    recent.record(107.0, Counters(node_answers=[10, 0, 0, 0], direct_answers=[0, 5, 0, 0]))
    assert recent.rates == [3.0, 0.0]


def test_only_the_last_five_minutes_are_kept() -> None:
    recent = Recent(0.0)
    for step in range(1, 3 * STEPS):
        recent.record(5.0 * step, Counters(direct_answers=[step, 0, 0, 0]))
    assert recent.rates == [0.2] * STEPS


def test_quantiles_exclude_queries_older_than_five_minutes() -> None:
    recent = Recent(0.0)
    assert recent.quantile(0.5) is None
    slow = counted([10.0] * 1000)
    recent.record(5.0, slow)
    assert 8 <= recent.quantile(0.5) <= 16
    both = counted([10.0] * 1000 + [0.001] * 10)
    for step in range(2, STEPS + 3):
        recent.record(5.0 * step, both)
    # No query came in the last five minutes.
    assert recent.quantile(0.99) is None
    both.durations[int(1e6).bit_length()] += 10
    recent.record(5.0 * (STEPS + 3), both)
    assert recent.quantile(0.99) < 0.002


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_quantile_of_many_durations_is_close_to_the_exact_one(part: float) -> None:
    generator = random.Random(7)
    durations_s = sorted(generator.lognormvariate(-6, 1.2) for _ in range(10_000))
    exact_s = durations_s[int(part * len(durations_s)) - 1]
    assert quantile(durations_s, part) == pytest.approx(exact_s, rel=0.25)


@pytest.mark.parametrize("duration_s", [2e-6, 0.0009765625, 0.5, 1.0, 60.0])
def test_quantile_of_one_duration_is_within_a_factor_of_two(duration_s: float) -> None:
    found_s = quantile([duration_s], 0.5)
    assert duration_s / 2 <= found_s <= 2 * duration_s


def test_quantile_without_durations_is_none() -> None:
    assert quantile([], 0.5) is None
