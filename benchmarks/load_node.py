"""A node that generates load: it sends queries, counts the answers and matches each to its query.

It speaks just enough WebSocket (RFC 6455) and just enough of em_disco's handshake to register
agents. Its own cost must not influence the figures. So it uses raw sockets and frames that are
encoded in advance, and works in rounds of one read, one pass over the frames in it and one write.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import select
import socket
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self

from websockets.speedups import apply_mask

GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
READ_BYTES: Final = 1 << 20
TIMEOUT_S: Final = 60.0
WAKE_PART: Final = 8
WAKE_BYTES: Final = 32_768
"""The node reads once 1/WAKE_PART of a window is answered, or once WAKE_BYTES have arrived."""

CHECK_EVERY: Final = 257
"""One answer in CHECK_EVERY is decoded and compared completely. Of the others only the id is."""

REGISTERED: Final = json.dumps({"action": "registered", "status": "ok"}).encode()
AGENT_REGISTERED: Final = json.dumps({"action": "agent_registered", "capabilities": []}).encode()


class WrongAnswer(Exception):
    """The system under test sent a wrong, repeated or unexpected answer, or none."""


class Blast(NamedTuple):
    """The result of one blast. `latencies_s` has the latency of one query per read."""

    answers: int
    seconds: float
    latencies_s: list[float]

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.answers / self.seconds


class Workload(NamedTuple):
    """The text of the queries, and `is_right`, which checks the decoded `data` of an answer."""

    body: str
    is_right: Callable[[Any], bool]


class AgentPeer:
    """One agent's connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.name = ""
        self.registered_s: float | None = None
        self.answers = 0
        self.latencies_s: list[float] = []
        self.unsent = b""
        self._head: bytes | None = b""
        self._unread = b""
        self._messages = 0
        self._in_flight: dict[bytes, tuple[bytes, float]] = {}
        self._frames: dict[bytes, tuple[bytes, bytes]] = {}
        self._id_at = 0
        self._asking = False

    @property
    def in_flight(self) -> int:
        """How many queries are not answered yet."""
        return len(self._in_flight)

    def start(self, workload: Workload, window: int) -> None:
        """Send `window` queries, and from now on one more query for each answer."""
        self._workload = workload
        self._asking = True
        self._window = window
        self._id_at = 0
        # Each slot uses two ids in turn, so that a repeated answer does not match the next query.
        self._frames = {}
        for slot in range(window):
            first, second = b"%08d" % (2 * slot), b"%08d" % (2 * slot + 1)
            self._frames[first] = (second, query_frame(second, workload.body))
            self._frames[second] = (first, query_frame(first, workload.body))
        now = time.perf_counter()
        firsts = [b"%08d" % (2 * slot) for slot in range(window)]
        self._in_flight = dict.fromkeys(firsts, now)  # type: ignore[arg-type]
        self.unsent += b"".join(query_frame(each, workload.body) for each in firsts)
        self.flush()

    def stop(self) -> None:
        """Send no more queries. Those in flight must still be answered."""
        self._asking = False
        self._wake_after(1)

    def _wake_after(self, size: int) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        if self.unsent:
            with contextlib.suppress(BlockingIOError):
                self.unsent = self.unsent[self.sock.send(self.unsent) :]

    def readable(self) -> None:
        """Read and process the received bytes."""
        data = self.sock.recv(READ_BYTES)
        if not data:
            raise WrongAnswer(f"{self.name or 'an agent'} closed its connection")
        if self._head is not None:
            data = self._upgrade(self._head + data)
        self._take(data)
        self.flush()

    def _upgrade(self, head: bytes) -> bytes:
        head, end, rest = head.partition(b"\r\n\r\n")
        if not end:
            self._head = head
            return b""
        self._head = None
        key = next(
            line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:")
        )
        accept = base64.b64encode(hashlib.sha1(key.split(b":", 1)[1].strip() + GUID).digest())
        self.unsent += (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
        return rest

    def _take(self, data: bytes) -> None:
        buffer = self._unread + data if self._unread else data
        at, end = 0, len(buffer)
        frames, in_flight, id_at = self._frames, self._in_flight, self._id_at
        asking, out = self._asking, []
        now = time.perf_counter()
        while end - at >= 6:
            length = buffer[at + 1] & 127
            start = at + 6
            if length == 126:
                start = at + 8
                length = int.from_bytes(buffer[at + 2 : at + 4], "big")
            elif length == 127:
                start = at + 14
                length = int.from_bytes(buffer[at + 2 : at + 10], "big")
            stop = start + length
            if start > end or stop > end:
                break
            payload = apply_mask(buffer[start:stop], buffer[start - 4 : start])
            if buffer[at] != 0x81 or not frames:
                self._other(buffer[at] & 15, payload)
                at = stop
                continue
            at = stop
            query_id = payload[id_at : id_at + 8]
            sent_s = in_flight.pop(query_id, None)
            if sent_s is None:
                query_id, sent_s = self._find(payload)
                id_at = self._id_at
                self._learn(payload)
            self.answers += 1
            if self.answers % CHECK_EVERY == 0:
                self._check(payload)
            if asking:
                query_id, following = frames[query_id]
                in_flight[query_id] = now  # type: ignore[assignment]
                out.append(following)
        if out:
            self.latencies_s.append(now - sent_s)  # type: ignore[operator]
            self.unsent += b"".join(out)
        self._unread = buffer[at:]

    def _other(self, kind: int, payload: bytes) -> None:
        if kind == 9:
            self.unsent += bytes((0x8A, len(payload))) + payload
        elif kind == 8:
            raise WrongAnswer(f"{self.name} closed the WebSocket: {payload[2:]!r}")
        elif kind == 1 and self.registered_s is None:
            self._messages += 1
            if self._messages == 1:
                self.name = str(json.loads(payload)["name"])
            else:  # both messages of the handshake have arrived
                self.unsent += frame(REGISTERED) + frame(AGENT_REGISTERED)
                self.registered_s = time.perf_counter()

    def _find(self, payload: bytes) -> tuple[bytes, float]:
        """Find the id's offset in an answer. All answers of a client have the same layout."""
        query_id = str(json.loads(payload)["id"]).encode()
        self._id_at = payload.index(query_id)
        if (sent_s := self._in_flight.pop(query_id, None)) is None:
            raise WrongAnswer(
                f"{self.name} answered {query_id!r}, which was not sent or is already answered"
            )
        return query_id, sent_s  # type: ignore[return-value]

    def _learn(self, payload: bytes) -> None:
        # A client may write each answer separately. If each woke this node, the figures would show
        # this node's cost. So the kernel wakes it only for several answers at once.
        answers = min(self._window // WAKE_PART, WAKE_BYTES // len(payload))
        self._wake_after(max(1, answers * len(payload)))

    def _check(self, payload: bytes) -> None:
        answer = json.loads(payload)
        if answer.get("action") != "result" or not self._workload.is_right(answer.get("data")):
            raise WrongAnswer(f"{self.name} answered {payload[:200]!r}")


class LoadNode:
    """Listens on loopback for agents. Use as a context manager."""

    def __init__(self, nodes: int = 1) -> None:
        self._listeners = [
            socket.create_server(("127.0.0.1", 0), backlog=256) for _ in range(nodes)
        ]
        self._poll = select.epoll()
        self._by_fd: dict[int, socket.socket | AgentPeer] = {}
        self.peers: list[AgentPeer] = []
        for listener in self._listeners:
            listener.setblocking(False)
            self._by_fd[listener.fileno()] = listener
            self._poll.register(listener.fileno(), select.EPOLLIN)

    @property
    def addresses(self) -> list[str]:
        """The nodes' addresses, as `host:port`."""
        return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._poll.close()
        for each in (*self._listeners, *(peer.sock for peer in self.peers)):
            each.close()

    def wait_registered(self, agents: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Serve until at least `agents` agents are registered."""
        self._serve(
            lambda: sum(peer.registered_s is not None for peer in self.peers) >= agents, timeout_s
        )

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when there is something to serve."""
        return self._poll.fileno()

    def serve(self, seconds: float = 0.0) -> None:
        """Serve for that long, and forget connections that the agents have closed."""
        ends = time.perf_counter() + seconds
        self._serve_once(seconds, keep_lost=False)
        while (left := ends - time.perf_counter()) > 0:
            self._serve_once(left, keep_lost=False)

    def drop_lost(self) -> None:
        """Forget connections that the agents have closed."""
        self.serve()

    def blast(
        self, workload: Workload, window: int, seconds: float, warm_up_s: float = 0.3
    ) -> Blast:
        """Keep `window` queries in flight at each agent, and count the answers after a warm-up.

        Raises:
            WrongAnswer: an answer is wrong, unexpected or missing.
        """
        for peer in self.peers:
            peer.answers, peer.latencies_s = 0, []
            peer.start(workload, window)
        self._serve_for(warm_up_s)
        before = self._answers()
        for peer in self.peers:
            peer.latencies_s.clear()
        began_s = time.perf_counter()
        self._serve_for(seconds)
        counted, took_s = self._answers() - before, time.perf_counter() - began_s
        latencies_s = [each for peer in self.peers for each in peer.latencies_s]
        for peer in self.peers:
            peer.stop()
        self._serve(lambda: not any(peer.in_flight for peer in self.peers), TIMEOUT_S)
        return Blast(counted, took_s, latencies_s)

    def blast_count(self, workload: Workload, window: int, answers: int, timeout_s: float) -> None:
        """Keep `window` queries in flight until `answers` queries are answered."""
        for peer in self.peers:
            peer.answers, peer.latencies_s = 0, []
            peer.start(workload, window)
        self._serve(lambda: self._answers() >= answers, timeout_s)
        for peer in self.peers:
            peer.stop()
            peer.latencies_s.clear()
        self._serve(lambda: not any(peer.in_flight for peer in self.peers), TIMEOUT_S)

    def _answers(self) -> int:
        return sum(peer.answers for peer in self.peers)

    def _serve_for(self, seconds: float) -> None:
        ends = time.perf_counter() + seconds
        while (left := ends - time.perf_counter()) > 0:
            self._serve_once(left)

    def _serve(
        self, until: Callable[[], bool], timeout_s: float, *, keep_lost: bool = True
    ) -> None:
        ends = time.perf_counter() + timeout_s
        while not until():
            if time.perf_counter() > ends:
                if not keep_lost:
                    return
                raise WrongAnswer(f"queries are unanswered after {timeout_s:g} s")
            self._serve_once(0.1, keep_lost=keep_lost)

    def _serve_once(self, timeout_s: float, *, keep_lost: bool = True) -> None:
        for fd, _ in self._poll.poll(timeout_s):
            source = self._by_fd[fd]
            if isinstance(source, socket.socket):
                self._accept(source)
                continue
            try:
                source.readable()
            except (WrongAnswer, ConnectionError):
                if keep_lost:
                    raise
                self.forget(source)
        for peer in self.peers:
            peer.flush()

    def forget(self, peer: AgentPeer) -> None:
        """Close a connection and remove it."""
        self._poll.unregister(peer.sock.fileno())
        del self._by_fd[peer.sock.fileno()]
        self.peers.remove(peer)
        peer.sock.close()

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        peer = AgentPeer(sock)
        self.peers.append(peer)
        self._by_fd[sock.fileno()] = peer
        self._poll.register(sock.fileno(), select.EPOLLIN)


def frame(payload: bytes) -> bytes:
    """Return a server's text frame."""
    length = len(payload)
    if length < 126:
        return bytes((0x81, length)) + payload
    if length < 65_536:
        return b"\x81\x7e" + length.to_bytes(2, "big") + payload
    return b"\x81\x7f" + length.to_bytes(8, "big") + payload


def query_frame(query_id: bytes, body: str) -> bytes:
    """Return the frame of a query with the text `body`."""
    return frame(b'{"action":"query","id":"%b","body":%b}' % (query_id, json.dumps(body).encode()))
