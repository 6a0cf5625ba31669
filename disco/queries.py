"""Queries in flight: who was asked, what came back, when it is enough."""

from __future__ import annotations

import base64
import os
from collections.abc import Collection

import anyio
import msgspec

from disco import embryos
from disco.registry import Peer, Registry
from shared import frames


class Pending:
    """One query that has been sent and is being waited for."""

    def __init__(self, asked: Collection[Peer]) -> None:
        self._waiting = set(asked)
        self.items: list[msgspec.Raw] = []
        self.done = anyio.Event()

    def answer(self, peer: Peer, data: msgspec.Raw) -> None:
        """Take the first answer of a peer that was asked; anything else is dropped."""
        if peer in self._waiting:
            self.items += embryos.flatten(data)
            self.forget(peer)

    def forget(self, peer: Peer) -> None:
        """Wait no longer for `peer`."""
        self._waiting.discard(peer)
        if not self._waiting:
            self.done.set()


class Queries:
    """Sends each query to the agents that it is for, and collects their answers."""

    def __init__(self, registry: Registry, timeout_ms: int) -> None:
        """`timeout_ms` is how long a query waits for all its agents together."""
        self._registry = registry
        self._timeout_ms = timeout_ms
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        """Return how many queries are in flight."""
        return len(self._pending)

    async def ask(
        self, text: str, capabilities: Collection[str] = (), timeout_ms: int | None = None
    ) -> list[msgspec.Raw]:
        """Return what the agents answered before the time-out, grouped by type.

        Args:
            text: the query, passed on as it is.
            capabilities: only agents with one of these are asked, when there are any.
            timeout_ms: another time-out than the node's.
        """
        peers = self._registry.asked(capabilities)
        if not peers:
            return []
        query_id = new_id()
        frame = frames.encode(frames.Query(query_id, text))
        pending = self._pending[query_id] = Pending(peers)
        try:
            for peer in peers:
                peer.send(frame)
            with anyio.move_on_after((self._timeout_ms if timeout_ms is None else timeout_ms) / 1000):
                await pending.done.wait()
        finally:
            del self._pending[query_id]
        return embryos.group_by_type(pending.items)

    def answer(self, peer: Peer, query_id: str, data: msgspec.Raw) -> None:
        """Take an answer; a late one, or one that nobody asked for, is dropped silently."""
        pending = self._pending.get(query_id)
        if pending is not None:
            pending.answer(peer, data)

    def forget(self, peer: Peer) -> None:
        """Wait no longer for a peer that has gone."""
        for pending in self._pending.values():
            pending.forget(peer)


def new_id() -> str:
    """Return a query id: base64, as the reference's are, and not to be guessed by another agent."""
    return base64.b64encode(os.urandom(16)).decode()
