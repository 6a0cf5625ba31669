"""`runner.supervision.supervisor`: the changes between two configurations."""

from __future__ import annotations

from pathlib import Path

import msgspec

from runner.supervision.supervisor import Changes
from shared.config.load import Agent, HandlerRef, WorkerSpec
from shared.config.nodes import parse_node

AGENT = Agent(
    name="a",
    handler=HandlerRef("worker.echo", None, "handle", Path("/")),
    nodes=(parse_node("h"),),
)


def specs(*names: str) -> dict[str, WorkerSpec]:
    return {
        name: WorkerSpec(name=name, agent=AGENT, node=AGENT.nodes[0], index=1) for name in names
    }


def test_equal_specs_change_nothing() -> None:
    assert Changes.between(specs("a", "b"), specs("b", "a")) == Changes(unchanged=2)


def test_new_worker_is_added_and_missing_one_is_removed() -> None:
    changes = Changes.between(specs("a", "b"), specs("b", "c"))
    assert changes == Changes(added=("c",), removed=("a",), unchanged=1)


def test_worker_with_another_spec_is_replaced() -> None:
    after = specs("a", "b")
    after["a"] = msgspec.structs.replace(after["a"], shutdown_timeout_ms=1)
    assert Changes.between(specs("a", "b"), after) == Changes(replaced=("a",), unchanged=1)
