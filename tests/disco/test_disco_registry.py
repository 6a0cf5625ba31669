from __future__ import annotations

import msgspec

from disco.registry import Registry
from tests.disco.harness import Line


def registry_of(**capabilities: tuple[str, ...]) -> tuple[Registry, dict[str, Line]]:
    registry, lines = Registry(clock=lambda: 1000.9), {}
    for name, offered in capabilities.items():
        lines[name] = Line()
        assert registry.claim(lines[name], name, offered)
    return registry, lines


def test_listing_shows_names_capabilities_and_whole_seconds() -> None:
    registry, _ = registry_of(a=("search",))
    assert msgspec.json.decode(registry.listing()) == {
        "agents": [{"name": "a", "capabilities": ["search"], "connected_at": 1000}]
    }


def test_name_belongs_to_the_first_until_released() -> None:
    registry, lines = registry_of(a=())
    rival = Line()
    assert registry.claim(rival, "a", ()) is None
    assert registry.release(lines["a"]) is not None
    assert registry.claim(rival, "a", ()) is not None


def test_release_of_a_peer_that_lost_the_race_leaves_the_holder() -> None:
    registry, _ = registry_of(a=())
    rival = Line()
    registry.claim(rival, "a", ())
    assert registry.release(rival) is None
    assert "a" in registry


def test_claiming_again_changes_the_capabilities_and_keeps_the_time() -> None:
    times = iter([1.0, 2.0])
    registry, line = Registry(clock=lambda: next(times)), Line()
    registry.claim(line, "a", ("x",))
    registry.claim(line, "a", ("y",))
    assert [(agent.capabilities, agent.connected_at) for agent in registry.agents()] == [(("y",), 1)]


def test_agents_with_one_of_the_capabilities_are_asked() -> None:
    registry, lines = registry_of(a=("x",), b=("y", "z"), c=())
    assert registry.asked(["z", "x"]) == [lines["a"], lines["b"]]


def test_everybody_is_asked_when_no_capability_matches_or_none_is_given() -> None:
    registry, lines = registry_of(a=("x",), b=())
    assert registry.asked(["unheard of"]) == list(lines.values())
    assert registry.asked([]) == list(lines.values())


def test_subscribers_hear_of_arrivals_changes_and_departures_until_they_unsubscribe() -> None:
    registry, line, heard = Registry(), Line(), []
    unsubscribe = registry.subscribe(lambda: heard.append(registry.listing()))
    registry.claim(line, "a", ())
    registry.claim(line, "a", ("x",))
    registry.release(line)
    assert len(set(heard)) == 3
    unsubscribe()
    registry.claim(line, "a", ())
    assert len(heard) == 3
