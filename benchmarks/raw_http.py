"""Just enough HTTP/1.1 to ask over raw sockets: a client's own work must not be what is measured."""

from __future__ import annotations

import json
import re
import socket
from typing import Final, NamedTuple

READ_BYTES: Final = 1 << 16
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Address = tuple[str, int]


class Answer(NamedTuple):
    """One answer; `size` is how many bytes it took with its head."""

    status: int
    body: bytes
    size: int


def request(address: Address, path: str, query: str, **named: str) -> bytes:
    """Return the request that asks `query`; `named` is an agent or a worker."""
    body = json.dumps({"query": query, **named}).encode()
    host = b"%b:%d" % (address[0].encode(), address[1])
    head = b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (path.encode(), host, len(body)) + body


def parse(data: bytes) -> Answer | None:
    """Return the first answer in `data`, or None while it is not whole; its length must be declared.

    Raises:
        ValueError: for what is no such answer.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    declared = _LENGTH.search(data, 0, end + 2)
    if not data.startswith(b"HTTP/1.") or declared is None:
        raise ValueError(f"no HTTP/1 answer with a content-length: {data[:200]!r}")
    start = end + 4
    size = start + int(declared[1])
    return Answer(int(data[9:12]), data[start:size], size) if len(data) >= size else None


def connect(address: Address) -> socket.socket:
    """Return a connection that sends what is written at once."""
    sock = socket.create_connection(address, timeout=60.0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(address: Address, path: str, query: str) -> Answer:
    """Ask once, over a connection of its own.

    Raises:
        OSError: when nobody answers.
        ValueError: for what is no answer.
    """
    with connect(address) as sock:
        sock.sendall(request(address, path, query))
        data = b""
        while (answer := parse(data)) is None:
            more = sock.recv(READ_BYTES)
            if not more:
                raise ConnectionResetError("the connection was closed before there was an answer")
            data += more
    return answer
