"""The settings of a node: address, timeouts and limits."""

from __future__ import annotations

import msgspec

from shared.config.nodes import DEFAULT_HOST, DEFAULT_PORT
from shared.config.schema import ConnectionSection
from shared.config.tokens import Secret

_KIB = 1024
_MIB = 1024 * _KIB


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one node.

    Attributes:
        host: the name or address to listen on. Only loopback addresses work without a `secret`.
        port: the TCP port; 0 takes any free one.
        secret: the key that signs tokens. None requires no token.
        idle_timeout_ms: a WebSocket that receives nothing for this long is closed with the
            code 1000.
        query_timeout_ms: how long one query waits for all its agents together.
        max_frame_bytes: a longer message closes its WebSocket with the code 1009.
        max_unsent_bytes: an agent that leaves more than this unread is dropped.
        max_body_bytes: a longer HTTP body gets 413.
        queries_per_s: POST /query past this rate gets 429; None sets no limit.
        connections_per_s: upgrades past this rate get 429; None sets no limit.
        sse_ping_interval_ms: how often a quiet event stream sends a comment.
        port_hint: how to choose another port. It is the last part of the error for an unavailable
            address.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    secret: Secret | None = None
    idle_timeout_ms: int = 60_000
    query_timeout_ms: int = 5_000
    # As much as a worker accepts. `em-runner try` reports a result that is larger.
    max_frame_bytes: int = ConnectionSection().max_frame_bytes
    max_unsent_bytes: int = 8 * _MIB
    max_body_bytes: int = 64 * _KIB
    queries_per_s: float | None = None
    connections_per_s: float | None = None
    sse_ping_interval_ms: int = 30_000
    port_hint: str = "choose another port with --port (0 takes any free one)"
