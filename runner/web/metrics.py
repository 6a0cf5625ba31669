"""GET /metrics: the workers' counts in the text format of Prometheus.

The names follow https://prometheus.io/docs/practices/naming/. The workers count, and this module
aggregates at scrape time. A counter continues where that of the worker's last process stopped, so
that it never decreases.
"""

# Series with known kinds, outcomes and states exist from the start with the value 0, because
# `increase()` does not see the first event of a new series.

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from runner import version
from runner.supervision.restarts import FAILURE_KINDS, REPLACEMENT_KINDS
from runner.supervision.sample import Sample
from runner.table import STATES, WorkerRow
from shared.ipc import IGNORED_KINDS, Outcome

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_MIN_EXPONENT: Final = 11
_MAX_EXPONENT: Final = 36
"""The upper bounds of the buckets are 2**11 to 2**36 nanoseconds, which is 2 us to 69 s.

A shorter duration is counted in the first bucket, a longer one in +Inf alone. A bound's exponent is
its bucket's index in `Counters.durations`.
"""

# No client sees GIVEN_BACK: another worker answers a direct query that was given back.
_DIRECT_OUTCOMES: Final = tuple(each for each in Outcome if each is not Outcome.GIVEN_BACK)
_REFUSED_STATUSES: Final = (400, 401, 403, 404, 413, 503)
_WORKER_OUTCOMES: Final = (
    Outcome.OK,
    Outcome.HANDLER_FAILED,
    Outcome.TIMED_OUT,
    Outcome.GIVEN_BACK,
)
_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
_WORKER: Final = ("worker", "agent", "node")


class RunnerSample(NamedTuple):
    """The runner itself at one moment.

    Attributes:
        refused: how many requests it refused with each status.
        max_in_flight: how many direct queries one worker may have in flight.
    """

    refused: Mapping[int, int]
    max_in_flight: int


def exposition(samples: Sequence[Sample], runner_sample: RunnerSample) -> bytes:
    """Return the workers' metrics, and those of the runner's own process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(samples, runner_sample))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def metric_families(samples: Sequence[Sample], runner_sample: RunnerSample) -> Iterator[Metric]:
    """Return the metrics of workers and runner, as families with names, types and help texts."""
    yield from _queries(samples)
    yield from _counts(samples)
    yield from _gauges(samples)
    yield from _runner(runner_sample)
    build = GaugeMetricFamily(
        "em_runner_build_info",
        "Always 1. The labels name the running version.",
        labels=("version", "python"),
    )
    build.add_metric((version(), platform.python_version()), 1)
    yield build


class _Collector(Collector):
    def __init__(self, samples: Sequence[Sample], runner_sample: RunnerSample) -> None:
        self._samples = samples
        self._runner_sample = runner_sample

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return metric_families(self._samples, self._runner_sample)


def _labels(row: WorkerRow) -> tuple[str, str, str]:
    return row.name, row.agent, row.node


def _queries(samples: Sequence[Sample]) -> Iterator[Metric]:
    queries = CounterMetricFamily(
        "em_runner_queries",
        "Queries that workers answered.",
        labels=(*_WORKER, "source", "outcome"),
    )
    durations = HistogramMetricFamily(
        "em_runner_handler_duration_seconds",
        "How long the handler took for one query.",
        labels=_WORKER,
    )
    direct = CounterMetricFamily(
        "em_runner_direct_queries",
        "Direct queries by outcome.",
        labels=(*_WORKER[:2], "outcome"),
    )
    for row, counted, *_ in samples:
        by_source = {
            "node": counted.node_answers,
            "direct": counted.direct_answers,
        }
        for source, counts in by_source.items():
            for outcome in _WORKER_OUTCOMES:
                queries.add_metric((*_labels(row), source, outcome.label), counts[outcome])
        durations.add_metric(_labels(row), _buckets(counted.durations), counted.busy_s)
    for sample in samples:
        for outcome in _DIRECT_OUTCOMES:
            labels = (*_labels(sample.row)[:2], outcome.label)
            direct.add_metric(labels, sample.outcomes.get(outcome, 0))
    yield from (queries, direct, durations)


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the counts as Prometheus has them: each bucket includes those below it."""
    buckets: list[tuple[str, float]] = []
    below = sum(counts[:_MIN_EXPONENT])
    for exponent in range(_MIN_EXPONENT, _MAX_EXPONENT + 1):
        below += counts[exponent]
        buckets.append((str(2**exponent / 1e9), below))
    return [*buckets, ("+Inf", sum(counts))]


def _counts(samples: Sequence[Sample]) -> Iterator[Metric]:
    restarts = CounterMetricFamily(
        "em_runner_worker_restarts",
        "Processes that ended unexpectedly, by kind.",
        labels=(*_WORKER, "kind"),
    )
    replacements = CounterMetricFamily(
        "em_runner_worker_replacements",
        "Processes that were replaced gracefully, by kind.",
        labels=(*_WORKER, "kind"),
    )
    connection_failures = CounterMetricFamily(
        "em_runner_connection_failures",
        "Connections to the node that were lost or could not be made.",
        labels=_WORKER,
    )
    late = CounterMetricFamily(
        "em_runner_late_answers",
        "Answers that were ready only after their connection was lost.",
        labels=_WORKER,
    )
    ignored = CounterMetricFamily(
        "em_runner_frames_ignored",
        "Invalid or unknown frames from the node, by kind.",
        labels=(*_WORKER, "kind"),
    )
    for sample in samples:
        labels, counted = _labels(sample.row), sample.counted
        for failure in FAILURE_KINDS:
            restarts.add_metric((*labels, failure), sample.restarts.get(failure, 0))
        for replacement in REPLACEMENT_KINDS:
            replacements.add_metric((*labels, replacement), sample.replacements.get(replacement, 0))
        connection_failures.add_metric(labels, counted.connection_failures)
        late.add_metric(labels, counted.late)
        for frame in IGNORED_KINDS:
            ignored.add_metric((*labels, frame), counted.ignored.get(frame, 0))
    yield from (restarts, replacements, connection_failures, late, ignored)


def _gauges(samples: Sequence[Sample]) -> Iterator[Metric]:
    registered = GaugeMetricFamily(
        "em_runner_worker_registered",
        "1 while the agent is registered at the node, else 0.",
        labels=_WORKER,
    )
    state = GaugeMetricFamily(
        "em_runner_worker_state",
        "1 for the worker's current state, 0 for the others.",
        labels=(*_WORKER, "state"),
    )
    in_flight = GaugeMetricFamily(
        "em_runner_queries_in_flight",
        "Queries that wait for the worker's answer; those from its node as of its last heartbeat.",
        labels=(*_WORKER, "source"),
    )
    age = GaugeMetricFamily(
        "em_runner_worker_heartbeat_age_seconds",
        "The time since the worker's last message.",
        labels=_WORKER,
    )
    uptime = GaugeMetricFamily(
        "em_runner_worker_uptime_seconds",
        "How long the worker's process has been running.",
        labels=_WORKER,
    )
    memory = GaugeMetricFamily(
        "em_runner_worker_resident_memory_bytes",
        "The resident memory of the worker's process.",
        labels=_WORKER,
    )
    for sample in samples:
        row, labels = sample.row, _labels(sample.row)
        registered.add_metric(labels, row.state == "ready")
        for each in STATES:
            state.add_metric((*labels, each), row.state == each)
        in_flight.add_metric((*labels, "direct"), sample.in_flight)
        in_flight.add_metric((*labels, "node"), sample.counted.in_flight_node)
        # No series, rather than 0, while there is no process: a gauge of 0 s would look healthy.
        if row.pid is not None:
            age.add_metric(labels, sample.silent_s)
            uptime.add_metric(labels, row.uptime_s)
            if resident := _resident_bytes(row.pid):
                memory.add_metric(labels, resident)
    yield from (registered, state, in_flight, age, uptime, memory)


def _runner(sample: RunnerSample) -> Iterator[Metric]:
    refused = CounterMetricFamily(
        "em_runner_requests_refused",
        "Requests that were refused with 401 or 403, "
        "and direct queries that were refused before a worker was chosen, by status.",
        labels=("status",),
    )
    for status in sorted({*_REFUSED_STATUSES, *sample.refused}):
        refused.add_metric((str(status),), sample.refused.get(status, 0))
    yield refused
    most = GaugeMetricFamily(
        "em_runner_max_in_flight", "How many direct queries one worker may have in flight."
    )
    most.add_metric((), sample.max_in_flight)
    yield most


def _resident_bytes(pid: int) -> int:
    """Return a process's resident memory, 0 if it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
