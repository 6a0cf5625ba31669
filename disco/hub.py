"""What a node's connections and routes share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from disco.journal import Journal
from disco.queries import Queries
from disco.rate import Bucket
from disco.registry import Registry
from disco.settings import NodeSettings


class Changes:
    """Wakes one waiter at each change of a registry; changes that nobody waited for yet count as one."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        """Note that something has changed."""
        self._event.set()

    async def wait(self) -> None:
        """Return at once when something has changed since the last return, else when it does."""
        await self._event.wait()
        self._event = anyio.Event()


class Hub:
    """The parts of one node: registry, queries, log, rates. No sockets. `url` is where agents find it."""

    def __init__(self, settings: NodeSettings, url: str) -> None:
        self.settings = settings
        self.registry = Registry()
        self.queries = Queries(self.registry, settings.query_timeout_ms)
        self.journal = Journal(url)
        self.stopping = False
        self._query_rate = Bucket(settings.queries_per_s)
        self._connection_rate = Bucket(settings.connections_per_s)

    def admits_query(self) -> bool:
        """Return whether one more HTTP query may be asked now."""
        return self._query_rate.admit(time.monotonic())

    def admits_connection(self) -> bool:
        """Return whether one more agent may connect now."""
        return self._connection_rate.admit(time.monotonic())

    @contextmanager
    def changes(self) -> Iterator[Changes]:
        """Watch the registry; a stop of the node counts as a change."""
        changes = Changes()
        unsubscribe = self.registry.subscribe(changes.set)
        try:
            yield changes
        finally:
            unsubscribe()

    def stop(self) -> None:
        """Let event streams end now; queries end as the agents that they wait for are let go."""
        self.stopping = True
        self.registry.notify()
