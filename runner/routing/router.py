"""Carries queries to workers over ZeroMQ, and their replies back.

Each query is answered exactly once: by its worker's reply, at its deadline, when its worker dies,
or at once if it is refused. `_queries` decides that. This module has the socket and the timer. It
knows nothing about HTTP or processes.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Final

import zmq

from runner.routing._queries import PendingQueries
from runner.routing.peers import OnReply, OnReport, Peer, Pending
from shared import ipc
from shared.config.schema import RunnerSection
from shared.ipc import NO_TRACE, Launch, Outcome, Trace
from shared.logs.logger import LogThrottle, get_logger

_MAX_MESSAGE_BYTES: Final = 1 << 30
"""ZeroMQ disconnects a worker that sends a larger message, before it takes up memory."""

_READ_BYTES: Final = 1 << 20
"""After reading this much from the socket, the rest of the event loop gets its turn."""

_SERVING: Final = frozenset({"connecting", "registering", "ready", "backoff"})
"""The states in which a worker answers direct queries. It needs no node for them."""


class Router:
    """The runner's ROUTER socket, and the queries in flight on it.

    Args:
        socket_path: the Unix socket to listen on, in a folder that only this user can enter.
        limits: how long a query may wait, and how many may wait at once.
        traced: whether to send each query's trace context with it.
    """

    def __init__(
        self,
        socket_path: Path,
        limits: RunnerSection,
        *,
        traced: bool = False,
    ) -> None:
        self.endpoint = f"ipc://{socket_path}"
        self._queries = PendingQueries(
            lambda: self._loop.time(),
            self._schedule_flush,
            limits,
        )
        self._traced = traced
        self._peers: dict[bytes, Peer] = {}
        # Peers with something to send: a set that keeps the order.
        self._dirty: dict[Peer, None] = {}
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._ignored = LogThrottle("message_ignored")
        self._unreachable = LogThrottle("worker_unreachable")
        self._log = get_logger()

    def set_limits(self, limits: RunnerSection) -> None:
        """Change the limits. A shorter timeout also applies to the queries in flight."""
        self._queries.set_limits(limits)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._expire()

    def open(self) -> None:
        """Listen. Call it on the running event loop.

        Raises:
            zmq.ZMQError: if the socket cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # Without this, a ROUTER silently discards what it cannot send: the query would then wait
        # until its deadline instead of being refused at once.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # No limit here, because `max_in_flight` limits how many queries wait in the socket. A
        # second limit would reject queries that the first one has accepted.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Closing must not wait for a worker that does not read.
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.bind(self.endpoint)
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._on_readable)

    def close(self) -> None:
        """Refuse the queries that still wait, and close the socket."""
        self.refuse_all()
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()

    def refuse_all(self) -> None:
        """Answer with an error every query that still waits, because the runner shuts down."""
        self._queries.refuse_all()

    # --- workers start and end ---

    def expect(self, launch: Launch, on_report: OnReport) -> None:
        """Admit the incarnation that `launch` describes, once it presents its key."""
        peer = Peer(launch, on_report)
        peer.last_message_s = self._loop.time()
        self._peers[peer.routing_id] = peer
        if not launch.standby:
            self._queries.assign(peer)

    def drop(self, launch: Launch, reason: str) -> None:
        """Forget an incarnation, and answer with an error every query that it still had.

        Queries that were not sent yet go to another worker, or wait for the next incarnation.
        """
        peer = self._peers.pop(launch.routing_id, None)
        if peer is not None:
            self._dirty.pop(peer, None)
            self._queries.drop(peer, reason)

    def drain(self, launch: Launch, *, hand_over: bool = False) -> bool:
        """Give a worker no more queries, and ask it to exit. Return False if it is unreachable.

        With `hand_over`, new queries for its name are held until a promoted successor is up.
        """
        peer = self._peers.get(launch.routing_id)
        if peer is None or not peer.authenticated:
            return False
        if hand_over:
            self._queries.start_holding(peer.name)
        return peer.draining or self._drain_peer(peer, hand_over=hand_over)

    def promote(self, launch: Launch, memory: bytes | None) -> None:
        """Have an incarnation on standby replace its predecessor, with its memory if any."""
        peer = self._peers.get(launch.routing_id)
        if peer is None:
            # It died on standby, and is restarted as after any other death. Until it is up again,
            # new queries are refused.
            self._queries.stop_holding(launch.spec.name)
            return
        # Its queries stay held until it reports that it serves.
        self._queries.assign(peer)
        self._send(peer, ipc.Promote(memory))

    def refuse_held(self, name: str) -> None:
        """Answer with an error each query held for a worker, as it will not be up soon."""
        self._queries.refuse_held(name)

    def accepts(self, name: str) -> bool:
        """Return whether a worker can be given a query now."""
        return self._queries.accepts(name)

    def silent_for_s(self, launch: Launch) -> float:
        """Return the time since an incarnation's last processed message."""
        peer = self._peers.get(launch.routing_id)
        return 0.0 if peer is None else self._loop.time() - peer.last_message_s

    def restart_silence(self, launch: Launch) -> None:
        """Count an incarnation's silence from now, because the runner did not listen before."""
        peer = self._peers.get(launch.routing_id)
        if peer is not None:
            peer.last_message_s = self._loop.time()

    # --- queries ---

    def submit(
        self,
        name: str,
        query: str,
        on_reply: OnReply,
        alternatives: Sequence[str] = (),
        trace: Trace = NO_TRACE,
    ) -> int | None:
        """Send a query to a worker. `on_reply` is called exactly once, unless it is cancelled.

        Args:
            name: the worker.
            query: its text.
            on_reply: may be called before this returns.
            alternatives: workers that may get it instead, while no handler has started it.
            trace: its trace context.

        Returns:
            The argument for `cancel`, or None if the query was refused.
        """
        if not self._queries.accepts(name):
            # Its report that it is up may wait in the socket: do not refuse in that case.
            self.receive()
        pending = self._queries.submit(name, query, on_reply, alternatives, trace)
        if pending is None:
            return None
        # One timer, for the earliest deadline. Nearly all queries are answered before their
        # deadline, so a timer for each query would usually be created for nothing.
        if self._deadline_timer is None:
            self._deadline_timer = self._loop.call_at(pending.deadline_s, self._expire)
        return pending.sequence

    def cancel(self, sequence: int) -> None:
        """Forget a query whose client has disconnected. `on_reply` is not called."""
        self._queries.cancel(sequence)

    @property
    def max_in_flight(self) -> int:
        """How many queries one worker may have."""
        return self._queries.limits.max_in_flight

    def in_flight_at(self, name: str) -> int:
        """Return how many queries a worker has, or will have once it is up."""
        return self._queries.in_flight_at(name)

    def outcomes_of(self, name: str) -> Mapping[Outcome, int]:
        """Return how many queries to a worker ended with each outcome."""
        return self._queries.outcomes_of(name)

    def _expire(self) -> None:
        """Answer the queries whose deadline has passed, and set the timer for the next one."""
        # Replies that wait in the socket came in time, even if the runner reads them late.
        self.receive()
        expired = self._queries.take_expired()
        # Before the clients are answered: see `take_expired`.
        self._flush()
        try:
            for pending in expired:
                self._queries.finish(
                    pending,
                    Outcome.TIMED_OUT,
                    b"no answer before the deadline",
                )
        finally:
            # Even if a callback raises: without the timer, no later query would expire.
            self._set_timer()

    def _set_timer(self) -> None:
        self._deadline_timer = None
        deadline_s = self._queries.next_deadline_s()
        if deadline_s is not None:
            self._deadline_timer = self._loop.call_at(deadline_s, self._expire)

    # --- the socket ---

    def _schedule_flush(self, peer: Peer) -> None:
        # At the end of the loop's turn: queries that arrive together share one message, and one
        # system call.
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty[peer] = None

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for peer in dirty:
            self._flush_peer(peer)

    def _flush_peer(self, peer: Peer) -> None:
        outbox, peer.outbox = peer.outbox, []
        if peer.cancelled:
            # Some may have been cancelled before they were sent.
            outbox = [pending for pending in outbox if pending.sequence in peer.in_flight]
        if outbox and not self._send(peer, self._message(outbox)):
            for pending in outbox:
                self._queries.finish(
                    pending,
                    Outcome.WORKER_UNAVAILABLE,
                    b"the worker cannot be reached",
                )
        cancelled, peer.cancelled = peer.cancelled, []
        if cancelled:
            self._send(peer, ipc.Cancel(cancelled))

    def _message(self, queries: list[Pending]) -> ipc.Queries:
        items = [(each.sequence, each.query) for each in queries]
        traces = [each.trace for each in queries] if self._traced else []
        return ipc.Queries(items, traces)

    def _send(self, peer: Peer, message: ipc.RunnerMessage) -> bool:
        """Send a message. Return False if the worker is disconnected."""
        try:
            self._socket.send_multipart([peer.routing_id, ipc.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            suppressed = self._unreachable.admit(peer.name)
            if suppressed is not None:
                self._log.warning(
                    "worker_unreachable",
                    error=str(exc),
                    **peer.launch.log_context,
                    **suppressed,
                )
            return False
        # ZeroMQ's descriptor is edge-triggered (zmq_getsockopt, ZMQ_FD): it becomes readable once
        # for new messages, and a send may consume that notification. Without the check, a reply
        # would wait for the next message.
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._on_readable)
        return True

    def _on_readable(self) -> None:
        # The descriptor does not become readable again for the messages that are still unread, see
        # `_send`.
        if self.receive(_READ_BYTES):
            self._loop.call_soon(self._on_readable)

    def receive(self, limit_bytes: float = inf) -> bool:
        """Process the messages that wait in the socket, without waiting for the event loop.

        Stop after about `limit_bytes`. Return whether there may be more.
        """
        read_bytes = 0
        # A message may lead to a callback that closes the socket.
        while read_bytes < limit_bytes and not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            read_bytes += len(parts[-1])
            self._receive(parts)
        return not self._socket.closed

    def _receive(self, parts: list[bytes]) -> None:
        # A worker runs a user's code, which can open its socket and send anything.
        routing_id = parts[0]
        peer = self._peers.get(routing_id)
        if peer is None or len(parts) != 2:
            self._ignore("unknown_peer", routing_id)
            return
        try:
            message = ipc.decode_worker_message(parts[1])
        except Exception:  # noqa: BLE001 - any exception of the decoder means an invalid message
            self._ignore("undecodable", routing_id)
            return
        if isinstance(message, ipc.Hello):
            # Another process could connect under a worker's name. Only the worker itself has the
            # key, and the comparison takes the same time for every wrong one.
            if hmac.compare_digest(message.key, peer.launch.key):
                peer.authenticated = True
        elif peer.authenticated:
            self._on_message(peer, message)
        else:
            self._ignore("no_key", routing_id)

    def _on_message(self, peer: Peer, message: ipc.WorkerMessage) -> None:
        peer.last_message_s = self._loop.time()
        match message:
            case ipc.Replies():
                for sequence, outcome, payload in message.items:
                    self._queries.reply(peer, sequence, outcome, payload)
            case ipc.Status():
                # It may have sent this before it read that it has to drain.
                peer.accepting = message.state in _SERVING and not peer.draining
                if peer.accepting and self._queries.is_assigned(peer):
                    self._queries.release(peer)
            case ipc.Failed():
                # It exits. Queries that it returns from now on must not be given to it again.
                self._stop_new_queries(peer)
            case ipc.DrainRequest() if not peer.draining:
                self._drain_peer(peer)
        if isinstance(message, ipc.Report):
            peer.on_report(peer.launch.incarnation, message)

    def _drain_peer(self, peer: Peer, *, hand_over: bool = False) -> bool:
        # The worker answers the queries that it gets before this message.
        self._flush_peer(peer)
        self._stop_new_queries(peer)
        return self._send(peer, ipc.Drain(hand_over))

    def _stop_new_queries(self, peer: Peer) -> None:
        peer.accepting = False
        peer.draining = True

    def _ignore(self, kind: str, routing_id: bytes) -> None:
        suppressed = self._ignored.admit(kind)
        if suppressed is not None:
            self._log.warning(
                "message_ignored",
                kind=kind,
                # Another process may claim a name of any length.
                sender=repr(routing_id[:80]),
                **suppressed,
            )
