"""Sends direct queries at a fixed rate, and measures each latency from the moment it was due.

This is an open loop. If all connections are busy when a request is due, the request is sent late,
and its latency still counts from the moment when it was due. A closed loop sends fewer requests
while the system is slow, and so hides the slowness (coordinated omission).

As a program it is the opposite: a closed loop that sends a query as soon as the previous one is
answered. It is the load of a bad neighbour:

    python -m benchmarks.paced HOST PORT PATH CONNECTIONS
"""

from __future__ import annotations

import contextlib
import gc
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from benchmarks.load_node import WrongAnswer
from benchmarks.raw_http import READ_BYTES, Address, connect, parse, request

TIMEOUT_S: Final = 30.0


class Connection:
    """A kept-alive connection with at most one request in flight."""

    def __init__(self, address: Address) -> None:
        self._sock = connect(address)
        self._unread = b""
        self.due_s = 0.0

    def fileno(self) -> int:
        """Return its descriptor, for `select`."""
        return self._sock.fileno()

    def send(self, query: bytes, due_s: float) -> None:
        """Send a request that was due at `due_s`."""
        self.due_s = due_s
        self._sock.sendall(query)

    def read_answer(self, expected: bytes) -> bool:
        """Read the received bytes. Return whether the answer is complete.

        Raises:
            WrongAnswer: the answer is not `expected`, or the connection was closed.
        """
        data = self._sock.recv(READ_BYTES)
        if not data:
            raise WrongAnswer("an HTTP connection was closed")
        self._unread += data
        answer = parse(self._unread)
        if answer is None:
            return False
        self._unread = self._unread[answer.size :]
        if answer.status != 200 or answer.body != expected:
            raise WrongAnswer(f"answered {answer.status}: {answer.body[:200]!r}")
        return True

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def pace(
    address: Address,
    path: str,
    query: str,
    expected: bytes,
    *,
    rate: float,
    connections: int,
    seconds: float,
    warm_up_s: float = 0.5,
) -> list[float]:
    """Send `rate` requests per second for `seconds` after a warm-up, and return the latencies.

    The latencies are in seconds. A latency lasts from the moment when the request was due until the
    answer was read. It includes this loop's own delay: about 0.1 ms, or more if no core is free.

    Raises:
        WrongAnswer: an answer is missing, or is not a 200 with `expected` as its body.
    """
    sent = request(address, path, query)
    warm_ups = round(rate * warm_up_s)
    total = warm_ups + round(rate * seconds)
    latencies_s: list[float] = []
    with _opened(address, connections) as idle, _no_collection():
        waiting: set[Connection] = set()
        begun, answers = 0, 0
        began_s = time.perf_counter()
        counts_from_s = began_s + warm_ups / rate
        ends_s = began_s + total / rate + TIMEOUT_S
        while answers < total:
            now_s = time.perf_counter()
            while begun < total and idle and began_s + begun / rate <= now_s:
                connection = idle.popleft()
                connection.send(sent, began_s + begun / rate)
                waiting.add(connection)
                begun += 1
            due_s = began_s + begun / rate if begun < total and idle else ends_s
            # epoll would wait in whole milliseconds.
            readable, _, _ = select.select(waiting, (), (), max(0.0, due_s - time.perf_counter()))
            for connection in readable:
                if not connection.read_answer(expected):
                    continue
                waiting.remove(connection)
                idle.append(connection)
                answers += 1
                if connection.due_s >= counts_from_s:
                    latencies_s.append(time.perf_counter() - connection.due_s)
            if not readable and time.perf_counter() > ends_s:
                raise WrongAnswer(
                    f"{total - answers} of {total} requests are unanswered after {TIMEOUT_S:g} s"
                )
    return latencies_s


def flood(address: Address, path: str, connections: int) -> None:
    """Keep one request in flight on each connection until the process is killed.

    Any answer is accepted.
    """
    sent = request(address, path, "flood")
    poll = select.epoll()
    by_fd: dict[int, socket.socket] = {}
    unread: dict[int, bytes] = {}
    for _ in range(connections):
        sock = connect(address)
        by_fd[sock.fileno()], unread[sock.fileno()] = sock, b""
        poll.register(sock.fileno(), select.EPOLLIN)
        sock.sendall(sent)
    while True:
        for fd, _ in poll.poll():
            data = by_fd[fd].recv(READ_BYTES)
            if not data:
                raise WrongAnswer("an HTTP connection was closed")
            unread[fd] += data
            if parse(unread[fd]) is not None:
                unread[fd] = b""
                by_fd[fd].sendall(sent)


@contextmanager
def _opened(address: Address, connections: int) -> Iterator[deque[Connection]]:
    with contextlib.ExitStack() as stack:
        opened = deque[Connection]()
        for _ in range(connections):
            opened.append(Connection(address))
            stack.callback(opened[-1].close)
        yield deque(opened)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable the garbage collector, whose pauses would count as latency."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


if __name__ == "__main__":
    flood((sys.argv[1], int(sys.argv[2])), sys.argv[3], int(sys.argv[4]))
