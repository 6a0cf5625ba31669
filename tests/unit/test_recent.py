"""`runner.recent`: the last five minutes of a worker."""

from __future__ import annotations

import random

import pytest

from runner.recent import STEPS, Recent, quantile
from shared.ipc import BUCKETS, Counters


def counted(durations_s: list[float]) -> Counters:
    found = Counters(http=[len(durations_s), 0, 0, 0])
    for duration_s in durations_s:
        found.durations[int(duration_s * 1e9).bit_length()] += 1
    return found


def test_rate_is_that_of_the_last_step() -> None:
    recent = Recent(100.0)
    assert (recent.rate, recent.rates) == (0.0, [])
    recent.note(105.0, Counters(node=[10, 0, 0, 0], http=[0, 5, 0, 0]))
    assert recent.rate == 3.0
    recent.note(107.0, Counters(node=[10, 0, 0, 0], http=[0, 5, 0, 0]))
    assert recent.rates == [3.0, 0.0]


def test_five_minutes_are_remembered_and_no_more() -> None:
    recent = Recent(0.0)
    for step in range(1, 3 * STEPS):
        recent.note(5.0 * step, Counters(http=[step, 0, 0, 0]))
    assert recent.rates == [0.2] * STEPS


def test_quantiles_forget_what_is_older_than_five_minutes() -> None:
    recent = Recent(0.0)
    assert recent.quantile(0.5) is None
    slow = counted([10.0] * 1000)
    recent.note(5.0, slow)
    assert 8 <= recent.quantile(0.5) <= 16
    both = counted([10.0] * 1000 + [0.001] * 10)
    for step in range(2, STEPS + 3):
        recent.note(5.0 * step, both)
    assert recent.quantile(0.99) is None, "nothing was asked in five minutes"
    both.durations[int(1e6).bit_length()] += 10
    recent.note(5.0 * (STEPS + 3), both)
    assert recent.quantile(0.99) < 0.002


@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_quantile_of_many_is_about_right(part: float) -> None:
    chance = random.Random(7)
    durations_s = sorted(chance.lognormvariate(-6, 1.2) for _ in range(10_000))
    exact_s = durations_s[int(part * len(durations_s)) - 1]
    assert quantile(counted(durations_s).durations, part) == pytest.approx(exact_s, rel=0.25)


@pytest.mark.parametrize("duration_s", [2e-6, 0.0009765625, 0.5, 1.0, 60.0])
def test_quantile_of_one_is_within_its_power_of_two(duration_s: float) -> None:
    found_s = quantile(counted([duration_s]).durations, 0.5)
    assert duration_s / 2 <= found_s <= 2 * duration_s


def test_quantile_of_none_is_none() -> None:
    assert quantile([0] * BUCKETS, 0.5) is None
