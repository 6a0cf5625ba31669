"""When a worker that died is started again: OTP's restart intensity, with delays. Data and arithmetic only."""

from __future__ import annotations

from collections import deque
from typing import Final, Literal, NamedTuple, get_args

import msgspec

RestartReason = Literal["killed", "exited", "silent", "gave_up", "not_up", "not_started", "unknown"]
"""How a process ended unplanned, in a word; `unknown` when the fork server took its status with it."""

ReplacementReason = Literal["configuration", "handler", "limit"]
"""Why a process takes another's place in good order."""

REPLACEMENT_REASONS: Final[tuple[ReplacementReason, ...]] = get_args(ReplacementReason)
RESTART_REASONS: Final[tuple[RestartReason, ...]] = get_args(RestartReason)


class Decision(NamedTuple):
    """What to do about a death: start again after `delay_s`; `failed` when that is a pause after too many."""

    delay_s: float
    failed: bool


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """The rule for one worker; times in seconds.

    More than `max_restarts` in `window_s` is too many: the worker is `failed` and tried again after
    `retry_s`. Within that, the first restart is immediate and the next ones wait `first_delay_s`,
    doubling up to `max_delay_s`: they keep a worker that dies as soon as it starts from spinning. One
    that stayed up for `stable_s` starts from nothing again; the intensity still counts its deaths.
    """

    max_restarts: int = 10
    window_s: float = 60.0
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0
    stable_s: float = 1.0
    retry_s: float = 60.0

    def delay_s(self, restarts_in_a_row: int) -> float:
        """Return how long to wait before the restart that follows so many others."""
        if restarts_in_a_row == 0:
            return 0.0
        # The exponent is bounded, because a window may allow a thousand restarts.
        return float(min(self.max_delay_s, self.first_delay_s * 2 ** min(restarts_in_a_row - 1, 30)))


class RestartHistory:
    """One worker's recent restarts, and the decisions that follow from them."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self._restarts: deque[float] = deque()
        self._in_a_row = 0

    def died(self, now_s: float, up_s: float) -> Decision:
        """Decide about a death at `now_s` (any steady clock) after `up_s` of life."""
        policy = self.policy
        if up_s >= policy.stable_s:
            self._in_a_row = 0
        while self._restarts and now_s - self._restarts[0] >= policy.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= policy.max_restarts:
            self._restarts.clear()
            self._in_a_row = 0
            return Decision(policy.retry_s, failed=True)
        delay_s = policy.delay_s(self._in_a_row)
        self._in_a_row += 1
        self._restarts.append(now_s)
        return Decision(delay_s, failed=False)
