"""The registry of agents, without sockets."""

from __future__ import annotations

import msgspec

from disco._registry import Registry
from tests.disco.harness import NullPeer


def registry_of(**capabilities: tuple[str, ...]) -> tuple[Registry, dict[str, NullPeer]]:
    registry, peers = Registry(clock=lambda: 1000.9), {}
    for name, offered in capabilities.items():
        peers[name] = NullPeer()
        assert registry.claim(peers[name], name, offered)
    return registry, peers


def test_listing_shows_names_capabilities_and_whole_seconds() -> None:
    registry, _ = registry_of(a=("search",))
    assert msgspec.json.decode(registry.listing()) == {
        "agents": [{"name": "a", "capabilities": ["search"], "connected_at": 1000}]
    }


def test_name_belongs_to_its_first_peer_until_released() -> None:
    registry, peers = registry_of(a=())
    rival = NullPeer()
    assert registry.claim(rival, "a", ()) is None
    assert registry.release(peers["a"]) is not None
    assert registry.claim(rival, "a", ()) is not None


def test_release_by_a_refused_peer_keeps_the_registration() -> None:
    registry, _ = registry_of(a=())
    rival = NullPeer()
    registry.claim(rival, "a", ())
    assert registry.release(rival) is None
    assert "a" in registry


def test_second_claim_changes_capabilities_and_keeps_the_connection_time() -> None:
    times = iter([1.0, 2.0])
    registry, peer = Registry(clock=lambda: next(times)), NullPeer()
    registry.claim(peer, "a", ("x",))
    registry.claim(peer, "a", ("y",))
    assert [(agent.capabilities, agent.connected_at) for agent in registry.agents()] == [
        (("y",), 1)
    ]


def test_agents_with_one_of_the_capabilities_are_asked() -> None:
    registry, peers = registry_of(a=("x",), b=("y", "z"), c=())
    assert registry.recipients(["z", "x"]) == [peers["a"], peers["b"]]


def test_all_agents_are_asked_when_no_capability_matches() -> None:
    registry, peers = registry_of(a=("x",), b=())
    assert registry.recipients(["unknown"]) == list(peers.values())
    assert registry.recipients([]) == list(peers.values())


def test_subscriber_is_notified_of_changes_until_it_unsubscribes() -> None:
    registry, peer, listings = Registry(), NullPeer(), []
    unsubscribe = registry.subscribe(lambda: listings.append(registry.listing()))
    registry.claim(peer, "a", ())
    registry.claim(peer, "a", ("x",))
    registry.release(peer)
    assert len(set(listings)) == 3
    unsubscribe()
    registry.claim(peer, "a", ())
    assert len(listings) == 3
