"""GET /metrics: what the workers counted, as Prometheus reads it (https://prometheus.io/docs/practices/naming/).

Counted is in the workers; here it is put together when somebody asks. A counter goes on where that of
a worker's last process ended, so that none ever goes backwards. What can be known beforehand (reasons,
outcomes, states) is there from the start, as 0: `increase()` would not see the first of a series that is new.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from runner.lines import Ending
from runner.restarts import REPLACEMENT_REASONS, RESTART_REASONS, ReplacementReason, RestartReason
from runner.table import STATES, WorkerRow
from shared.ipc import IGNORED, Counters, Outcome

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SMALLEST: Final = 11
LARGEST: Final = 36
"""The buckets' bounds are these powers of two in nanoseconds, 2 us to 69 s; see `Counters.durations`.

What is shorter counts in the first, what is longer in +Inf alone.
"""

_ENDINGS: Final = {
    Ending.OK: "ok",
    Ending.HANDLER_FAILED: "failed",
    Ending.TIMED_OUT: "timed_out",
    Ending.WORKER_GONE: "worker_gone",
    Ending.REFUSED: "refused",
    Ending.WITHDRAWN: "withdrawn",
}
_REFUSED_STATUSES: Final = (400, 401, 403, 404, 413, 503)
_OUTCOMES: Final = {
    Outcome.OK: "ok",
    Outcome.HANDLER_FAILED: "failed",
    Outcome.TIMED_OUT: "timed_out",
    Outcome.RETURNED: "unanswered",
}
_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")
_WORKER: Final = ("worker", "agent", "node")


class Sample(NamedTuple):
    """One worker, as it is now. `in_flight` and `endings` are of direct queries, as the router counts them."""

    row: WorkerRow
    counted: Counters
    restarts: Mapping[RestartReason, int]
    in_flight: int
    silent_s: float
    endings: Mapping[Ending, int]
    replacements: Mapping[ReplacementReason, int]


class Own(NamedTuple):
    """The runner itself: requests that it refused by status, and the bound on each worker's queries in flight."""

    refused: Mapping[int, int]
    max_in_flight: int


def exposition(samples: Sequence[Sample], own: Own) -> bytes:
    """Return the workers' metrics, and those of the runner's own process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(samples, own))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


def collected(samples: Sequence[Sample], own: Own) -> Iterator[Metric]:
    """Return the metrics of workers and runner, as families with their names, types and helps."""
    yield from _queries(samples)
    yield from _counts(samples)
    yield from _gauges(samples)
    yield from _own(own)
    build = GaugeMetricFamily("em_runner_build_info", "Always 1; what is running.", labels=("version", "python"))
    build.add_metric((version(), platform.python_version()), 1)
    yield build


class _Collected(Collector):
    def __init__(self, samples: Sequence[Sample], own: Own) -> None:
        self._samples = samples
        self._own = own

    def collect(self) -> Iterable[Metric]:
        """Return the metrics."""
        return collected(self._samples, self._own)


def _labels(row: WorkerRow) -> tuple[str, str, str]:
    return row.name, row.agent, row.node


def _queries(samples: Sequence[Sample]) -> Iterator[Metric]:
    queries = CounterMetricFamily(
        "em_runner_queries", "Queries that workers answered.", labels=(*_WORKER, "transport", "outcome")
    )
    durations = HistogramMetricFamily(
        "em_runner_handler_duration_seconds", "How long the handler took for one query.", labels=_WORKER
    )
    direct = CounterMetricFamily(
        "em_runner_direct_queries",
        "Direct queries by what their clients were told, whatever the worker did.",
        labels=(*_WORKER[:2], "outcome"),
    )
    for row, counted, *_ in samples:
        for transport, counts in (("websocket", counted.node), ("http", counted.http)):
            for outcome, name in _OUTCOMES.items():
                queries.add_metric((*_labels(row), transport, name), counts[outcome])
        durations.add_metric(_labels(row), _buckets(counted.durations), counted.busy_s)
    for sample in samples:
        for ending, name in _ENDINGS.items():
            direct.add_metric((*_labels(sample.row)[:2], name), sample.endings.get(ending, 0))
    yield from (queries, direct, durations)


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return the counts of powers of two as Prometheus has them: each bucket with those below it."""
    buckets: list[tuple[str, float]] = []
    below = sum(counts[:SMALLEST])
    for exponent in range(SMALLEST, LARGEST + 1):
        below += counts[exponent]
        buckets.append((str(2**exponent / 1e9), below))
    return [*buckets, ("+Inf", sum(counts))]


def _counts(samples: Sequence[Sample]) -> Iterator[Metric]:
    restarts = CounterMetricFamily(
        "em_runner_worker_restarts", "Processes that ended unexpectedly, by how.", labels=(*_WORKER, "reason")
    )
    replacements = CounterMetricFamily(
        "em_runner_worker_replacements",
        "Processes that were replaced in good order, by why.",
        labels=(*_WORKER, "reason"),
    )
    reconnects = CounterMetricFamily(
        "em_runner_reconnects", "Connections to the node that were lost, or could not be made.", labels=_WORKER
    )
    late = CounterMetricFamily(
        "em_runner_late_answers", "Answers that came after their connection had gone.", labels=_WORKER
    )
    ignored = CounterMetricFamily(
        "em_runner_frames_ignored", "Frames of the node that meant nothing, by reason.", labels=(*_WORKER, "reason")
    )
    for sample in samples:
        labels, counted = _labels(sample.row), sample.counted
        for reason in RESTART_REASONS:
            restarts.add_metric((*labels, reason), sample.restarts.get(reason, 0))
        for occasion in REPLACEMENT_REASONS:
            replacements.add_metric((*labels, occasion), sample.replacements.get(occasion, 0))
        reconnects.add_metric(labels, counted.reconnects)
        late.add_metric(labels, counted.late)
        for why in IGNORED:
            ignored.add_metric((*labels, why), counted.ignored.get(why, 0))
    yield from (restarts, replacements, reconnects, late, ignored)


def _gauges(samples: Sequence[Sample]) -> Iterator[Metric]:
    registered = GaugeMetricFamily(
        "em_runner_worker_registered", "Whether the node has the agent registered.", labels=_WORKER
    )
    state = GaugeMetricFamily("em_runner_worker_state", "1 for the state it is in, else 0.", labels=(*_WORKER, "state"))
    in_flight = GaugeMetricFamily(
        "em_runner_queries_in_flight",
        "Queries that the worker has but has not answered yet; those of its node as of its last heartbeat.",
        labels=(*_WORKER, "transport"),
    )
    age = GaugeMetricFamily(
        "em_runner_worker_heartbeat_age_seconds", "How long ago it was last heard of.", labels=_WORKER
    )
    uptime = GaugeMetricFamily(
        "em_runner_worker_uptime_seconds", "How long its process has been running.", labels=_WORKER
    )
    memory = GaugeMetricFamily(
        "em_runner_worker_resident_memory_bytes", "Its process's resident memory.", labels=_WORKER
    )
    for sample in samples:
        row, labels = sample.row, _labels(sample.row)
        registered.add_metric(labels, row.state == "ready")
        for each in STATES:
            state.add_metric((*labels, each), row.state == each)
        in_flight.add_metric((*labels, "http"), sample.in_flight)
        in_flight.add_metric((*labels, "websocket"), sample.counted.in_flight_node)
        if row.pid is not None:
            age.add_metric(labels, sample.silent_s)
            uptime.add_metric(labels, row.uptime_s)
            if resident := _resident_bytes(row.pid):
                memory.add_metric(labels, resident)
    yield from (registered, state, in_flight, age, uptime, memory)


def _own(own: Own) -> Iterator[Metric]:
    refused = CounterMetricFamily(
        "em_runner_requests_refused",
        "Requests that were refused with 401 or 403, and direct queries that no worker was asked, by status.",
        labels=("status",),
    )
    for status in sorted({*_REFUSED_STATUSES, *own.refused}):
        refused.add_metric((str(status),), own.refused.get(status, 0))
    yield refused
    most = GaugeMetricFamily("em_runner_max_in_flight", "How many direct queries may wait for one worker.")
    most.add_metric((), own.max_in_flight)
    yield most


def _resident_bytes(pid: int) -> int:
    """Return a process's resident memory, 0 when it has just ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


@cache
def version() -> str:
    """Return em-runner's version."""
    try:
        return metadata.version("em-runner")
    except metadata.PackageNotFoundError:
        return "unknown"
