"""The handlers that are measured: they do nothing, so that what is seen is the runner."""

from __future__ import annotations

from typing import Any


async def echo(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the query back, from the event loop."""
    return body, memory


def echo_sync(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the query back, from the handler's thread."""
    return body, memory


def count(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count the queries."""
    number = memory.get("count", 0) + 1
    return number, {"count": number}
