"""`PendingQueries` with a fake clock and without a socket: where queries wait, and how they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runner.routing._queries import PendingQueries
from runner.routing.peers import Peer, Reply
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import parse_node
from shared.config.schema import RunnerSection
from shared.ipc import NO_TRACE, Launch, Outcome

TIMEOUT_MS = 10_000


class Setup:
    """A `PendingQueries` with a fake clock.

    Attributes:
        now_s: the clock's time.
        work: the peers that got work to do.
        replies: all replies to clients.
    """

    def __init__(self, *, max_in_flight: int = 4) -> None:
        self.now_s = 100.0
        self.work: list[Peer] = []
        self.replies: list[Reply] = []
        self.queries = PendingQueries(
            lambda: self.now_s,
            self.work.append,
            RunnerSection(query_timeout_ms=TIMEOUT_MS, max_in_flight=max_in_flight),
        )

    def peer(self, name: str = "echo_server", *, accepting: bool = True) -> Peer:
        """Return a new incarnation that is assigned a worker's queries."""
        handler = HandlerRef("worker.echo", None, "handle", Path("/"))
        agent = Agent(name="echo", handler=handler, nodes=(parse_node("h"),))
        spec = WorkerSpec(name=name, agent=agent, node=agent.nodes[0])
        on_report: Any = None
        peer = Peer(Launch(spec=spec, incarnation=1, endpoint="", key=b"k"), on_report)
        peer.accepting = accepting
        self.queries.assign(peer)
        return peer

    def ask(self, name: str = "echo_server", alternatives: tuple[str, ...] = ()) -> int:
        """Submit a query, and return its sequence number, or 0 if it is refused."""
        pending = self.queries.submit(name, "q", self.replies.append, alternatives, NO_TRACE)
        return 0 if pending is None else pending.sequence

    @property
    def outcomes(self) -> list[Outcome]:
        return [reply.outcome for reply in self.replies]


def sequences(peer: Peer) -> list[int]:
    """Return the queries that a peer has, by their sequence numbers."""
    return list(peer.in_flight)


def test_query_is_in_its_workers_outbox() -> None:
    setup = Setup()
    peer = setup.peer()
    sequence = setup.ask()
    assert [each.sequence for each in peer.outbox] == [sequence]
    assert setup.work == [peer]


def test_query_ends_with_the_first_reply() -> None:
    setup = Setup()
    peer = setup.peer()
    sequence = setup.ask()
    setup.queries.reply(peer, sequence, Outcome.OK, b"1")
    setup.queries.reply(peer, sequence, Outcome.OK, b"2")
    assert setup.replies == [Reply(Outcome.OK, b"1", "echo_server")]
    assert setup.queries.next_deadline_s() is None


def test_query_does_not_expire_before_its_deadline() -> None:
    setup = Setup()
    setup.peer()
    setup.ask()
    assert setup.queries.next_deadline_s() == 110.0
    setup.now_s = 109.9
    assert setup.queries.take_expired() == []


def test_query_expires_at_its_deadline() -> None:
    setup = Setup()
    peer = setup.peer()
    sequence = setup.ask()
    setup.now_s += 5.0
    later = setup.ask()
    setup.now_s = 110.0
    expired = setup.queries.take_expired()
    assert [each.sequence for each in expired] == peer.cancelled == [sequence]
    for pending in expired:
        setup.queries.finish(pending, Outcome.TIMED_OUT, b"late")
    assert setup.queries.next_deadline_s() == 115.0
    assert setup.outcomes == [Outcome.TIMED_OUT]
    assert sequences(peer) == [later]


@pytest.mark.parametrize(("timeout_ms", "deadline_s"), [(60_000, 110.0), (3000, 103.0)])
def test_only_a_shorter_timeout_applies_to_queries_in_flight(
    timeout_ms: int, deadline_s: float
) -> None:
    setup = Setup()
    setup.peer()
    setup.ask()
    setup.queries.set_limits(RunnerSection(query_timeout_ms=timeout_ms))
    assert setup.queries.next_deadline_s() == deadline_s


def test_returned_query_goes_to_another_worker() -> None:
    setup = Setup()
    peer = setup.peer()
    sequence = setup.ask(alternatives=("echo_server_2",))
    peer.accepting = False
    other = setup.peer("echo_server_2")
    setup.queries.reply(peer, sequence, Outcome.GIVEN_BACK, b"")
    assert sequences(other) == [sequence]
    assert setup.replies == []


def test_returned_query_waits_for_the_successor_if_no_other_worker_is_up() -> None:
    setup = Setup()
    peer = setup.peer()
    other = setup.peer("echo_server_2", accepting=False)
    sequence = setup.ask(alternatives=("echo_server_2",))
    peer.accepting = False
    setup.queries.reply(peer, sequence, Outcome.GIVEN_BACK, b"")
    assert sequences(other) == []
    assert setup.queries.in_flight_at("echo_server") == 1
    successor = setup.peer()
    setup.queries.release(successor)
    assert sequences(successor) == [sequence]
    assert setup.replies == []


def test_query_that_was_returned_twice_waits_for_the_successor_of_the_first() -> None:
    setup = Setup()
    peer = setup.peer()
    sequence = setup.ask(alternatives=("echo_server_2",))
    peer.accepting = False
    other = setup.peer("echo_server_2")
    setup.queries.reply(peer, sequence, Outcome.GIVEN_BACK, b"")
    other.accepting = False
    setup.queries.reply(other, sequence, Outcome.GIVEN_BACK, b"")
    successor = setup.peer()
    setup.queries.release(successor)
    assert sequences(successor) == [sequence]
    assert setup.replies == []


def test_outcomes_are_counted_by_worker() -> None:
    setup = Setup(max_in_flight=1)
    peer = setup.peer()
    cancelled = setup.ask()
    assert setup.ask() == 0
    assert setup.ask("unknown") == 0
    setup.queries.cancel(cancelled)
    setup.queries.reply(peer, setup.ask(), Outcome.HANDLER_FAILED, b"ValueError")
    assert setup.outcomes == [
        Outcome.WORKER_BUSY,
        Outcome.WORKER_UNAVAILABLE,
        Outcome.HANDLER_FAILED,
    ]
    assert setup.queries.outcomes_of("echo_server") == {
        Outcome.WORKER_BUSY: 1,
        Outcome.CANCELLED: 1,
        Outcome.HANDLER_FAILED: 1,
    }
