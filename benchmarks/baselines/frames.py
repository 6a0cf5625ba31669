"""A node's query and its answer, decoded and encoded in msgspec's fastest way."""

from __future__ import annotations

import msgspec


class Query(msgspec.Struct):
    """A node's frame."""

    action: str
    id: str = ""
    body: str = ""


class Result(msgspec.Struct, tag_field="action", tag="result"):
    """The answer to a query."""

    id: str
    data: str


decode = msgspec.json.Decoder(Query).decode
encode = msgspec.json.Encoder().encode
