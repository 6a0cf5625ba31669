"""What agents answer, made into one list (PROTOCOL.md, 3 and 9). Items stay the JSON that they came as."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec


class _Typed(msgspec.Struct):
    type: Any = None


_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_typed = msgspec.json.Decoder(_Typed).decode


def flatten(data: msgspec.Raw) -> list[msgspec.Raw]:
    """Return the items of one answer: those of a list, an object itself, nothing for any other value."""
    start = bytes(memoryview(data)[:1])
    if start == b"[":
        return _decode_items(data)
    return [data] if start == b"{" else []


def group_by_type(items: Iterable[msgspec.Raw]) -> list[msgspec.Raw]:
    """Return `items` with those of one `type` together, the most frequent type first.

    Types that are as frequent keep the order in which they first came, items of one type theirs.
    """
    groups: dict[str | None, list[msgspec.Raw]] = {}
    for item in items:
        groups.setdefault(_type_of(item), []).append(item)
    by_frequency = sorted(groups.values(), key=len, reverse=True)
    return [item for group in by_frequency for item in group]


def decode(items: Iterable[msgspec.Raw]) -> list[Any]:
    """Return the values of `items`, without those that Python cannot hold (a number like 1e999)."""
    values = []
    for item in items:
        try:
            values.append(msgspec.json.decode(item))
        except (msgspec.DecodeError, RecursionError):
            continue
    return values


def _type_of(item: msgspec.Raw) -> str | None:
    try:
        found = _decode_typed(item).type
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
