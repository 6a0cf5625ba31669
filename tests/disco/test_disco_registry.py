"""The registry of agents, without sockets."""

from __future__ import annotations

import msgspec

from disco._registry import Registry
from tests.disco.harness import NullConnection


def registry_of(**capabilities: tuple[str, ...]) -> tuple[Registry, dict[str, NullConnection]]:
    registry, connections = Registry(clock=lambda: 1000.9), {}
    for name, offered in capabilities.items():
        connections[name] = NullConnection()
        assert registry.claim(connections[name], name, offered)
    return registry, connections


def test_listing_shows_names_capabilities_and_whole_seconds() -> None:
    registry, _ = registry_of(a=("search",))
    assert msgspec.json.decode(registry.listing()) == {
        "agents": [{"name": "a", "capabilities": ["search"], "connected_at": 1000}]
    }


def test_name_belongs_to_its_first_peer_until_released() -> None:
    registry, connections = registry_of(a=())
    rival = NullConnection()
    assert registry.claim(rival, "a", ()) is None
    assert registry.release(connections["a"]) is not None
    assert registry.claim(rival, "a", ()) is not None


def test_release_by_a_refused_peer_keeps_the_registration() -> None:
    registry, _ = registry_of(a=())
    rival = NullConnection()
    registry.claim(rival, "a", ())
    assert registry.release(rival) is None
    assert "a" in registry


def test_second_claim_changes_capabilities_and_keeps_the_connection_time() -> None:
    times = iter([1.0, 2.0])
    registry, connection = Registry(clock=lambda: next(times)), NullConnection()
    registry.claim(connection, "a", ("x",))
    registry.claim(connection, "a", ("y",))
    assert [(agent.capabilities, agent.connected_at) for agent in registry.agents()] == [
        (("y",), 1)
    ]


def test_agents_with_one_of_the_capabilities_are_asked() -> None:
    registry, connections = registry_of(a=("x",), b=("y", "z"), c=())
    assert registry.recipients(["z", "x"]) == [connections["a"], connections["b"]]


def test_all_agents_are_asked_when_no_capability_matches() -> None:
    registry, connections = registry_of(a=("x",), b=())
    assert registry.recipients(["unknown"]) == list(connections.values())
    assert registry.recipients([]) == list(connections.values())


def test_subscriber_is_notified_of_changes_until_it_unsubscribes() -> None:
    registry, connection, listings = Registry(), NullConnection(), []
    unsubscribe = registry.subscribe(lambda: listings.append(registry.listing()))
    registry.claim(connection, "a", ())
    registry.claim(connection, "a", ("x",))
    registry.release(connection)
    assert len(set(listings)) == 3
    unsubscribe()
    registry.claim(connection, "a", ())
    assert len(listings) == 3
