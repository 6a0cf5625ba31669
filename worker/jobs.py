"""A query on its way through a worker, wherever it came from."""

from __future__ import annotations

from typing import Any, Final, Protocol

from shared.ipc import Outcome

CANCELLED: Final = (Outcome.CANCELLED, b"")
RETURNED: Final = (Outcome.RETURNED, b"")
Answer = tuple[Outcome, bytes]


class Source(Protocol):
    """Where a job came from, and how it wants its answer."""

    def encode(self, result: Any) -> bytes:
        """Return a handler's result as JSON. May be called on any thread; may raise anything."""

    def answer(self, job: Job, answer: Answer) -> None:
        """Take the answer. Called once a job, on the event loop."""

    def flush(self) -> None:
        """Send the answers now rather than with the loop's next turn: for the moment there are no others."""


class Job:
    """One query. `ticket` is whatever its source needs to know it again, `size` the length of its text and ticket.

    `cancelled` is set by a source that wants it no more; `begun` when the handler gets it; `settled`
    when it is answered. `commit` is the number of the memory it left, `durable` whether that is on disk.
    """

    __slots__ = ("begun", "body", "cancelled", "commit", "durable", "settled", "size", "source", "ticket")

    def __init__(self, source: Source, ticket: Any, body: str, size: int = 0) -> None:
        self.source = source
        self.ticket = ticket
        self.body = body
        self.size = size
        self.commit = 0
        self.durable = False
        self.begun = False
        self.cancelled = False
        self.settled = False
