"""What a node can be told: addresses, time-outs and bounds."""

from __future__ import annotations

import msgspec

from shared.tokens import Secret

KIB = 1024
MIB = 1024 * KIB


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one node.

    Attributes:
        host: a name or address to listen on; anything but loopback needs a `secret`.
        port: the TCP port, 0 for any free one.
        secret: what tokens are signed with; None asks nobody for a token.
        idle_timeout_ms: a socket on which nothing is received for so long is closed with 1000.
        query_timeout_ms: how long one query waits for all the agents it asked, together.
        max_frame_bytes: a longer message closes its socket with 1009.
        max_unsent_bytes: an agent that leaves more than this unread is dropped.
        max_body_bytes: a longer HTTP body is answered 413.
        queries_per_s: POST /query past this rate is answered 429; None sets no limit.
        connections_per_s: upgrades past this rate are answered 429; None sets no limit.
        sse_ping_interval_ms: how often a quiet event stream carries a comment.
        port_hint: ends the error about an address that cannot be had; says how to choose another.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    secret: Secret | None = None
    idle_timeout_ms: int = 60_000
    query_timeout_ms: int = 5_000
    max_frame_bytes: int = 16 * MIB
    max_unsent_bytes: int = 8 * MIB
    max_body_bytes: int = 64 * KIB
    queries_per_s: float | None = None
    connections_per_s: float | None = None
    sse_ping_interval_ms: int = 30_000
    port_hint: str = "choose another port with --port (0 takes any free one)"
