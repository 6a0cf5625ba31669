"""A handler's result as JSON: encoded once, in the worker, and embedded unchanged after that."""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode

# `Raw` checks the syntax and builds no objects.
_check_syntax = msgspec.json.Decoder(msgspec.Raw).decode


class HandlerFault(Exception):
    """The handler returned an invalid value or hangs, or its `setup` or `close` failed or hangs."""


def encode_result(result: Any) -> bytes:
    """Return a handler's result as the JSON that goes to a node.

    `bytes` are JSON that the handler has encoded: checked and kept as they are. A `str` becomes a
    JSON string.

    Raises:
        HandlerFault: if bytes are not JSON.
        Exception: what `msgspec` raises for a value that JSON cannot hold.
    """
    if isinstance(result, (bytes, bytearray, memoryview)):
        encoded = bytes(result)
        # They are embedded in a frame. A comma or a brace too many would change its meaning, or
        # make it unreadable to the node.
        if not is_json(encoded):
            raise HandlerFault("handle() returned bytes that are not JSON; return text as str")
        return encoded
    return _encode(result)


def is_json(data: bytes) -> bool:
    """Return whether `data` is one JSON value in UTF-8."""
    try:
        # The syntax check alone does not validate the UTF-8 within strings.
        data.decode("utf-8")
        _check_syntax(data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return False
    return True
