"""Queries in flight: which agents were asked, what they answered, and when a query is complete."""

from __future__ import annotations

import base64
import os
from collections.abc import Collection

import anyio
import msgspec

from disco import _embryos
from disco._registry import AgentConnection, Registry
from shared import frames


class _PendingQuery:
    """One query that was sent, and the results so far."""

    def __init__(self, recipients: Collection[AgentConnection]) -> None:
        self._waiting = set(recipients)
        self.items: list[msgspec.Raw] = []
        self.complete = anyio.Event()

    def add_result(
        self,
        connection: AgentConnection,
        data: msgspec.Raw,
    ) -> None:
        """Add the first result of a recipient.

        Further results, and those of other agents, are dropped: an agent that has seen a query's
        id must not answer twice, and an agent that guessed it must not answer at all.
        """
        if connection in self._waiting:
            self.items += _embryos.flatten(data)
            self.forget(connection)

    def forget(self, connection: AgentConnection) -> None:
        """Stop waiting for `connection`."""
        self._waiting.discard(connection)
        if not self._waiting:
            self.complete.set()


class QueryFanOut:
    """Sends each query to its recipients, and collects their results.

    Args:
        registry: the agents.
        timeout_ms: how long a query waits for all its recipients together.
    """

    def __init__(
        self,
        registry: Registry,
        timeout_ms: int,
    ) -> None:
        self._registry = registry
        self._timeout_ms = timeout_ms
        self._pending: dict[str, _PendingQuery] = {}

    def __len__(self) -> int:
        """Return the number of queries in flight."""
        return len(self._pending)

    async def ask(
        self,
        text: str,
        capabilities: Collection[str] = (),
        timeout_ms: int | None = None,
    ) -> list[msgspec.Raw]:
        """Return the items that agents sent before the timeout, grouped by type.

        Args:
            text: the query, passed on unchanged.
            capabilities: ask only agents with one of these. If no agent has one, all are asked.
            timeout_ms: replaces the node's timeout.
        """
        recipients = self._registry.recipients(capabilities)
        if not recipients:
            return []
        # 128 random bits: an agent that was not asked cannot guess the id of another's query.
        # In Base64, as the ids of the reference node.
        query_id = base64.b64encode(os.urandom(16)).decode()
        frame = frames.encode(frames.Query(query_id, text))
        # Before the first send: sending to an agent that does not read may drop it at once, and the
        # query must then stop waiting for it.
        pending = self._pending[query_id] = _PendingQuery(recipients)
        timeout_s = (self._timeout_ms if timeout_ms is None else timeout_ms) / 1000
        try:
            for connection in recipients:
                connection.send(frame)
            with anyio.move_on_after(timeout_s):
                await pending.complete.wait()
        finally:
            # Also when the HTTP client disconnects and the request is cancelled.
            del self._pending[query_id]
        return _embryos.group_by_type(pending.items)

    def add_result(
        self,
        connection: AgentConnection,
        query_id: str,
        data: msgspec.Raw,
    ) -> None:
        """Take a result. A late one, or one for an unknown query, is dropped silently."""
        pending = self._pending.get(query_id)
        if pending is not None:
            pending.add_result(connection, data)

    def forget(self, connection: AgentConnection) -> None:
        """Stop waiting for an agent that has disconnected."""
        for pending in self._pending.values():
            pending.forget(connection)
