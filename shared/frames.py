"""em_disco's frames: JSON objects, each in one text frame. No sockets here.

If the protocol's documents and the reference node differ, both forms are accepted.
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

_ABSENT = msgspec.Raw()


class Query(msgspec.Struct, tag_field="action", tag=QUERY):
    """A query, as a node sends it."""

    id: str
    body: str


class NodeFrame(msgspec.Struct):
    """Any frame that a node sends, as a client decodes it."""

    # Every field is optional and of any type, because nodes may send anything. The caller decides
    # what a frame means from the fields that it has.
    action: Any = None
    # The id stays undecoded, so that the answer has exactly the bytes that the node sent.
    id: msgspec.Raw = _ABSENT
    body: Any = msgspec.UNSET
    status: Any = None
    reason: Any = None
    error: Any = None


class _RawQuery(msgspec.Struct):
    """A query frame whose body stays undecoded."""

    # It has two uses. A body that is not a string goes to the handler as its JSON. A frame with a
    # number that no Python type can hold, such as 1e999, cannot be decoded as a `NodeFrame`.
    action: str = ""
    id: msgspec.Raw = _ABSENT
    body: msgspec.Raw = _ABSENT


class ClientFrame(msgspec.Struct):
    """Any frame that a client sends, as a node decodes it."""

    action: Any = None
    name: Any = None
    capabilities: Any = None
    id: msgspec.Raw = _ABSENT
    data: msgspec.Raw = _ABSENT


decode_node_frame = msgspec.json.Decoder(NodeFrame).decode
decode_raw_query = msgspec.json.Decoder(_RawQuery).decode
decode_client_frame = msgspec.json.Decoder(ClientFrame).decode
encode = msgspec.json.encode


def result(query_id: bytes | msgspec.Raw, data: bytes) -> bytes:
    """Return the `result` frame for a query. Both arguments are JSON already."""
    # Each answer passes here. Joining takes about 0.6 us, a Struct with two `Raw` fields 1.0 us.
    return b"".join((b'{"action":"result","id":', query_id, b',"data":', data, b"}"))
