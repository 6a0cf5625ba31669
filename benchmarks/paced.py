"""Asks over HTTP at a fixed rate, whatever the answers do, and takes each one's time from when it was due.

An open loop: a request that is due while all connections wait is not left out but asked late, and its
time counts from when it should have left. A closed loop asks less while the system is slow, and so
hides the slowness (coordinated omission).

As a program it is the opposite, a closed loop that asks as fast as it is answered, to be a bad neighbour:

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

PATIENCE_S: Final = 30.0


class Connection:
    """A connection that is kept, with at most one request on its way."""

    def __init__(self, address: Address) -> None:
        self._sock = connect(address)
        self._unread = b""
        self.due_s = 0.0

    def fileno(self) -> int:
        """Return its descriptor, for `select`."""
        return self._sock.fileno()

    def ask(self, asked: bytes, due_s: float) -> None:
        """Ask what was due at `due_s`."""
        self.due_s = due_s
        self._sock.sendall(asked)

    def answered(self, expected: bytes) -> bool:
        """Take what has come; return whether that was the whole answer.

        Raises:
            WrongAnswer: when it is not the expected one, or there is none.
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
        """Let go of it."""
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
    """Ask `rate` times a second over so many connections; return the latencies of `seconds`, in seconds.

    Each is from the moment when its request was due until its answer was read. What this loop itself
    wakes late is in it: some 0.1 ms, more when no core is free for it.

    Raises:
        WrongAnswer: when an answer is not a 200 with `expected` as its body, or does not come.
    """
    asked = request(address, path, query)
    warm_ups = round(rate * warm_up_s)
    total = warm_ups + round(rate * seconds)
    latencies_s: list[float] = []
    with _opened(address, connections) as idle, _no_collection():
        waiting: set[Connection] = set()
        begun, answers = 0, 0
        began_s = time.perf_counter()
        counts_from_s = began_s + warm_ups / rate
        ends_s = began_s + total / rate + PATIENCE_S
        while answers < total:
            now_s = time.perf_counter()
            while begun < total and idle and began_s + begun / rate <= now_s:
                connection = idle.popleft()
                connection.ask(asked, began_s + begun / rate)
                waiting.add(connection)
                begun += 1
            due_s = began_s + begun / rate if begun < total and idle else ends_s
            # Not epoll: it waits in whole milliseconds.
            readable, _, _ = select.select(waiting, (), (), max(0.0, due_s - time.perf_counter()))
            for connection in readable:
                if not connection.answered(expected):
                    continue
                waiting.remove(connection)
                idle.append(connection)
                answers += 1
                if connection.due_s >= counts_from_s:
                    latencies_s.append(time.perf_counter() - connection.due_s)
            if not readable and time.perf_counter() > ends_s:
                raise WrongAnswer(f"{total - answers} of {total} requests are not answered after {PATIENCE_S:g} s")
    return latencies_s


def flood(address: Address, path: str, connections: int) -> None:
    """Keep a request on its way on each connection until this process is ended; whatever is answered is right."""
    asked = request(address, path, "flood")
    poll = select.epoll()
    by_fd: dict[int, socket.socket] = {}
    unread: dict[int, bytes] = {}
    for _ in range(connections):
        sock = connect(address)
        by_fd[sock.fileno()], unread[sock.fileno()] = sock, b""
        poll.register(sock.fileno(), select.EPOLLIN)
        sock.sendall(asked)
    while True:
        for fd, _ in poll.poll():
            data = by_fd[fd].recv(READ_BYTES)
            if not data:
                raise WrongAnswer("an HTTP connection was closed")
            unread[fd] += data
            if parse(unread[fd]) is not None:
                unread[fd] = b""
                by_fd[fd].sendall(asked)


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
    """Keep the garbage collector from stopping the clock's reader."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


if __name__ == "__main__":
    flood((sys.argv[1], int(sys.argv[2])), sys.argv[3], int(sys.argv[4]))
