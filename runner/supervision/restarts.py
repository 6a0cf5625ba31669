"""When a worker is restarted. As in Erlang/OTP, restarts are limited. No I/O, no clock."""

from __future__ import annotations

import signal
from collections import deque
from typing import Final, Literal, NamedTuple, get_args

import msgspec

from shared.config.schema import SupervisionSection

FailureKind = Literal[
    "killed",
    "exited",
    "silent",
    "ended_itself",
    "not_up",
    "not_started",
    "unknown",
]
"""How a process ended unexpectedly.

`ended_itself`: it reported why it cannot continue. `exited`: it exited without that. `unknown`: the
fork server died before it sent the status.
"""

ReplacementKind = Literal["configuration", "handler", "limit"]
"""Why a new process replaces another one."""

REPLACEMENT_KINDS: Final = get_args(ReplacementKind)
FAILURE_KINDS: Final = get_args(FailureKind)

_LOST_STATUS: Final = 255
"""What multiprocessing reports if the fork server died before it sent the real exit status."""

_MAX_DOUBLINGS: Final = 30


class Failure(NamedTuple):
    """Why a process ended unexpectedly, or did not start. `reason` is for operators."""

    kind: FailureKind
    reason: str

    @classmethod
    def from_exit(cls, status: int | None) -> Failure:
        """Return what an exit status means, such as `killed by SIGKILL`.

        Args:
            status: as `Process.exitcode`: negative for a signal, None if unknown.
        """
        if status is None or status == _LOST_STATUS:
            return cls("unknown", "status unknown")
        if status >= 0:
            return cls("exited", f"exit status {status}")
        try:
            return cls("killed", f"killed by {signal.Signals(-status).name}")
        except ValueError:  # a real-time signal has no name
            return cls("killed", f"killed by signal {-status}")


class _Decision(NamedTuple):
    """Restart after `delay_s`. If `failed`, there were too many restarts."""

    delay_s: float
    failed: bool


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When one worker is restarted. All times are in seconds.

    Attributes:
        supervision: after more than `max_restarts` in the window, the worker is `failed`.
        retry_s: the delay before a failed worker is restarted.
        second_delay_s, max_delay_s: the first restart is immediate. The next one waits for
            `second_delay_s`, and each later one twice as long, up to `max_delay_s`.
        stable_s: after the end of a worker that was up for this time, the delays start over. The
            end still counts as a restart in the window.
    """

    supervision: SupervisionSection = SupervisionSection()
    # A worker that dies once is restarted immediately. One that dies at each start must not keep a
    # core busy with starts until it has failed.
    second_delay_s: float = 0.1
    max_delay_s: float = 5.0
    stable_s: float = 1.0
    retry_s: float = 60.0

    def delay_s(self, restarts_in_a_row: int) -> float:
        """Return the delay of a restart that follows that many in a row."""
        if restarts_in_a_row == 0:
            return 0.0
        # `max_restarts` may allow a thousand restarts, and 2.0**1024 is too large for a float.
        doublings = min(restarts_in_a_row - 1, _MAX_DOUBLINGS)
        return min(self.max_delay_s, self.second_delay_s * 2.0**doublings)


class RestartHistory:
    """One worker's recent restarts, and the decisions that follow from them."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self._restarts_s: deque[float] = deque()
        self._in_a_row = 0

    def record_end(self, now_s: float, up_s: float) -> _Decision:
        """Record the end of a process, and decide when to restart it.

        Args:
            now_s: the time of its end, on any monotonic clock.
            up_s: how long the worker was up before that; 0.0 if its handler was not loaded.
        """
        policy = self.policy
        window_s = policy.supervision.restart_window_s
        if up_s >= policy.stable_s:
            self._in_a_row = 0
        while self._restarts_s and now_s - self._restarts_s[0] >= window_s:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= policy.supervision.max_restarts:
            # After the retry, `max_restarts` are allowed again. Otherwise a worker with a long
            # window would fail again at its next death, even if the first problem is fixed.
            self._restarts_s.clear()
            self._in_a_row = 0
            return _Decision(policy.retry_s, failed=True)
        delay_s = policy.delay_s(self._in_a_row)
        self._in_a_row += 1
        self._restarts_s.append(now_s)
        return _Decision(delay_s, failed=False)
