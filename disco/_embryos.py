"""Merges agents' results into one list of embryos. Items stay the JSON that the agents sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec


class _Typed(msgspec.Struct):
    type: Any = None


# Raw items pass through the node unchanged: no number loses digits, and no item is encoded again.
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_typed = msgspec.json.Decoder(_Typed).decode


def flatten(data: msgspec.Raw) -> list[msgspec.Raw]:
    """Return the items of one result: those of a list, or an object itself.

    Any other value has no items.
    """
    start = bytes(memoryview(data)[:1])
    if start == b"[":
        return _decode_items(data)
    if start == b"{":
        return [data]
    return []


def group_by_type(items: Iterable[msgspec.Raw]) -> list[msgspec.Raw]:
    """Return `items` grouped by their field `type`, the most frequent type first.

    Equally frequent types keep the order of their first items. Items of one type keep their order.
    """
    groups: dict[str | None, list[msgspec.Raw]] = {}
    for item in items:
        groups.setdefault(_type_of(item), []).append(item)
    # `sorted` is stable, also with `reverse`, and a dict keeps the order of the first items.
    by_frequency = sorted(groups.values(), key=len, reverse=True)
    return [item for group in by_frequency for item in group]


def decode(items: Iterable[msgspec.Raw]) -> list[Any]:
    """Return the values of `items`, without those that msgspec cannot decode (such as 1e999)."""
    values = []
    for item in items:
        try:
            values.append(msgspec.json.decode(item))
        except (msgspec.DecodeError, RecursionError):
            continue
    return values


def _type_of(item: msgspec.Raw) -> str | None:
    # An agent chooses the JSON: the item may be no object, or too deeply nested for the decoder.
    try:
        found = _decode_typed(item).type
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
