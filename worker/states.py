"""Which of a worker's states are logged: each change once; of a connection that flaps, how it stands now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, Final

from shared.ipc import WorkerState
from shared.logs import Folded, Logger

SETTLED_S: Final = 5.0
"""How long a state lasts before it is logged although others like it just were."""

_KIND: Final = re.compile("[:(]")


class StateLog:
    """The lines of one worker about its states.

    What comes and goes with the connection, `ready` and `backoff`, is logged once a minute for each reason. Still the
    last line is never wrong for long: a state that it does not tell of is told of once it has lasted.

    Args:
        log: where to.
        clock: seconds that only go forward.
    """

    def __init__(self, log: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._folded = Folded(clock=clock)
        self._now: tuple[WorkerState, str] = ("starting", "")
        self._since_s = clock()
        self._told = ""

    def note(self, state: WorkerState, detail: str) -> None:
        """Take a change of state; `detail` says why, or is empty."""
        self._now, self._since_s = (state, detail), self._clock()
        if state in ("draining", "stopped"):
            self._log.info(state)
        elif state not in ("ready", "backoff"):
            self._log.debug(state)
        else:
            # By kind, not by the node's own words: it could say something new each time.
            held = self._folded.admit(f"{state} {_KIND.split(detail)[0]}".strip())
            if held is not None:
                self._tell(held)

    def catch_up(self) -> None:
        """Tell of what was held back, once it lasts or its time is up. To be called now and then."""
        for what, held in self._folded.overdue():
            self._log.info("state_repeated", state=what, more=held)
        state = self._now[0]
        if state in ("ready", "backoff") and state != self._told and self._clock() - self._since_s >= SETTLED_S:
            self._tell(0)

    def _tell(self, held: int) -> None:
        state, detail = self._now
        self._told = state
        more: dict[str, Any] = {"like_it_before": held} if held else {}
        if state == "backoff":
            self._log.warning(state, reason=detail, **more)
        else:
            self._log.info(state, **more)
