"""A query on its way through a worker, and its source: the node's connection or the link."""

from __future__ import annotations

from typing import Any, Final, Protocol

from shared.ipc import Outcome, Trace

Answer = tuple[Outcome, bytes]
"""How a query ended. The payload is JSON for `OK`, else a message in UTF-8."""

CANCELLED: Final = (Outcome.CANCELLED, b"")
GIVEN_BACK: Final = (Outcome.GIVEN_BACK, b"")


class Source(Protocol):
    """Where a job came from, and how it wants its answer."""

    def encode(self, result: Any) -> bytes:
        """Return a handler's result as JSON. Called on any thread. May raise anything."""

    def answer(self, job: Job, answer: Answer) -> None:
        """Receive the answer to a job. Called once for each job, on the event loop."""

    def send_answers(self) -> None:
        """Send the answers now, not in the loop's next turn: no other answer is expected soon."""


class Job:
    """One query. Each flag is only ever set, and each has only one writer.

    Attributes:
        source: where the query came from. It gets the answer.
        ticket: what the source needs to recognize the query.
        body: the text of the query.
        size: the characters of the text and the bytes of the ticket, for a job from the node. Zero
            for one from the link: the runner limits these.
        claimed: whether a handler's thread has taken it out of its batch. It may then still be
            skipped. Written on that thread.
        skipped_as: the answer of a job that must not run, because its source cancelled it or it is
            given back. None if it may run. Written on the event loop.
        settled: whether it is answered. Written on the event loop.
        commit_number: the number of the memory that it left.
        durable: whether that memory is on disk.
    """

    # The event loop and a handler's thread share a job without a lock, because taking one would
    # slow down every query. A single state field would have two writers, and one could overwrite
    # what the other has just written. With two flags no write is lost, and the order of writes and
    # reads decides a race:
    #
    #     the loop:    sets `skipped_as`, then reads `claimed`
    #     the thread:  sets `claimed`, then reads `skipped_as`
    #
    # However the two interleave, at least one side sees the other's flag. If only the loop does,
    # the handler runs the query. If only the thread does, the loop has answered, and the thread
    # skips the job. If both do, the thread skips it, and the loop leaves the answer to the thread.
    # If either side read before it wrote, both could miss the other's flag: the handler would run a
    # query that was given back, and another worker would run it, too.
    #
    # A third write belongs to the protocol. A source that cancels a job also empties `body`, so
    # that a long queue does not keep texts that are not needed. It does so after it has set
    # `skipped_as`. The thread reads `body` before `skipped_as`: if it finds that the job is not
    # skipped, the text that it has read is whole.

    __slots__ = (
        "body",
        "claimed",
        "commit_number",
        "durable",
        "settled",
        "size",
        "skipped_as",
        "source",
        "ticket",
    )

    def __init__(
        self,
        source: Source,
        ticket: Any,
        body: str,
        size: int = 0,
    ) -> None:
        self.source = source
        self.ticket = ticket
        self.body = body
        self.size = size
        self.commit_number = 0
        self.durable = False
        self.claimed = False
        self.skipped_as: Answer | None = None
        self.settled = False


class TracedJob(Job):
    """A query from the runner, with its trace. Other jobs do not need the memory of the field."""

    __slots__ = ("trace",)

    def __init__(
        self,
        source: Source,
        ticket: Any,
        body: str,
        trace: Trace,
    ) -> None:
        super().__init__(source, ticket, body)
        self.trace = trace
