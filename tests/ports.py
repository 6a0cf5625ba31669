"""Ports that are known before anybody listens on them, and that nobody else is given meanwhile.

A port that was free a moment ago is not free: another test, or a connection that goes out, may have it. These are
held: a socket is bound and does not listen, so no bind to port 0 and no connection gets the port, and whoever asks for
it by its number, with SO_REUSEADDR as every server here does, may listen, again and again.
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
def held_port() -> Iterator[int]:
    """Hold a port of this machine."""
    with held_ports(1) as [port]:
        yield port


@contextmanager
def held_ports(count: int) -> Iterator[list[int]]:
    """Hold ports that follow each other."""
    with contextlib.ExitStack() as held:
        yield _hold(count, held)


def _hold(count: int, held: contextlib.ExitStack) -> list[int]:
    while True:
        with contextlib.ExitStack() as trying:
            first = trying.enter_context(_bound(0)).getsockname()[1]
            if first + count - 1 > LAST:
                continue
            with contextlib.suppress(OSError):
                for port in range(first + 1, first + count):
                    trying.enter_context(_bound(port))
                held.push(trying.pop_all())
                return list(range(first, first + count))


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((HOST, port))
    except BaseException:
        sock.close()
        raise
    return sock
