"""The queries in flight: which worker has each, when it expires, and how it ends.

This module is pure: it has no socket, no timer and no event loop. The clock is an argument. The
router sends what is in the peers' outboxes, and reports what the workers reply.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from runner.routing.peers import OnReply, Peer, Pending, Reply
from shared.config.schema import RunnerSection
from shared.ipc import Outcome, Trace


class PendingQueries:
    """Gives queries to workers, and answers each of them exactly once.

    Args:
        clock: returns a time in seconds that never decreases.
        on_outgoing: called with a peer after its outbox or its cancelled queries have grown.
        limits: how long a query may wait, and how many may wait at once.

    Attributes:
        limits: the current limits.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_outgoing: Callable[[Peer], None],
        limits: RunnerSection,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._on_outgoing = on_outgoing
        # By worker name: the incarnation that gets its queries.
        self._assigned: dict[str, Peer] = {}
        # By sequence number. All queries have the same timeout, so the order of arrival is the
        # order of deadlines.
        self._pending: dict[int, Pending] = {}
        # By worker name: queries that no incarnation has.
        self._held: dict[str, dict[int, Pending]] = {}
        # Names of workers that a successor replaces. New queries for them are held.
        self._awaiting_successor: set[str] = set()
        # By worker name. No entry is removed: counters of /metrics must not decrease, also if a
        # reload removes a worker and a later one adds it again.
        self._outcomes: defaultdict[str, Counter[Outcome]] = defaultdict(Counter)
        self._sequence = 0

    def set_limits(self, limits: RunnerSection) -> None:
        """Change the limits. A shorter timeout also applies to the queries in flight."""
        self.limits = limits
        latest_s = self._new_deadline_s()
        # A longer timeout changes no deadline. Their order therefore stays the order of arrival.
        for pending in self._pending.values():
            pending.deadline_s = min(pending.deadline_s, latest_s)

    # --- workers start and end ---

    def assign(self, peer: Peer) -> None:
        """Give new queries for a worker to this incarnation from now on."""
        self._assigned[peer.name] = peer

    def is_assigned(self, peer: Peer) -> bool:
        """Return whether new queries for a worker are given to this incarnation."""
        return self._assigned.get(peer.name) is peer

    def drop(self, peer: Peer, reason: str) -> None:
        """Answer with an error each query of an incarnation that has ended.

        Those that were not sent yet go to another worker, or wait for the next incarnation.
        """
        # First, so that `_reroute` below does not give this incarnation its unsent queries again.
        if self.is_assigned(peer):
            del self._assigned[peer.name]
            # A draining one may have a successor that is not up yet: new queries stay held for it.
            if not peer.draining:
                self.stop_holding(peer.name)
        # A query that was sent may have been handled, and a handler may have side effects: it is
        # not given to another worker. One that was not sent can be.
        unsent, peer.outbox = peer.outbox, []
        for pending in unsent:
            if pending.sequence in peer.in_flight:
                self._reroute(pending)
        for pending in list(peer.in_flight.values()):
            self.finish(pending, Outcome.WORKER_UNAVAILABLE, reason.encode())

    def start_holding(self, name: str) -> None:
        """Hold the queries for a worker until its successor is up."""
        self._awaiting_successor.add(name)

    def stop_holding(self, name: str) -> None:
        """Refuse new queries for a worker until it is up. The held ones stay held."""
        self._awaiting_successor.discard(name)

    def release(self, peer: Peer) -> None:
        """Give a worker that is up the queries that were held for it."""
        self.stop_holding(peer.name)
        for pending in self._held.pop(peer.name, {}).values():
            self._place(pending, peer)

    def refuse_held(self, name: str) -> None:
        """Answer with an error each query held for a worker, as it will not be up soon."""
        self.stop_holding(name)
        for pending in self._held.pop(name, {}).values():
            self.finish(pending, Outcome.WORKER_UNAVAILABLE, b"the worker is not up")

    def refuse_all(self) -> None:
        """Answer with an error every query that still waits, because the runner shuts down."""
        for pending in list(self._pending.values()):
            self.finish(
                pending,
                Outcome.WORKER_UNAVAILABLE,
                b"the runner is shutting down",
            )

    def accepts(self, name: str) -> bool:
        """Return whether a worker can be given a query now."""
        return self._accepting_peer(name) is not None or name in self._awaiting_successor

    def in_flight_at(self, name: str) -> int:
        """Return how many queries a worker has, or will have once it is up."""
        count = len(self._held.get(name, ()))
        peer = self._assigned.get(name)
        if peer is not None:
            count += len(peer.in_flight)
        return count

    def outcomes_of(self, name: str) -> Mapping[Outcome, int]:
        """Return how many queries to a worker ended with each outcome."""
        return self._outcomes.get(name, {})

    # --- queries ---

    def submit(
        self,
        name: str,
        query: str,
        on_reply: OnReply,
        alternatives: Sequence[str],
        trace: Trace,
    ) -> Pending | None:
        """Give a query to a worker, or hold it. See `Router.submit`."""
        peer = self._accepting_peer(name)
        refusal = self._check(name, peer)
        if refusal is not None:
            self._count(name, refusal.outcome)
            on_reply(refusal)
            return None
        self._sequence += 1
        pending = Pending(
            self._sequence,
            name,
            query,
            self._new_deadline_s(),
            on_reply,
            alternatives,
            trace,
        )
        self._pending[pending.sequence] = pending
        if peer is None:
            self._hold(pending)
        else:
            self._place(pending, peer)
        return pending

    def cancel(self, sequence: int) -> None:
        """Forget a query whose client has disconnected. `on_reply` is not called."""
        pending = self._pending.pop(sequence, None)
        if pending is not None:
            self._withdraw(pending)
            self._count(pending.name, Outcome.CANCELLED)

    def reply(
        self,
        peer: Peer,
        sequence: int,
        outcome: Outcome,
        payload: bytes,
    ) -> None:
        """Answer a query with a worker's reply, or give one that is given back to another."""
        # Only the peer's own queries: no worker can answer for another one. A query that expired
        # or was cancelled is no longer among them.
        pending = peer.in_flight.get(sequence)
        if pending is None:
            return
        if outcome is Outcome.GIVEN_BACK:
            self._reroute(pending)
        else:
            self.finish(pending, outcome, payload)

    def finish(self, pending: Pending, outcome: Outcome, payload: bytes) -> None:
        """Answer a query, unless it was answered or cancelled before."""
        # Callers finish several queries in a loop, and an earlier one's `on_reply` may have
        # cancelled this one.
        if self._pending.pop(pending.sequence, None) is None:
            return
        self._remove(pending)
        # A query that was given back may have been answered by another worker than the one asked.
        name = pending.name if pending.peer is None else pending.peer.name
        self._count(name, outcome)
        pending.on_reply(Reply(outcome, payload, name))

    def take_expired(self) -> list[Pending]:
        """Withdraw the expired queries from their workers. The caller finishes them."""
        # Not finished here: the router first sends the workers that they are cancelled. No worker
        # may start a query after its client got 504.
        now_s = self._clock()
        expired = list(
            takewhile(
                lambda pending: pending.deadline_s <= now_s,
                self._pending.values(),
            )
        )
        for pending in expired:
            self._withdraw(pending)
        return expired

    def next_deadline_s(self) -> float | None:
        """Return when the next query expires, or None if there is no query."""
        for pending in self._pending.values():
            return pending.deadline_s
        return None

    def _new_deadline_s(self) -> float:
        return self._clock() + self.limits.query_timeout_ms / 1000

    def _accepting_peer(self, name: str) -> Peer | None:
        """Return the incarnation that takes new queries for a worker, or None."""
        peer = self._assigned.get(name)
        return peer if peer is not None and peer.accepting else None

    def _check(self, name: str, peer: Peer | None) -> Reply | None:
        """Return why a worker cannot be given a query now, or None."""
        if peer is not None:
            waiting = len(peer.in_flight)
        elif name in self._awaiting_successor:
            waiting = len(self._held.get(name, ()))
        else:
            return Reply(
                Outcome.WORKER_UNAVAILABLE,
                b"the worker is not up",
                name,
            )
        # A slow handler, or many clients, must not fill the runner's memory. The limit for one
        # worker keeps it from using up the limit for all.
        if waiting >= self.limits.max_in_flight:
            return Reply(
                Outcome.WORKER_BUSY,
                b"the worker's queue is full (max_in_flight)",
                name,
            )
        if len(self._pending) >= self.limits.max_in_flight_total:
            return Reply(
                Outcome.WORKER_BUSY,
                b"the runner's queue is full (max_in_flight_total)",
                name,
            )
        return None

    def _place(self, pending: Pending, peer: Peer) -> None:
        """Give a query to an incarnation."""
        pending.peer = peer
        peer.in_flight[pending.sequence] = pending
        peer.outbox.append(pending)
        self._on_outgoing(peer)

    def _reroute(self, pending: Pending) -> None:
        """Give a query that no handler has started to a worker that is up, or hold it."""
        self._remove(pending)
        pending.peer = None
        # The worker that was asked comes first: its successor may be up already.
        for name in (pending.name, *pending.alternatives):
            peer = self._accepting_peer(name)
            if peer is not None and len(peer.in_flight) < self.limits.max_in_flight:
                self._place(pending, peer)
                return
        # Not refused: its client was accepted, and gets 504 at the deadline at the latest.
        self._hold(pending)

    def _hold(self, pending: Pending) -> None:
        self._held.setdefault(pending.name, {})[pending.sequence] = pending

    def _withdraw(self, pending: Pending) -> None:
        """Free a query's place. Its worker will skip it if the handler has not started it."""
        self._remove(pending)
        if pending.peer is not None:
            pending.peer.cancelled.append(pending.sequence)
            self._on_outgoing(pending.peer)

    def _remove(self, pending: Pending) -> None:
        peer = pending.peer
        holder = self._held.get(pending.name, {}) if peer is None else peer.in_flight
        holder.pop(pending.sequence, None)

    def _count(self, name: str, outcome: Outcome) -> None:
        self._outcomes[name][outcome] += 1
