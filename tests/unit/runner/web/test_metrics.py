"""`runner.web.metrics`: the workers' counters in the format of Prometheus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from runner.supervision.sample import Sample
from runner.web.metrics import RunnerSample, exposition
from shared.ipc import Counters, Outcome
from tests.unit.runner.commands.test_status import row

ROOT = Path(__file__).resolve().parents[4]

RUNNER = RunnerSample({}, 1024)


def exposed(*samples: Sample, runner_sample: RunnerSample = RUNNER) -> dict[str, float]:
    """Return the value of each sample by its name and labels.

    The labels that name the worker, its agent and its node are left out.
    """
    found = {}
    for family in text_string_to_metric_families(exposition(samples, runner_sample).decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            assert sample.labels.get("worker", "a_server") == "a_server"
            labels = {
                name: value
                for name, value in sample.labels.items()
                if name not in ("worker", "agent", "node")
            }
            found[f"{sample.name}{dict(sorted(labels.items())) or ''}"] = sample.value
    return found


def sample(counted: Counters, **more: Any) -> Sample:
    values: dict[str, Any] = {
        "row": row(),
        "restarts": {},
        "in_flight": 0,
        "silent_s": 0.0,
        "outcomes": {},
        "replacements": {},
    }
    return Sample(counted=counted, **values | more)


def test_queries_are_counted_by_path_and_outcome() -> None:
    counted = Counters()
    counted.node_answers[Outcome.OK] = 7
    counted.direct_answers[Outcome.HANDLER_FAILED] = 2
    counted.direct_answers[Outcome.TIMED_OUT] = 1
    found = exposed(sample(counted))
    assert found["em_runner_queries_total{'outcome': 'ok', 'source': 'node'}"] == 7
    assert found["em_runner_queries_total{'outcome': 'ok', 'source': 'direct'}"] == 0
    assert found["em_runner_queries_total{'outcome': 'handler_failed', 'source': 'direct'}"] == 2
    assert found["em_runner_queries_total{'outcome': 'timed_out', 'source': 'direct'}"] == 1


def test_duration_counts_in_its_bucket_and_all_above() -> None:
    counted = Counters()
    for duration_s in (1e-7, 0.9e-6, 3e-6, 0.01, 0.02, 68.0, 70.0, 1000.0):
        counted.durations[int(duration_s * 1e9).bit_length()] += 1
        counted.busy_s += duration_s
    found = exposed(sample(counted))
    name = "em_runner_handler_duration_seconds"
    buckets = {
        float(key.split("'")[3]): value
        for key, value in found.items()
        if key.startswith(f"{name}_bucket")
    }
    assert buckets[2.048e-06] == 2, "shorter durations count in the first bucket"
    assert buckets[4.096e-06] == 3
    assert buckets[0.008388608] == 3
    assert buckets[0.016777216] == 4
    assert buckets[0.033554432] == 5
    assert buckets[68.719476736] == 6
    assert buckets[float("inf")] == found[f"{name}_count"] == 8
    assert found[f"{name}_sum"] == counted.busy_s
    assert list(buckets.values()) == sorted(buckets.values())


def test_worker_status_is_exposed_as_gauges() -> None:
    found = exposed(
        sample(Counters(), in_flight=3, silent_s=0.5, restarts={"killed": 2}, row=row(uptime_s=9.0))
    )
    assert found["em_runner_worker_registered"] == 1
    assert found["em_runner_worker_state{'state': 'ready'}"] == 1
    assert found["em_runner_queries_in_flight{'source': 'direct'}"] == 3
    assert found["em_runner_worker_heartbeat_age_seconds"] == 0.5
    assert found["em_runner_worker_uptime_seconds"] == 9
    assert found["em_runner_worker_restarts_total{'kind': 'killed'}"] == 2
    assert found["em_runner_worker_state{'state': 'failed'}"] == 0


def test_worker_without_a_process_has_no_heartbeat_age() -> None:
    found = exposed(sample(Counters(), row=row(state="restarting", pid=None)))
    assert found["em_runner_worker_registered"] == 0
    assert "em_runner_worker_heartbeat_age_seconds" not in found


def test_runner_exposes_its_build_and_memory() -> None:
    found = exposed()
    assert any(name.startswith("em_runner_build_info") for name in found)
    assert "process_resident_memory_bytes" in found


def test_counters_of_restarts_exist_for_each_reason() -> None:
    found = exposed(sample(Counters()))
    restarts = {
        name.split("'")[3] for name in found if name.startswith("em_runner_worker_restarts_total")
    }
    assert restarts == {
        "killed",
        "exited",
        "silent",
        "ended_itself",
        "not_up",
        "not_started",
        "unknown",
    }


def test_counters_of_ignored_frames_exist_for_each_reason() -> None:
    found = exposed(sample(Counters()))
    ignored = {
        name.split("'")[3] for name in found if name.startswith("em_runner_frames_ignored_total")
    }
    counted = re.findall(
        r"self\.ignored\[.(\w+).\]", (ROOT / "worker" / "node" / "session.py").read_text()
    )
    assert ignored == set(counted)


def test_counters_start_at_zero() -> None:
    found = exposed(sample(Counters()))
    values = {
        value
        for name, value in found.items()
        if "_total" in name and not name.startswith("process")
    }
    assert values == {0}


def test_counters_of_successive_processes_add_up() -> None:
    before, now = Counters(), Counters()
    before.node_answers[Outcome.OK] = 5
    before.ignored = {"binary": 1}
    before.durations[20] = 5
    before.busy_s = 1.0
    now.node_answers[Outcome.OK] = 2
    now.ignored = {"binary": 1, "malformed": 2}
    now.durations[20] = 2
    now.busy_s = 0.5
    both = Counters()
    both.add(before)
    both.add(now)
    assert both.node_answers[Outcome.OK] == 7
    assert both.ignored == {"binary": 2, "malformed": 2}
    assert (both.durations[20], both.busy_s) == (7, 1.5)
    # The added counters are unchanged.
    assert (before.node_answers[Outcome.OK], before.ignored) == (5, {"binary": 1})


def test_direct_queries_are_counted_by_outcome() -> None:
    outcomes = {Outcome.TIMED_OUT: 3, Outcome.WORKER_BUSY: 15}
    found = exposed(sample(Counters(), outcomes=outcomes))
    assert found["em_runner_direct_queries_total{'outcome': 'timed_out'}"] == 3
    assert found["em_runner_direct_queries_total{'outcome': 'worker_busy'}"] == 15
    assert found["em_runner_direct_queries_total{'outcome': 'worker_unavailable'}"] == 0


def test_replacements_are_counted_by_reason() -> None:
    found = exposed(sample(Counters(), replacements={"limit": 2}))
    assert found["em_runner_worker_replacements_total{'kind': 'limit'}"] == 2
    assert found["em_runner_worker_replacements_total{'kind': 'handler'}"] == 0


def test_requests_that_reach_no_worker_are_counted_by_status() -> None:
    found = exposed(runner_sample=RunnerSample({401: 7, 418: 1}, 5))
    assert found["em_runner_requests_refused_total{'status': '401'}"] == 7
    assert found["em_runner_requests_refused_total{'status': '418'}"] == 1
    assert found["em_runner_requests_refused_total{'status': '404'}"] == 0
    assert found["em_runner_max_in_flight"] == 5


def test_queries_in_flight_are_counted_by_path() -> None:
    found = exposed(sample(Counters(in_flight_node=9), in_flight=4))
    assert found["em_runner_queries_in_flight{'source': 'direct'}"] == 4
    assert found["em_runner_queries_in_flight{'source': 'node'}"] == 9
