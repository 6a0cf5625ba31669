"""Just enough HTTP/1.1 for direct queries over raw sockets.

The client's own cost must not influence the figures.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Final, NamedTuple

READ_BYTES: Final = 1 << 16
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

Address = tuple[str, int]


class Answer(NamedTuple):
    """One answer. `size` is its length in bytes, including the head."""

    status: int
    body: bytes
    size: int


def request(address: Address, path: str, query: str, **named: str) -> bytes:
    """Return the request for a query. `named` may be an `agent` or a `worker`."""
    body = json.dumps({"query": query, **named}).encode()
    host = b"%b:%d" % (address[0].encode(), address[1])
    head = (
        b"POST %b HTTP/1.1\r\n"
        b"host: %b\r\n"
        b"content-type: application/json\r\n"
        b"content-length: %d\r\n\r\n"
    )
    return head % (path.encode(), host, len(body)) + body


def parse(data: bytes) -> Answer | None:
    """Return the first answer in `data`, or None if it is incomplete.

    Raises:
        ValueError: `data` is not HTTP/1, or has no content-length.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    declared = _LENGTH.search(data, 0, end + 2)
    if not data.startswith(b"HTTP/1.") or declared is None:
        raise ValueError(f"not an HTTP/1 answer with a content-length: {data[:200]!r}")
    start = end + 4
    size = start + int(declared[1])
    return Answer(int(data[9:12]), data[start:size], size) if len(data) >= size else None


def connect(address: Address) -> socket.socket:
    """Return a connection without Nagle's algorithm, so that data is sent immediately."""
    sock = socket.create_connection(address, timeout=60.0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(address: Address, path: str, query: str) -> Answer:
    """Send one query over a new connection, and return the answer.

    Raises:
        OSError: the connection failed, or was closed before the answer.
        ValueError: the answer is not HTTP/1 with a content-length.
    """
    with connect(address) as sock:
        sock.sendall(request(address, path, query))
        data = b""
        while (answer := parse(data)) is None:
            more = sock.recv(READ_BYTES)
            if not more:
                raise ConnectionResetError("the connection was closed before the answer")
            data += more
    return answer
