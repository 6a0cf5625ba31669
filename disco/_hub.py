"""The state that a node's connections and routes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from disco._log import NodeLog
from disco._queries import QueryFanOut
from disco._rate import TokenBucket
from disco._registry import Registry
from disco._settings import NodeSettings


class _Changes:
    """Wakes one waiter after changes of a registry. Changes between two waits count as one."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        """Note that something has changed."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for a change. Returns at once if there was one since the last return."""
        await self._event.wait()
        # A new event for the next wait: an event of anyio cannot be cleared.
        self._event = anyio.Event()


class Hub:
    """What all connections of one node share: its registry, queries, log and rates.

    Args:
        settings: the node's settings.
        url: the node's URL for agents. It is in every log line.

    Attributes:
        stopping: whether the node is shutting down.
    """

    def __init__(self, settings: NodeSettings, url: str) -> None:
        self.settings = settings
        self.registry = Registry()
        self.queries = QueryFanOut(self.registry, settings.query_timeout_ms)
        self.log = NodeLog(url)
        self.stopping = False
        self._query_rate = TokenBucket(settings.queries_per_s)
        self._connection_rate = TokenBucket(settings.connections_per_s)

    def admits_query(self) -> bool:
        """Count one HTTP query, and return whether the rate allows it."""
        return self._query_rate.admit(time.monotonic())

    def admits_connection(self) -> bool:
        """Count one connection of an agent, and return whether the rate allows it."""
        return self._connection_rate.admit(time.monotonic())

    @contextmanager
    def changes(self) -> Iterator[_Changes]:
        """Watch the registry. Stopping the node counts as a change."""
        changes = _Changes()
        unsubscribe = self.registry.subscribe(changes.set)
        try:
            yield changes
        finally:
            unsubscribe()

    def stop(self) -> None:
        """End the event streams.

        Queries in flight end when the connections of their agents are closed.
        """
        # The flag first: streams that the notification wakes must see it, and end.
        self.stopping = True
        self.registry.notify()
