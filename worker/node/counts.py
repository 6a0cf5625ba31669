"""What a worker counts at its node: the part of `Counters` that its connections fill in."""

from __future__ import annotations

from shared.ipc import Counters, Outcome


class NodeCounts:
    """What a worker counted at its node, over all its connections.

    Attributes:
        answers: answers by `Outcome`.
        late: answers that came after their connection was lost.
        connection_failures: connections that were lost or failed.
        ignored: invalid or unknown frames, by kind.
    """

    __slots__ = ("answers", "connection_failures", "ignored", "late")

    def __init__(self) -> None:
        self.answers = [0] * len(Outcome)
        self.late = 0
        self.connection_failures = 0
        self.ignored: dict[str, int] = {}

    def write_to(self, counters: Counters) -> None:
        """Set the fields of `counters` that describe the node."""
        # Without a copy: the link encodes the counters at once.
        counters.node_answers = self.answers
        counters.late = self.late
        counters.connection_failures = self.connection_failures
        counters.ignored = self.ignored
