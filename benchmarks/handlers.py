"""The handlers of the benchmarks. They do almost nothing, so the figures show the runner's cost."""

from __future__ import annotations

import os
import threading
from typing import Any, Final

CRASH_AFTER_S: Final = 1.1
"""A little longer than the time after which the restart policy considers a worker stable. The next
restart is then immediate, so a worker that dies at this age is restarted most often."""


async def echo(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the query, on the event loop."""
    return body, memory


def echo_sync(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the query, on the handler's thread."""
    return body, memory


def count(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count the queries."""
    number = memory.get("count", 0) + 1
    return number, {"count": number}


async def pid(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the pid of the process that answers."""
    return {"pid": os.getpid()}, memory


def spin(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Keep a core busy and never answer."""
    while True:
        pass


class CrashLoop:
    """Dies repeatedly, as often as the restart policy restarts it."""

    def setup(self) -> None:
        """Start the timer that ends the process."""
        timer = threading.Timer(CRASH_AFTER_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def handle(self, body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the query."""
        return body, memory


async def count_async(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Count the queries, on the event loop."""
    return count(body, memory)
