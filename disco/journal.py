"""The node's log lines. Hostile clients can cause many refusals, so lines are counted before they are written."""

from __future__ import annotations

import time
from collections.abc import Callable

from disco.rate import Throttle
from disco.registry import Agent
from shared.logs import get_logger

REFUSALS_PER_WINDOW = 20
CHANGES_PER_WINDOW = 1000
WINDOW_S = 10.0


class Journal:
    """One line for each agent registered, gone or refused; a count of those held back rides on the next.

    Args:
        node: the node's URL, which tells its lines from those of others in this process.
        clock: returns seconds of a monotonic clock.
    """

    def __init__(self, node: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = get_logger("disco").bind(node=node)
        self._clock = clock
        self._refusals = Throttle(REFUSALS_PER_WINDOW, WINDOW_S)
        self._changes = Throttle(CHANGES_PER_WINDOW, WINDOW_S)

    def registered(self, agent: Agent) -> None:
        """Say that `agent` is listed."""
        self._write(self._changes, "info", "agent_registered", agent=agent.name, capabilities=list(agent.capabilities))

    def gone(self, agent: Agent, why: str) -> None:
        """Say that `agent` is no longer listed, and why."""
        self._write(self._changes, "info", "agent_gone", agent=agent.name, why=why)

    def refused(self, why: str, *, agent: str | None = None, address: str | None = None) -> None:
        """Say that a connection or a name was refused. `why` never holds a token."""
        fields = {"agent": agent, "address": address}
        self._write(
            self._refusals,
            "warning",
            "agent_refused",
            why=why,
            **{key: value for key, value in fields.items() if value is not None},
        )

    def _write(self, throttle: Throttle, level: str, event: str, **fields: object) -> None:
        suppressed = throttle.admit(self._clock())
        if suppressed is None:
            return
        if suppressed:
            fields["suppressed"] = suppressed
        getattr(self._log, level)(event, **fields)
