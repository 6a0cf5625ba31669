"""em_disco's frames as typed data, and the exact bytes of those a client sends.

The wire is JSON text frames. Where documents and the running reference differ, both forms are
read. Nothing here touches a socket.
"""

from __future__ import annotations

from typing import Any

import msgspec

REGISTER = "register"
AGENT_HELLO = "agent_hello"
QUERY = "query"
RESULT = "result"
REGISTERED = "registered"
AGENT_REGISTERED = "agent_registered"

_NOTHING = msgspec.Raw()


class Register(msgspec.Struct, tag_field="action", tag=REGISTER):
    """First frame of the handshake. `name` must equal the token's `sub`."""

    name: str


class AgentHello(msgspec.Struct, tag_field="action", tag=AGENT_HELLO):
    """Second frame of the handshake; an empty list of capabilities is still sent."""

    capabilities: tuple[str, ...]


class Query(msgspec.Struct, tag_field="action", tag=QUERY):
    """A query, as a node sends it."""

    id: str
    body: str


class NodeFrame(msgspec.Struct):
    """Any frame that a node sends, seen by a client.

    Every field is optional and of any type, because nodes are not ours to control; what the
    frame means is decided from what is there. `id` stays raw, so that it is echoed untouched.
    """

    action: Any = None
    id: msgspec.Raw = _NOTHING
    body: Any = msgspec.UNSET
    status: Any = None
    reason: Any = None
    error: Any = None
    capabilities: Any = None


class RawQuery(msgspec.Struct):
    """A query frame with its body as the JSON it came in, for bodies that are no strings or no values of Python's."""

    action: str = ""
    id: msgspec.Raw = _NOTHING
    body: msgspec.Raw = _NOTHING


class ClientFrame(msgspec.Struct):
    """Any frame that a client sends, seen by a node."""

    action: Any = None
    name: Any = None
    capabilities: Any = None
    id: msgspec.Raw = _NOTHING
    data: msgspec.Raw = _NOTHING


decode_node_frame = msgspec.json.Decoder(NodeFrame).decode
decode_raw_query = msgspec.json.Decoder(RawQuery).decode
decode_client_frame = msgspec.json.Decoder(ClientFrame).decode
encode = msgspec.json.encode


def result(query_id: bytes | msgspec.Raw, data: bytes) -> bytes:
    """Return the `result` frame that answers `query_id`; both are JSON already encoded."""
    return b"".join((b'{"action":"result","id":', query_id, b',"data":', data, b"}"))
