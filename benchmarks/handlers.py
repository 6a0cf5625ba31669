"""The handlers that are measured: they do nothing, so that what is seen is the runner."""

from __future__ import annotations

import os
import threading
from typing import Any, Final

CRASH_AFTER_S: Final = 1.1
"""A little more than the life after which the restart policy takes a worker for stable: then its next
restart is immediate again, and so one that dies at this age is started more often than any other."""


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


async def who(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Say which process answers."""
    return {"pid": os.getpid()}, memory


def spin(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep a core busy, and never answer."""
    while True:
        pass


class CrashLoop:
    """Dies again and again, as fast as the restart policy lets it."""

    def setup(self) -> None:
        """Arrange for the end."""
        fuse = threading.Timer(CRASH_AFTER_S, os._exit, (1,))
        fuse.daemon = True
        fuse.start()

    def handle(self, body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Give the query back."""
        return body, memory


async def count_async(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count the queries, from the event loop."""
    return count(body, memory)
