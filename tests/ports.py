"""Reserves ports for servers that tests start later, or stop and start again.

A port that was free a moment ago can be taken: by another test, or by an outgoing connection. A
reserved port has a socket that is bound but does not listen. So the kernel gives the port neither
to a bind to port 0 nor to a connection. A server that binds it by number with SO_REUSEADDR, as all
servers of this project do, can listen on it as often as it likes.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HOST: Final = "127.0.0.1"
LAST: Final = 65535


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserve a port of the loopback interface."""
    with reserved_ports(1) as [port]:
        yield port


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Reserve consecutive ports of the loopback interface."""
    with contextlib.ExitStack() as sockets:
        yield _reserve(count, sockets)


def _reserve(count: int, sockets: contextlib.ExitStack) -> list[int]:
    while True:
        with contextlib.ExitStack() as attempt:
            first = attempt.enter_context(_bind(0)).getsockname()[1]
            if first + count - 1 > LAST:
                continue
            with contextlib.suppress(OSError):
                for port in range(first + 1, first + count):
                    attempt.enter_context(_bind(port))
                sockets.push(attempt.pop_all())
                return list(range(first, first + count))


def _bind(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, port))
    except BaseException:
        sock.close()
        raise
    return sock
