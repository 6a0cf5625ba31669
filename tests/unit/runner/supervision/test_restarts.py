"""`runner.supervision.restarts`: OTP's restart intensity with delays, with a fake clock."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.supervision.restarts import Failure, FailureKind, RestartHistory, RestartPolicy
from shared.config.schema import SupervisionSection

IMMEDIATE = (0.0, False)
FAILED = (60.0, True)


def policy_with(**limits: Any) -> RestartPolicy:
    return RestartPolicy(supervision=SupervisionSection(**limits))


class Life:
    """One worker with a fake clock. It dies, and restarts after the delay that was decided."""

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.history = RestartHistory(policy or RestartPolicy())
        self.now_s = 1000.0

    def dies_after(self, up_s: float) -> tuple[float, bool]:
        self.now_s += up_s
        decision = self.history.record_end(self.now_s, up_s)
        self.now_s += decision.delay_s
        return decision


def test_first_restart_is_immediate_and_later_delays_double_up_to_five_seconds() -> None:
    life = Life(policy_with(max_restarts=100))
    delays = [life.dies_after(0.01).delay_s for _ in range(10)]
    assert delays == pytest.approx([0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_eleventh_death_within_a_minute_is_a_failure() -> None:
    life = Life()
    assert [life.dies_after(0.01).failed for _ in range(10)] == [False] * 10
    assert life.dies_after(0.01) == FAILED


def test_failed_worker_is_retried_with_its_full_number_of_restarts() -> None:
    life = Life()
    decisions = [life.dies_after(0.01) for _ in range(22)]
    assert [decision.failed for decision in decisions] == ([False] * 10 + [True]) * 2
    assert decisions[11].delay_s == 0


def test_failure_clears_earlier_restarts_even_in_a_long_window() -> None:
    life = Life(policy_with(max_restarts=1, restart_window_s=86_400))
    assert [life.dies_after(1).failed for _ in range(6)] == [False, True] * 3


def test_restart_counts_only_within_its_window() -> None:
    history = RestartHistory(policy_with(max_restarts=2, restart_window_s=60))
    assert not history.record_end(0, 1).failed
    assert not history.record_end(30, 1).failed
    assert not history.record_end(60, 1).failed
    assert history.record_end(89.9, 1).failed


@pytest.mark.parametrize(("up_s", "delay_s"), [(0.99, 0.4), (1.0, 0.0), (3600.0, 0.0)])
def test_delay_is_reset_after_one_second_of_uptime(up_s: float, delay_s: float) -> None:
    life = Life()
    for _ in range(3):
        life.dies_after(0.01)
    assert life.dies_after(up_s) == (pytest.approx(delay_s), False)


def test_window_counts_restarts_after_the_delay_is_reset() -> None:
    life = Life(policy_with(max_restarts=2, restart_window_s=3600))
    assert life.dies_after(61) == IMMEDIATE
    assert life.dies_after(61) == IMMEDIATE
    assert life.dies_after(61).failed


def test_worker_without_restarts_fails_at_every_death() -> None:
    life = Life(policy_with(max_restarts=0))
    assert [life.dies_after(up_s) for up_s in (0.01, 100, 0.01)] == [FAILED] * 3


def test_deaths_of_one_worker_do_not_count_for_another() -> None:
    policy = policy_with(max_restarts=1)
    first, second = Life(policy), Life(policy)
    assert not first.dies_after(0).failed
    assert first.dies_after(0).failed
    assert second.dies_after(0) == IMMEDIATE


def test_thousandth_restart_waits_no_longer_than_the_maximum_delay() -> None:
    assert RestartPolicy().delay_s(1000) == 5.0
    assert RestartPolicy(second_delay_s=1e-9).delay_s(100_000) == pytest.approx(2**30 * 1e-9)


@given(
    st.integers(0, 12),
    st.floats(1, 120),
    st.lists(st.floats(0, 200), max_size=60),
)
def test_no_window_has_more_restarts_than_its_intensity(
    max_restarts: int, window_s: float, lives: list[float]
) -> None:
    life = Life(policy_with(max_restarts=max_restarts, restart_window_s=window_s))
    granted_s: list[float] = []
    for up_s in lives:
        died_s = life.now_s + up_s
        decision = life.dies_after(up_s)
        if decision.failed:
            assert decision.delay_s == 60
            granted_s.clear()
        else:
            assert 0 <= decision.delay_s <= 5
            granted_s.append(died_s)
        assert sum(died_s - each_s < window_s for each_s in granted_s) <= max_restarts


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (0, "exited"),
        (3, "exited"),
        (-signal.SIGSEGV, "killed"),
        (-99, "killed"),
        (255, "unknown"),
        (None, "unknown"),
    ],
)
def test_exit_status_has_a_kind(code: int | None, kind: FailureKind) -> None:
    assert Failure.from_exit(code).kind == kind


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-99, "killed by signal 99"),
        (255, "status unknown"),
        (None, "status unknown"),
    ],
)
def test_exit_status_has_a_reason(code: int | None, reason: str) -> None:
    assert Failure.from_exit(code).reason == reason
