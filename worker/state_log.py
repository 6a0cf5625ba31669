"""Decides which states of a worker are logged, so that a connection that flaps logs few lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from shared.ipc import WorkerState
from shared.logs.logger import Logger, LogThrottle
from worker.node.losses import Loss

SETTLED_S: Final = 5.0
"""A suppressed state that has lasted this long is logged, unless it is the last one logged."""


class StateLog:
    """Logs the states of one worker.

    A node can cause `ready` and `backoff` without bound. `ready` is logged at most once a minute,
    and `backoff` at most once a minute for each kind of loss. A suppressed state that lasts
    for `SETTLED_S` is logged then, so that the last line in the log is correct again.

    Args:
        log: the logger.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        log: Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._clock = clock
        self._throttles = {
            "ready": LogThrottle("ready", clock=clock),
            "backoff": LogThrottle("backoff", clock=clock),
        }
        self._state: WorkerState = "starting"
        self._loss: Loss | None = None
        self._since_s = clock()
        self._logged: WorkerState = "starting"

    def record(
        self,
        state: WorkerState,
        loss: Loss | None,
    ) -> None:
        """Record a change of state. `loss` is why it is in `backoff`."""
        self._state = state
        self._loss = loss
        self._since_s = self._clock()
        throttle = self._throttles.get(state)
        if state in ("draining", "stopped"):
            self._log.info(state)
        elif throttle is None:
            self._log.debug(state)
        else:
            # By kind, not by reason: the reason may quote the node. A hostile node could send
            # another one each time, and cause a line for each connection.
            kind = "" if loss is None else loss.kind
            suppressed = throttle.admit(kind)
            if suppressed is not None:
                self._write(suppressed)

    def log_if_settled(self) -> None:
        """Log the state if it was suppressed and has lasted. Call it at each heartbeat."""
        if self._state not in self._throttles or self._state == self._logged:
            return
        if self._clock() - self._since_s >= SETTLED_S:
            self._write({})

    def _write(self, suppressed: dict[str, int]) -> None:
        self._logged = self._state
        loss = self._loss
        if loss is None:
            self._log.info(self._state, **suppressed)
        else:
            self._log.warning(
                self._state,
                kind=loss.kind,
                reason=loss.reason,
                **suppressed,
            )
