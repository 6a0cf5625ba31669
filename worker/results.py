"""A handler's result as JSON: encoded once, in the worker, and embedded by whoever passes it on."""

from __future__ import annotations

from typing import Any

import msgspec


class HandlerFault(Exception):
    """A handler returned what it must not."""


def encode_result(result: Any) -> bytes:
    """Return a handler's result as the JSON that goes to a node.

    `bytes` are JSON already encoded: checked, then kept as they are. A `str` is a JSON string.

    Raises:
        HandlerFault: when bytes are not JSON.
        Exception: whatever `msgspec` raises for what JSON cannot hold.
    """
    if isinstance(result, _ENCODED):
        encoded = bytes(result)
        if not is_json(encoded):
            raise HandlerFault("handle() returned bytes that are not JSON; return text as str")
        return encoded
    return _encode(result)


def is_json(data: bytes) -> bool:
    """Return whether `data` is one JSON value in UTF-8."""
    try:
        data.decode("utf-8")
        _skim(data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return False
    return True


_ENCODED = (bytes, bytearray, memoryview)
_encode = msgspec.json.Encoder().encode
_skim = msgspec.json.Decoder(msgspec.Raw).decode
