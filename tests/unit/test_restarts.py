"""`runner.restarts`: OTP's intensity with delays, on a clock that these tests turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.restarts import Decision, RestartHistory, RestartPolicy


class Life:
    """One worker on a clock of ours: it lives, dies, and is started again when it was decided."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.history = RestartHistory(policy or RestartPolicy())
        self.now_s = 1000.0

    def dies_after(self, up_s: float) -> Decision:
        self.now_s += up_s
        decision = self.history.died(self.now_s, up_s)
        self.now_s += decision.delay_s
        return decision


def test_first_restart_is_immediate_and_the_next_ones_wait_twice_as_long_up_to_five_seconds() -> None:
    life = Life(RestartPolicy(max_restarts=100))
    delays = [life.dies_after(0.01).delay_s for _ in range(10)]
    assert delays == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_ten_restarts_in_a_minute_are_granted_and_the_next_death_is_a_failure() -> None:
    life = Life()
    assert [life.dies_after(0.01).failed for _ in range(10)] == [False] * 10
    assert life.dies_after(0.01) == Decision(60.0, failed=True)


def test_failed_worker_is_tried_again_with_the_whole_intensity_before_it() -> None:
    life = Life()
    decisions = [life.dies_after(0.01) for _ in range(22)]
    assert [decision.failed for decision in decisions] == ([False] * 10 + [True]) * 2
    assert decisions[11].delay_s == 0


def test_failure_forgets_the_restarts_before_it_however_long_the_window() -> None:
    life = Life(RestartPolicy(max_restarts=1, window_s=86_400))
    assert [life.dies_after(1).failed for _ in range(6)] == [False, True] * 3


def test_restart_leaves_the_window_after_its_length() -> None:
    history = RestartHistory(RestartPolicy(max_restarts=2, window_s=60))
    assert not history.died(0, 1).failed
    assert not history.died(30, 1).failed
    assert not history.died(60, 1).failed
    assert history.died(89.9, 1).failed


@pytest.mark.parametrize(("up_s", "delay_s"), [(0.99, 0.4), (1.0, 0.0), (3600.0, 0.0)])
def test_delay_is_forgotten_after_a_second_up(up_s: float, delay_s: float) -> None:
    life = Life()
    for _ in range(3):
        life.dies_after(0.01)
    assert life.dies_after(up_s) == (pytest.approx(delay_s), False)


def test_window_still_counts_what_a_second_up_makes_the_delay_forget() -> None:
    life = Life(RestartPolicy(max_restarts=2, window_s=3600))
    assert life.dies_after(61) == Decision(0.0, failed=False)
    assert life.dies_after(61) == Decision(0.0, failed=False)
    assert life.dies_after(61).failed


def test_worker_without_restarts_fails_at_its_first_death_and_at_every_one() -> None:
    life = Life(RestartPolicy(max_restarts=0))
    assert [life.dies_after(up_s) for up_s in (0.01, 100, 0.01)] == [Decision(60.0, failed=True)] * 3


def test_one_workers_deaths_are_not_its_neighbours() -> None:
    policy = RestartPolicy(max_restarts=1)
    first, second = Life(policy), Life(policy)
    assert not first.dies_after(0).failed
    assert first.dies_after(0).failed
    assert second.dies_after(0) == Decision(0.0, failed=False)


def test_thousandth_restart_in_a_row_waits_no_longer_than_the_longest_delay() -> None:
    assert RestartPolicy().delay_s(1000) == 5.0
    assert RestartPolicy(first_delay_s=1e-9).delay_s(100_000) == pytest.approx(2**30 * 1e-9)


@given(
    st.integers(0, 12),
    st.floats(1, 120),
    st.lists(st.floats(0, 200), max_size=60),
)
def test_no_window_holds_more_restarts_than_its_intensity(
    max_restarts: int, window_s: float, lives: list[float]
) -> None:
    life = Life(RestartPolicy(max_restarts=max_restarts, window_s=window_s))
    granted: list[float] = []
    for up_s in lives:
        died_at = life.now_s + up_s
        decision = life.dies_after(up_s)
        if decision.failed:
            assert decision.delay_s == 60
            granted.clear()
        else:
            assert 0 <= decision.delay_s <= 5
            granted.append(died_at)
        assert sum(died_at - at < window_s for at in granted) <= max_restarts
