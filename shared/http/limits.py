"""The limits of an HTTP server: for one connection, and for all connections together."""

from __future__ import annotations

import msgspec


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much time and memory of a server clients may use.

    Attributes:
        header_timeout_s: how long a client may take from the start of its connection or request to
            the end of the head. A later head gets 408. A connection that has sent nothing is closed
            without a response.
        body_timeout_s: how long a client may take from the end of the head to the end of the body.
            A later body gets 408.
        idle_timeout_s: how long a connection without a request stays open for the next one.
        write_timeout_s: a client that reads nothing of its response for this long is cut.
        max_header_bytes: the largest size of the request line and headers, and of the trailers. A
            larger request gets 431.
        max_headers: the largest number of headers and trailers together. More get 431.
        max_connections: past it, the connection that has waited longest for a request is cut. If
            none waits for a request, the new connection gets 503.
        max_unsent_bytes: the total of responses that clients have not read. Past it, the clients
            that have read nothing for longest are cut.
    """

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 5.0
    write_timeout_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    max_headers: int = 128
    max_connections: int = 4096
    max_unsent_bytes: int = 64 * 1024 * 1024

    @property
    def shortest_timeout_s(self) -> float:
        """The shortest of the timeouts."""
        return min(
            self.header_timeout_s,
            self.body_timeout_s,
            self.idle_timeout_s,
            self.write_timeout_s,
        )
