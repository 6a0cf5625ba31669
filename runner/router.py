"""Routes queries to named workers over ZeroMQ, and their replies back.

A query is answered exactly once: by its worker's reply, by its deadline, by the worker's death, or
by a refusal at once. Whatever one loop turn gathers for a worker leaves as one message. Nothing
here knows of HTTP or of processes.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from math import inf
from pathlib import Path
from typing import Final

import zmq

from runner.lines import Ending, Line, Listener, OnReply, Pending, Reply
from shared import ipc
from shared.ipc import NO_TRACE, Launch, Outcome, Trace
from shared.logs import Folded, get_logger

MAX_MESSAGE_BYTES: Final = 1 << 30
READ_BYTES: Final = 1 << 20
"""After so much has been taken from the socket, everything else in the loop has its turn."""


_ENDINGS: Final[dict[int, Ending]] = {
    Outcome.OK: Ending.OK,
    Outcome.HANDLER_FAILED: Ending.HANDLER_FAILED,
    Outcome.TIMED_OUT: Ending.TIMED_OUT,
}
_SERVING: Final = frozenset({"connecting", "registering", "ready", "backoff"})
"""The states in which a worker answers direct queries: it needs no node for that."""


class Router:
    """The runner's ROUTER socket and the queries in flight on it.

    Args:
        socket_path: the Unix socket to listen on, in a folder that only this user can enter.
        query_timeout_s: how long a query may wait for its reply.
        max_in_flight: how many queries one worker may have before it; past it they are refused.
        max_in_flight_total: the same for all workers together.
    """

    def __init__(
        self,
        socket_path: Path,
        *,
        query_timeout_s: float = 30.0,
        max_in_flight: int = 1024,
        max_in_flight_total: int = 16_384,
    ) -> None:
        self.endpoint = f"ipc://{socket_path}"
        self._query_timeout_s = query_timeout_s
        self.max_in_flight = max_in_flight
        self._max_in_flight_total = max_in_flight_total
        self._lines: dict[bytes, Line] = {}
        self._by_name: dict[str, Line] = {}
        self._pending: dict[int, Pending] = {}  # in the order of their deadlines, which is that of their arrival
        self._held: dict[str, dict[int, Pending]] = {}  # by the name of the worker that they wait for
        self._changing: set[str] = set()
        self._endings: defaultdict[str, dict[Ending, int]] = defaultdict(dict)
        self._sequence = 0
        self._dirty: dict[bytes, Line] = {}
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._ignored = Folded(what="message_ignored")
        self._unreachable = Folded(what="worker_unreachable")
        self._log = get_logger("router")

    def bound(self, *, query_timeout_s: float, max_in_flight: int, max_in_flight_total: int) -> None:
        """Change the bounds; queries in flight keep their deadlines, or get the new one where that is earlier."""
        self._query_timeout_s = query_timeout_s
        latest = self._loop.time() + query_timeout_s
        for pending in self._pending.values():
            pending.deadline = min(pending.deadline, latest)
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._expire()
        self.max_in_flight = max_in_flight
        self._max_in_flight_total = max_in_flight_total

    def open(self) -> None:
        """Listen. Call it on the running event loop.

        Raises:
            zmq.ZMQError: when the socket cannot be bound.
        """
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # `max_in_flight` bounds what waits here
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.bind(self.endpoint)
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Refuse what is still waiting and let the socket go."""
        self.refuse_all()
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._loop.remove_reader(self._fd)
        self._socket.close()
        self._context.term()

    def refuse_all(self) -> None:
        """Answer whatever still waits: nobody is left to handle it."""
        for pending in list(self._pending.values()):
            self._finish(pending, Ending.WORKER_GONE, b"the runner is shutting down")

    # --- workers come and go ---

    def expect(self, launch: Launch, listener: Listener) -> None:
        """Admit the incarnation that `launch` describes, once it presents its key."""
        line = Line(launch, listener)
        line.heard_s = self._loop.time()
        self._lines[line.routing_id] = line
        if not launch.standby:
            self._by_name[line.name] = line

    def drop(self, launch: Launch, reason: str) -> None:
        """Forget an incarnation, and answer at once for every query that it still had.

        Those that had not left for it yet go to another worker, or wait for its successor.
        """
        line = self._lines.pop(launch.routing_id, None)
        if line is None:
            return
        if self._by_name.get(line.name) is line:
            del self._by_name[line.name]
            if not line.draining:  # one that drains may have a successor, for whom queries are held
                self._changing.discard(line.name)
        self._dirty.pop(line.routing_id, None)
        unsent, line.outbox = line.outbox, []
        for pending in unsent:
            if pending.sequence in line.in_flight:
                self._place_again(pending)
        for pending in list(line.in_flight.values()):
            self._finish(pending, Ending.WORKER_GONE, reason.encode())

    def drain(self, launch: Launch, *, hand_over: bool = False) -> bool:
        """Send a worker no more queries, and tell it so. Return False when it cannot be told.

        With `hand_over`, queries for its name are held from now on, until `promote` names a successor.
        """
        line = self._lines.get(launch.routing_id)
        if line is None or not line.known:
            return False
        if hand_over:
            self._changing.add(line.name)
        return line.draining or self._drain_line(line, hand_over=hand_over)

    def promote(self, launch: Launch, legacy: bytes | None) -> None:
        """Have the incarnation on standby take the place of the one that left; `legacy` is what that remembered."""
        line = self._lines.get(launch.routing_id)
        if line is None:  # it died while it waited, and is started again as after any death
            self._changing.discard(launch.spec.name)
            return
        self._by_name[line.name] = line  # and queries are held on, until it says that it takes them
        self._send(line, ipc.Go(legacy))

    def retire(self, name: str) -> None:
        """Answer the queries that are held for a worker that will not come back, or not soon."""
        self._changing.discard(name)
        for pending in list(self._held.pop(name, {}).values()):
            self._finish(pending, Ending.WORKER_GONE, b"the worker is not up")

    def accepts(self, name: str) -> bool:
        """Return whether a worker of that name can be given a query now."""
        line = self._by_name.get(name)
        return (line is not None and line.accepting) or name in self._changing

    def silent_for_s(self, launch: Launch) -> float:
        """Return for how long nothing has been heard of an incarnation; what waits in the socket is heard first."""
        self._read()
        line = self._lines.get(launch.routing_id)
        return 0.0 if line is None else self._loop.time() - line.heard_s

    def pardon(self, launch: Launch) -> None:
        """Count an incarnation's silence from now: it was the runner that did not listen."""
        if (line := self._lines.get(launch.routing_id)) is not None:
            line.heard_s = self._loop.time()

    # --- queries ---

    def submit(
        self, name: str, query: str, on_reply: OnReply, elsewhere: Sequence[str] = (), trace: Trace = NO_TRACE
    ) -> int | None:
        """Send a query to a worker; `on_reply` is called exactly once, with whatever becomes of it.

        Args:
            name: the worker.
            query: its text.
            on_reply: may be called before this returns.
            elsewhere: workers that may have the query if it comes back unhandled.
            trace: goes with it, wherever it goes, where queries are traced.

        Returns:
            What `withdraw` takes, or None when the query was refused at once.
        """
        line = self._by_name.get(name)
        refusal = self._objection(name, line)
        if refusal is not None and refusal.ending is Ending.WORKER_GONE:
            self._read()  # it may just have said that it is up
            line = self._by_name.get(name)
            refusal = self._objection(name, line)
        if refusal is not None:
            self._count(name, refusal.ending)
            on_reply(refusal)
            return None
        self._sequence = sequence = self._sequence + 1
        pending = Pending(sequence, name, query, self._loop.time() + self._query_timeout_s, on_reply, elsewhere, trace)
        self._pending[sequence] = pending
        if line is None or not line.accepting:
            self._hold(pending)
        else:
            self._place(pending, line)
        if self._deadline_timer is None:
            self._deadline_timer = self._loop.call_at(pending.deadline, self._expire)
        return sequence

    def _objection(self, name: str, line: Line | None) -> Reply | None:
        """Return why a worker can be given no query now, or None."""
        if line is not None and line.accepting:
            waiting = len(line.in_flight)
        elif name in self._changing:
            waiting = len(self._held.get(name, ()))
        else:
            return Reply(Ending.WORKER_GONE, b"the worker is not up", name)
        if waiting >= self.max_in_flight:
            return Reply(Ending.REFUSED, b"the worker has too many queries before it", name)
        if len(self._pending) >= self._max_in_flight_total:
            return Reply(Ending.REFUSED, b"the runner has too many queries before it", name)
        return None

    def withdraw(self, sequence: int) -> None:
        """Forget a query that nobody waits for any more; `on_reply` is not called."""
        pending = self._pending.pop(sequence, None)
        if pending is not None:
            self._take_back(pending)
            self._count(pending.name, Ending.WITHDRAWN)

    @property
    def in_flight(self) -> int:
        """How many queries wait for a reply."""
        return len(self._pending)

    def in_flight_at(self, name: str) -> int:
        """How many of them a worker has, or will have once it is up."""
        line = self._by_name.get(name)
        return (0 if line is None else len(line.in_flight)) + len(self._held.get(name, ()))

    def endings_of(self, name: str) -> Mapping[Ending, int]:
        """How queries to a worker have ended, each as its asker was told."""
        return self._endings.get(name, {})

    def _place(self, pending: Pending, line: Line) -> None:
        """Give a query to a worker."""
        pending.line = line
        line.in_flight[pending.sequence] = pending
        line.outbox.append(pending)
        self._mark(line)

    def _place_again(self, pending: Pending) -> None:
        """Give a query that no handler has seen to a worker that is up, else hold it for its own one's successor."""
        if pending.line is not None:
            pending.line.in_flight.pop(pending.sequence, None)
            pending.line = None
        for name in (pending.name, *pending.elsewhere):
            line = self._by_name.get(name)
            if line is not None and line.accepting and len(line.in_flight) < self.max_in_flight:
                self._place(pending, line)
                return
        self._hold(pending)

    def _hold(self, pending: Pending) -> None:
        self._held.setdefault(pending.name, {})[pending.sequence] = pending

    def _release(self, line: Line) -> None:
        """Hold nothing more for a worker that has come up, and give it what was."""
        self._changing.discard(line.name)
        for pending in self._held.pop(line.name, {}).values():
            self._place(pending, line)

    def _take_back(self, pending: Pending) -> None:
        """Free a query's place, and have its worker skip it if it has not begun."""
        if (line := pending.line) is not None:
            line.in_flight.pop(pending.sequence, None)
            line.withdrawn.append(pending.sequence)
            self._mark(line)
        elif (held := self._held.get(pending.name)) is not None:
            held.pop(pending.sequence, None)

    def _finish(self, pending: Pending, ending: Ending, payload: bytes) -> None:
        if self._pending.pop(pending.sequence, None) is None:
            return  # an earlier `on_reply` has withdrawn it
        if pending.line is not None:
            pending.line.in_flight.pop(pending.sequence, None)
        elif (held := self._held.get(pending.name)) is not None:
            held.pop(pending.sequence, None)
        name = pending.name if pending.line is None else pending.line.name
        self._count(name, ending)
        pending.on_reply(Reply(ending, payload, name))

    def _count(self, name: str, ending: Ending) -> None:
        endings = self._endings[name]
        endings[ending] = endings.get(ending, 0) + 1

    def _expire(self) -> None:
        """Answer the queries whose deadline has passed, and wait for the next one."""
        # Replies that wait in the socket came in time: a late runner must not take them for missing.
        self._read()
        self._deadline_timer = None
        now = self._loop.time()
        # The oldest are the next to expire, but for a while after a reload that shortens the time.
        expired = list(takewhile(lambda pending: pending.deadline <= now, self._pending.values()))
        for pending in expired:
            self._take_back(pending)
        self._flush()  # before its asker is told: nobody may see a query run that was said to have had no answer
        # Not by their number: a message that failed may have answered some of them just now.
        gone = {pending.sequence for pending in expired}
        if following := next((each for each in self._pending.values() if each.sequence not in gone), None):
            self._deadline_timer = self._loop.call_at(following.deadline, self._expire)
        for pending in expired:
            self._finish(pending, Ending.TIMED_OUT, b"no answer before the deadline")

    # --- the socket ---

    def _mark(self, line: Line) -> None:
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty[line.routing_id] = line

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, {}
        for line in dirty.values():
            self._flush_line(line)

    def _flush_line(self, line: Line) -> None:
        if line.outbox:
            waiting, line.outbox = line.outbox, []
            if line.withdrawn:  # some may have been withdrawn before they ever left
                waiting = [pending for pending in waiting if pending.sequence in line.in_flight]
            if waiting and not self._send(line, self._message(waiting)):
                for pending in waiting:
                    self._finish(pending, Ending.WORKER_GONE, b"the worker cannot be reached")
        if line.withdrawn:
            withdrawn, line.withdrawn = line.withdrawn, []
            self._send(line, ipc.Cancel(withdrawn))

    def _message(self, queries: list[Pending]) -> ipc.RunnerMessage:
        return ipc.Queries([(each.sequence, each.query) for each in queries])

    def _send(self, line: Line, message: ipc.RunnerMessage) -> bool:
        """Send a message; return False when the worker is not there, or has stopped reading."""
        try:
            self._socket.send_multipart([line.routing_id, ipc.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            if (held := self._unreachable.admit(line.name)) is not None:
                more = {"like_it_before": held} if held else {}
                self._log.warning("worker_unreachable", **line.which, reason=str(exc), **more)
            return False
        # A send may have used up the edge that announced something to read.
        if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._readable)
        return True

    def _readable(self) -> None:
        if self._read(READ_BYTES):
            self._loop.call_soon(self._readable)  # the edge that announced the rest is used up

    def _read(self, most_bytes: float = inf) -> bool:
        """Take what has come, up to so many bytes; return whether there may be more."""
        taken_bytes = 0
        while taken_bytes < most_bytes and not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            taken_bytes += len(parts[-1])
            self._receive(parts)
        return not self._socket.closed

    def _receive(self, parts: list[bytes]) -> None:
        line = self._lines.get(parts[0])
        if line is None or len(parts) != 2:
            self._ignore("unknown_peer", parts[0])
            return
        try:
            message = ipc.decode_worker_message(parts[1])
        except Exception:  # noqa: BLE001 - whatever bytes do to the decoder, they are no worker's
            self._ignore("undecodable", parts[0])
            return
        if isinstance(message, ipc.Hello):
            line.known = line.known or hmac.compare_digest(message.key, line.key)
        elif not line.known:
            self._ignore("no_key", parts[0])
        else:
            self._hear(line, message)

    def _hear(self, line: Line, message: ipc.WorkerMessage) -> None:
        line.heard_s = self._loop.time()
        if isinstance(message, ipc.Replies):
            for sequence, outcome, payload in message.items:
                if (pending := line.in_flight.get(sequence)) is None:
                    continue
                if outcome == Outcome.RETURNED:
                    self._place_again(pending)
                else:
                    self._finish(pending, _ENDINGS.get(outcome, Ending.HANDLER_FAILED), payload)
        elif isinstance(message, ipc.Status):
            line.accepting = message.state in _SERVING and not line.draining
            if line.accepting and self._by_name.get(line.name) is line:
                self._release(line)
            line.listener.on_status(line.incarnation, message)
        elif isinstance(message, ipc.Failed):
            # It leaves: what it gives back after this must not come to it again.
            line.accepting, line.draining = False, True
            line.listener.on_failed(line.incarnation, message.reason)
        elif isinstance(message, ipc.RecycleRequest):
            line.listener.on_recycle(line.incarnation, message.reason)
        elif isinstance(message, ipc.Legacy):
            line.listener.on_legacy(line.incarnation, message.memory)
        elif isinstance(message, ipc.DrainRequest) and not line.draining:
            self._drain_line(line)

    def _drain_line(self, line: Line, *, hand_over: bool = False) -> bool:
        self._flush_line(line)
        line.accepting, line.draining = False, True
        return self._send(line, ipc.Drain(hand_over))

    def _ignore(self, reason: str, routing_id: bytes) -> None:
        if (held := self._ignored.admit(reason)) is not None:
            more = {"like_it_before": held} if held else {}
            self._log.warning("message_ignored", reason=reason, sender=repr(routing_id[:80]), **more)
