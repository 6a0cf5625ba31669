"""Who is listed under which name, and who is asked. No sockets here: a peer is anything that can be sent a frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec


class Peer(Protocol):
    """One agent's connection, as the registry and the queries see it."""

    def send(self, frame: bytes) -> None:
        """Send one text frame, or nothing when the connection is closing. Never raises."""

    def drop(self, why: str) -> None:
        """Cut the connection without a close frame; `why` is for the log."""


class Agent(msgspec.Struct, frozen=True):
    """A listed agent. `connected_at` is in Unix seconds."""

    name: str
    capabilities: tuple[str, ...]
    connected_at: int


class Registry:
    """The agents that have finished the handshake, in the order in which they did."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Start empty. `clock` returns Unix seconds."""
        self._clock = clock
        self._agents: dict[str, Agent] = {}
        self._peers: dict[str, Peer] = {}
        self._names: dict[Peer, str] = {}
        self._subscribers: dict[object, Callable[[], None]] = {}
        self._listing: bytes | None = None

    def __contains__(self, name: str) -> bool:
        """Return whether an agent of that name is listed."""
        return name in self._agents

    def __len__(self) -> int:
        """Return how many agents are listed."""
        return len(self._agents)

    def agents(self) -> list[Agent]:
        """Return the listed agents."""
        return list(self._agents.values())

    def peer(self, name: str) -> Peer | None:
        """Return the connection of the agent listed as `name`."""
        return self._peers.get(name)

    def name_of(self, peer: Peer) -> str | None:
        """Return the name that `peer` is listed as."""
        return self._names.get(peer)

    def claim(self, peer: Peer, name: str, capabilities: tuple[str, ...]) -> Agent | None:
        """List `peer` as `name`; returns None when another peer holds the name.

        A peer that is already listed so keeps its place, and only changes its capabilities.
        """
        holder = self._peers.get(name)
        if holder is not None and holder is not peer:
            return None
        since = int(self._clock()) if holder is None else self._agents[name].connected_at
        agent = self._agents[name] = Agent(name, capabilities, since)
        self._peers[name] = peer
        self._names[peer] = name
        self.notify()
        return agent

    def release(self, peer: Peer) -> Agent | None:
        """Free the name of `peer`, and return what it was listed as, or None when it was not."""
        name = self._names.pop(peer, None)
        if name is None:
            return None
        del self._peers[name]
        agent = self._agents.pop(name)
        self.notify()
        return agent

    def asked(self, capabilities: Collection[str]) -> list[Peer]:
        """Return who is asked: those that have one of `capabilities`, or everybody when none has."""
        wanted = set(capabilities)
        able = [self._peers[name] for name, agent in self._agents.items() if wanted.intersection(agent.capabilities)]
        return able or list(self._peers.values())

    def listing(self) -> bytes:
        """Return the JSON of GET /registry, encoded once for each change."""
        if self._listing is None:
            self._listing = msgspec.json.encode({"agents": self.agents()})
        return self._listing

    def subscribe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have `changed` called at each change; returns what ends that."""
        key = object()
        self._subscribers[key] = changed

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def notify(self) -> None:
        """Call every subscriber."""
        self._listing = None
        for changed in list(self._subscribers.values()):
            changed()
