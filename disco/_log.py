"""The log lines of a node. They are throttled, because hostile clients can cause any number."""

from __future__ import annotations

import time
from collections.abc import Callable

from disco._registry import RegisteredAgent
from shared.logs.logger import LogThrottle, get_logger

REFUSALS_PER_WINDOW = 20
# More than refusals: a test or demo with hundreds of agents should see each of them. The limit
# still bounds the lines of a client that registers and disconnects in a loop.
_CHANGES_PER_WINDOW = 1000
_LIMITS = {
    "agent_registered": _CHANGES_PER_WINDOW,
    "agent_gone": _CHANGES_PER_WINDOW,
    "agent_refused": REFUSALS_PER_WINDOW,
}
WINDOW_S = 10.0


class NodeLog:
    """Logs agents that are registered, gone or refused, up to a number of lines per window.

    The other lines are suppressed. The next line of their event has their number. If none follows
    soon after the window, `report_suppressed` logs the number.

    Args:
        node: the node's URL. It distinguishes the nodes of one process.
        clock: returns seconds of a monotonic clock.
    """

    def __init__(
        self,
        node: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._log = get_logger().bind(node=node)
        # A throttle for each event: a flood of refusals must not hide the agents that come and go.
        self._throttles = {
            event: LogThrottle(
                event,
                limit=limit,
                window_s=WINDOW_S,
                clock=clock,
            )
            for event, limit in _LIMITS.items()
        }

    def registered(self, agent: RegisteredAgent) -> None:
        """Log that `agent` is registered."""
        self._write(
            "info",
            "agent_registered",
            agent=agent.name,
            capabilities=list(agent.capabilities),
        )

    def gone(self, agent: RegisteredAgent, reason: str) -> None:
        """Log that `agent` is no longer registered."""
        self._write(
            "info",
            "agent_gone",
            agent=agent.name,
            reason=reason,
        )

    def refused(
        self,
        reason: str,
        **peer: str,
    ) -> None:
        """Log that a connection or a name was refused.

        Args:
            reason: the reason. It never contains a token.
            peer: what is known of the client, such as `agent` and `address`.
        """
        self._write(
            "warning",
            "agent_refused",
            reason=reason,
            **peer,
        )

    def _write(
        self,
        level: str,
        event: str,
        **fields: object,
    ) -> None:
        # One key for all clients. With a key for each name, a client could send many names, and
        # each would have its own limit.
        suppressed = self._throttles[event].admit(self._node)
        if suppressed is not None:
            getattr(self._log, level)(event, **fields, **suppressed)
