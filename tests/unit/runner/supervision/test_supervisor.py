"""`runner.supervision.supervisor`: the changes between two configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from runner.supervision.supervisor import Changes
from shared.config.load import Agent, HandlerRef, WorkerSpec, parse, worker_specs
from shared.config.nodes import parse_node
from shared.config.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
)

AGENT = Agent(
    name="a",
    handler=HandlerRef("worker.echo", None, "handle", Path("/")),
    nodes=(parse_node("h"),),
)

# A value other than the default for each key that a worker depends on.
KEYS_OF_WORKERS = {
    "runner": {
        "state_dir": "elsewhere",
        "log_level": "debug",
        "log_format": "json",
        "tracing": True,
    },
    "connection": {
        "reconnect_interval_ms": 1,
        "connect_timeout_ms": 1,
        "upgrade_timeout_ms": 1,
        "ping_interval_ms": 1,
        "max_frame_bytes": 2048,
        "tls_ca_file": "a_file",
        "jwt_token": "a token",
        "jwt_token_file": "a_file",
        "jwt_secret_file": "a_file",
    },
    "supervision": {
        "shutdown_timeout_ms": 1,
        "liveness_timeout_ms": 100,
        "handler_timeout_ms": 1,
    },
    "agent": {
        "handler": "worker.echo:other",
        "capabilities": ["search"],
        "memory": "none",
        "concurrency": 2,
        "handler_timeout_ms": 1,
        "max_queries": 1,
        "max_rss_mb": 16,
        "nodes": ["elsewhere"],
    },
}
# The same for each key that only the runner depends on.
OTHER_KEYS = {
    "runner": {
        "http": "localhost:0",
        "http_token": "a-token",
        "http_token_file": "a_file",
        "query_timeout_ms": 1,
        "max_in_flight": 1,
        "max_in_flight_total": 1,
    },
    "supervision": {"max_restarts": 1, "restart_window_s": 1},
}


def items(keys: dict[str, dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [(section, key, values[key]) for section, values in keys.items() for key in values]


def changes_by(folder: Path, section: str, key: str, value: Any) -> Changes:
    """Return what a reload changes after one key has been set."""
    file = folder / "a_file"
    file.write_text("a-secret-of-more-than-32-characters")
    file.chmod(0o600)
    # Queries that share a memory cannot run at once.
    memory = "none" if key == "concurrency" else "ram"
    tables = {"agent": {"name": "a", "handler": "worker.echo:handle", "memory": memory}}

    def specs() -> dict[str, WorkerSpec]:
        table = {**tables, "agent": [tables["agent"]]}
        config = parse(table, folder, environ={}, emergence_conf=folder / "no_file")
        return {spec.name: spec for spec in worker_specs(config)}

    before = specs()
    tables.setdefault(section, {})[key] = value
    return Changes.between(before, specs())


def specs(*names: str) -> dict[str, WorkerSpec]:
    return {name: WorkerSpec(name=name, agent=AGENT, node=AGENT.nodes[0]) for name in names}


def test_equal_specs_change_nothing() -> None:
    assert Changes.between(specs("a", "b"), specs("b", "a")) == Changes(unchanged=2)


def test_new_worker_is_added_and_missing_one_is_removed() -> None:
    changes = Changes.between(specs("a", "b"), specs("b", "c"))
    assert changes == Changes(added=("c",), removed=("a",), unchanged=1)


def test_worker_with_another_spec_is_replaced() -> None:
    after = specs("a", "b")
    after["a"] = msgspec.structs.replace(after["a"], node=parse_node("other"))
    assert Changes.between(specs("a", "b"), after) == Changes(replaced=("a",), unchanged=1)


@pytest.mark.parametrize(("section", "key", "value"), items(KEYS_OF_WORKERS))
def test_change_of_a_key_that_a_worker_depends_on_replaces_it(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    assert changes_by(tmp_path, section, key, value) == Changes(replaced=("a_server",))


def test_default_node_that_is_written_out_replaces_no_worker(tmp_path: Path) -> None:
    assert changes_by(tmp_path, "agent", "nodes", ["localhost"]) == Changes(unchanged=1)


@pytest.mark.parametrize(("section", "key", "value"), items(OTHER_KEYS))
def test_change_of_any_other_key_replaces_no_worker(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    assert changes_by(tmp_path, section, key, value) == Changes(unchanged=1)


@pytest.mark.parametrize(
    ("section", "struct"),
    [
        ("runner", RunnerSection),
        ("connection", ConnectionSection),
        ("supervision", SupervisionSection),
        ("agent", AgentSection),
    ],
)
def test_effect_of_every_key_is_tested(section: str, struct: type[msgspec.Struct]) -> None:
    tested = {*KEYS_OF_WORKERS[section], *OTHER_KEYS.get(section, {})}
    # Another name is another worker.
    assert tested == {*struct.__struct_fields__} - {"name"}


def test_agent_that_sets_the_value_that_it_already_had_is_not_replaced(tmp_path: Path) -> None:
    default = SupervisionSection().handler_timeout_ms
    changes = changes_by(tmp_path, "agent", "handler_timeout_ms", default)
    assert changes == Changes(unchanged=1)
