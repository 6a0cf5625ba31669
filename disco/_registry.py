"""Which agent is registered under which name, and which agents receive a query. No sockets."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec


class AgentConnection(Protocol):
    """One agent's connection, as the registry and the queries use it."""

    def send(self, frame: bytes) -> None:
        """Send one text frame, or nothing if the connection is closing. Never raises."""

    def drop(self, reason: str) -> None:
        """Cut the connection without a close frame; `reason` is for the log."""


class RegisteredAgent(msgspec.Struct, frozen=True):
    """What the registry lists of a registered agent. `connected_at` is in Unix seconds."""

    name: str
    capabilities: tuple[str, ...]
    connected_at: int


class Registry:
    """The agents that have completed the handshake, in the order in which they did.

    Args:
        clock: returns Unix seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._agents: dict[str, RegisteredAgent] = {}
        self._connections: dict[str, AgentConnection] = {}
        self._names: dict[AgentConnection, str] = {}
        self._subscribers: set[Callable[[], object]] = set()
        self._listing: bytes | None = None

    def __contains__(self, name: str) -> bool:
        """Return whether an agent is registered as `name`."""
        return name in self._agents

    def __len__(self) -> int:
        """Return the number of registered agents."""
        return len(self._agents)

    def agents(self) -> list[RegisteredAgent]:
        """Return the registered agents."""
        return list(self._agents.values())

    def connection(self, name: str) -> AgentConnection | None:
        """Return the connection of the agent that is registered as `name`."""
        return self._connections.get(name)

    def name_of(self, connection: AgentConnection) -> str | None:
        """Return the name under which `connection` is registered."""
        return self._names.get(connection)

    def claim(
        self,
        connection: AgentConnection,
        name: str,
        capabilities: tuple[str, ...],
    ) -> RegisteredAgent | None:
        """Register `connection` as `name`. Returns None if another connection has the name.

        If `connection` is already registered as `name`, only its capabilities change.
        """
        # The first holder keeps the name. If the newcomer got it, anyone who knows an agent's name
        # could take its queries over.
        holder = self._connections.get(name)
        if holder is None:
            connected_at = int(self._clock())
        elif holder is connection:
            connected_at = self._agents[name].connected_at
        else:
            return None
        agent = self._agents[name] = RegisteredAgent(name, capabilities, connected_at)
        self._connections[name] = connection
        self._names[connection] = name
        self.notify()
        return agent

    def release(self, connection: AgentConnection) -> RegisteredAgent | None:
        """Free the name of `connection`. Returns the agent, or None if it was not registered."""
        # By connection and not by name: one that did not get its name must not free the holder's.
        name = self._names.pop(connection, None)
        if name is None:
            return None
        del self._connections[name]
        agent = self._agents.pop(name)
        self.notify()
        return agent

    def recipients(self, capabilities: Collection[str]) -> list[AgentConnection]:
        """Return the agents that have one of `capabilities`, or all agents if none has."""
        wanted = set(capabilities)
        able = [
            self._connections[name]
            for name, agent in self._agents.items()
            if wanted.intersection(agent.capabilities)
        ]
        return able or list(self._connections.values())

    def listing(self) -> bytes:
        """Return the JSON of GET /registry."""
        # Encoded once per change, not once per reader: any number of clients may poll it.
        if self._listing is None:
            self._listing = msgspec.json.encode({"agents": self.agents()})
        return self._listing

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call `callback` at each change, until the function that this returns is called."""
        self._subscribers.add(callback)
        return functools.partial(self._subscribers.discard, callback)

    def notify(self) -> None:
        """Drop the cached listing, and call every subscriber."""
        self._listing = None
        for callback in list(self._subscribers):
            callback()
