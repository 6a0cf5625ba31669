"""`runner.metrics`: what the workers counted, as Prometheus reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from runner.lines import Ending
from runner.metrics import Own, Sample, exposition
from shared.ipc import Counters, Outcome
from tests.unit.test_status import row

ROOT = Path(__file__).resolve().parents[2]

OWN = Own({}, 1024)


def exposed(*samples: Sample, own: Own = OWN) -> dict[str, float]:
    """Return each sample line but for the runner's own process, by its name and its labels without worker and node."""
    found = {}
    for family in text_string_to_metric_families(exposition(samples, own).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            assert sample.labels.get("worker", "a_server") == "a_server"
            labels = {name: value for name, value in sample.labels.items() if name not in ("worker", "agent", "node")}
            found[f"{sample.name}{dict(sorted(labels.items())) or ''}"] = sample.value
    return found


def sample(counted: Counters, **more: Any) -> Sample:
    values: dict[str, Any] = {
        "row": row(),
        "restarts": {},
        "in_flight": 0,
        "silent_s": 0.0,
        "endings": {},
        "replacements": {},
    }
    return Sample(counted=counted, **values | more)


def test_queries_are_told_by_transport_and_outcome() -> None:
    counted = Counters()
    counted.node[Outcome.OK] = 7
    counted.http[Outcome.HANDLER_FAILED] = 2
    counted.http[Outcome.TIMED_OUT] = 1
    found = exposed(sample(counted))
    assert found["em_runner_queries_total{'outcome': 'ok', 'transport': 'websocket'}"] == 7
    assert found["em_runner_queries_total{'outcome': 'ok', 'transport': 'http'}"] == 0
    assert found["em_runner_queries_total{'outcome': 'failed', 'transport': 'http'}"] == 2
    assert found["em_runner_queries_total{'outcome': 'timed_out', 'transport': 'http'}"] == 1


def test_durations_are_in_the_bucket_that_holds_them_and_in_all_above() -> None:
    counted = Counters()
    for duration_s in (1e-7, 0.9e-6, 3e-6, 0.01, 0.02, 68.0, 70.0, 1000.0):
        counted.durations[int(duration_s * 1e9).bit_length()] += 1
        counted.busy_s += duration_s
    found = exposed(sample(counted))
    name = "em_runner_handler_duration_seconds"
    buckets = {float(key.split("'")[3]): value for key, value in found.items() if key.startswith(f"{name}_bucket")}
    assert buckets[2.048e-06] == 2, "what is too short for any is in the first"
    assert buckets[4.096e-06] == 3
    assert buckets[0.008388608] == 3
    assert buckets[0.016777216] == 4
    assert buckets[0.033554432] == 5
    assert buckets[68.719476736] == 6
    assert buckets[float("inf")] == found[f"{name}_count"] == 8
    assert found[f"{name}_sum"] == counted.busy_s
    assert list(buckets.values()) == sorted(buckets.values())


def test_what_a_worker_is_at_is_told_as_gauges() -> None:
    found = exposed(sample(Counters(), in_flight=3, silent_s=0.5, restarts={"killed": 2}, row=row(uptime_s=9.0)))
    assert found["em_runner_worker_registered"] == 1
    assert found["em_runner_worker_state{'state': 'ready'}"] == 1
    assert found["em_runner_queries_in_flight{'transport': 'http'}"] == 3
    assert found["em_runner_worker_heartbeat_age_seconds"] == 0.5
    assert found["em_runner_worker_uptime_seconds"] == 9
    assert found["em_runner_worker_restarts_total{'reason': 'killed'}"] == 2
    assert found["em_runner_worker_state{'state': 'failed'}"] == 0
    assert any(name.startswith("em_runner_build_info") for name in found)
    gone = exposed(sample(Counters(), row=row(state="restarting", pid=None)))
    assert gone["em_runner_worker_registered"] == 0
    assert "em_runner_worker_heartbeat_age_seconds" not in gone
    assert "process_resident_memory_bytes" in gone, "and the runner's own"


def test_what_has_not_happened_yet_is_told_as_0_for_each_reason() -> None:
    found = exposed(sample(Counters()))
    restarts = {name.split("'")[3] for name in found if name.startswith("em_runner_worker_restarts_total")}
    assert restarts == {"killed", "exited", "silent", "gave_up", "not_up", "not_started", "unknown"}
    ignored = {name.split("'")[3] for name in found if name.startswith("em_runner_frames_ignored_total")}
    counted = re.findall(r'self\.ignored\["(\w+)"\]', (ROOT / "worker" / "session.py").read_text())
    assert ignored == set(counted)
    assert {value for name, value in found.items() if "_total" in name and not name.startswith("process")} == {0}


def test_counters_of_successive_processes_add_up() -> None:
    before, now = Counters(), Counters()
    before.node[Outcome.OK] = 5
    before.ignored = {"binary": 1}
    before.durations[20] = 5
    before.busy_s = 1.0
    now.node[Outcome.OK] = 2
    now.ignored = {"binary": 1, "malformed": 2}
    now.durations[20] = 2
    now.busy_s = 0.5
    both = Counters()
    both.add(before)
    both.add(now)
    assert both.node[Outcome.OK] == 7
    assert both.ignored == {"binary": 2, "malformed": 2}
    assert (both.durations[20], both.busy_s) == (7, 1.5)
    assert (before.node[Outcome.OK], before.ignored) == (5, {"binary": 1}), "what was added is as it was"


def test_clients_of_direct_queries_are_counted_by_what_they_were_told() -> None:
    found = exposed(sample(Counters(), endings={Ending.TIMED_OUT: 3, Ending.REFUSED: 15}, replacements={"limit": 2}))
    assert found["em_runner_direct_queries_total{'outcome': 'timed_out'}"] == 3
    assert found["em_runner_direct_queries_total{'outcome': 'refused'}"] == 15
    assert found["em_runner_direct_queries_total{'outcome': 'worker_gone'}"] == 0
    assert found["em_runner_worker_replacements_total{'reason': 'limit'}"] == 2
    assert found["em_runner_worker_replacements_total{'reason': 'handler'}"] == 0


def test_requests_that_reach_no_worker_are_counted_by_status() -> None:
    found = exposed(own=Own({401: 7, 418: 1}, 5))
    assert found["em_runner_requests_refused_total{'status': '401'}"] == 7
    assert found["em_runner_requests_refused_total{'status': '418'}"] == 1
    assert found["em_runner_requests_refused_total{'status': '404'}"] == 0
    assert found["em_runner_max_in_flight"] == 5


def test_what_is_in_flight_is_told_by_where_it_came_from() -> None:
    found = exposed(sample(Counters(in_flight_node=9), in_flight=4))
    assert found["em_runner_queries_in_flight{'transport': 'http'}"] == 4
    assert found["em_runner_queries_in_flight{'transport': 'websocket'}"] == 9
