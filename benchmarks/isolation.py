"""A healthy worker's latency, alone and beside a bad neighbour in the same runner.

The healthy agent receives direct queries at a moderate fixed rate. The neighbour is another agent
of the same runner, of one of three kinds: its worker dies repeatedly, its handler keeps a core busy
without end, or it receives as many queries as it can answer. The two agents share the runner's
process and the machine's cores. The load generators run on the same cores, so on a machine with few
cores the neighbour costs more here than it would without them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks import raw_http
from benchmarks.load_node import LoadNode
from benchmarks.measure import Figure, interleave, quantile
from benchmarks.paced import pace
from benchmarks.raw_http import Address
from benchmarks.systems import HANDLERS, em_runner, process, wait_for

SUITE: Final = "isolation"
RATE: Final = 500.0
CONNECTIONS: Final = 32
"""Enough for the rate if each answer takes at most 64 ms. With fewer connections, the figures would
show the generator's own queue."""

FLOOD_CONNECTIONS: Final = 64
BODY: Final = "x" * 40
EXPECTED: Final = json.dumps({"results": BODY}, separators=(",", ":")).encode()
HEALTHY: Final = "/agents/healthy/query"
NEIGHBOUR: Final = "/agents/neighbour/query"
SETTINGS: Final = (
    "[supervision]\nmax_restarts = 1000\nhandler_timeout_ms = 600_000\nshutdown_timeout_ms = 500\n"
)
"""During a measurement the crash loop must not become `failed`, and the handler timeout must not
kill the busy loop."""

UNITS: Final = {"p50": "ms", "p99": "ms", "restarts": "restarts", "neighbour": "queries/s"}
"""The measured quantities: the healthy worker's latency, and the neighbour's activity during it."""

Activity = Callable[[], dict[str, float]]


class HarmlessNeighbour(Exception):
    """The neighbour did not disturb the healthy worker, so the figures would mean nothing."""


class Neighbour(NamedTuple):
    """A second agent's handler, and the context that makes the agent a bad neighbour."""

    handler: str
    disturb: Callable[[Address], AbstractContextManager[Activity]]


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Measure without a neighbour and beside each neighbour, `runs` times."""
    seconds = 2.0 if quick else 5.0
    found = interleave(
        {name: partial(_once, each, seconds) for name, each in NEIGHBOURS.items()}, runs, report
    )
    return [
        Figure(
            suite=SUITE,
            name=f"{name}: {quantity}",
            system="em-runner",
            unit=UNITS[quantity],
            runs=values,
        )
        for name, quantities in found.items()
        for quantity, values in quantities.items()
    ]


def _once(neighbour: Neighbour | None, seconds: float) -> dict[str, float]:
    with LoadNode(2) as node:
        agents = [("healthy", f"{HANDLERS}:echo", "ram", node.addresses[:1])]
        if neighbour is not None:
            agents.append(
                ("neighbour", f"{HANDLERS}:{neighbour.handler}", "ram", node.addresses[1:])
            )
        with em_runner((), agents=agents, settings=SETTINGS) as runner:
            node.wait_registered(len(agents))
            disturb = _no_neighbour if neighbour is None else neighbour.disturb
            with _served(node), disturb(runner.http) as activity:
                latencies_s = pace(
                    runner.http,
                    HEALTHY,
                    BODY,
                    EXPECTED,
                    rate=RATE,
                    connections=CONNECTIONS,
                    seconds=seconds,
                )
                return {
                    "p50": quantile(latencies_s, 0.5) * 1000,
                    "p99": quantile(latencies_s, 0.99) * 1000,
                    **activity(),
                }


@contextmanager
def _served(node: LoadNode) -> Iterator[None]:
    """Serve the node on a thread, so that a restarted worker can register."""
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            node.serve(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _no_neighbour(http: Address) -> Iterator[Activity]:
    yield dict


@contextmanager
def _crash_loop(http: Address) -> Iterator[Activity]:
    """Do nothing: the handler ends its own process."""
    before = _row(http)["restarts"]

    def activity() -> dict[str, float]:
        if (restarts := _row(http)["restarts"] - before) < 1:
            raise HarmlessNeighbour("the crash loop's worker did not die")
        return {"restarts": restarts}

    yield activity


@contextmanager
def _busy_loop(http: Address) -> Iterator[Activity]:
    """Send one query, which never ends."""

    def activity() -> dict[str, float]:
        sock.setblocking(False)
        try:
            answer = sock.recv(raw_http.READ_BYTES)
        except BlockingIOError:
            return {}
        raise HarmlessNeighbour(f"the busy loop's query was answered: {answer!r}")

    with raw_http.connect(http) as sock:
        sock.sendall(raw_http.request(http, NEIGHBOUR, "spin"))
        yield activity


@contextmanager
def _flood(http: Address) -> Iterator[Activity]:
    """Send queries from another process, as fast as the neighbour answers and counts them."""

    def count() -> int:
        return int(json.loads(raw_http.ask(http, NEIGHBOUR, "count").body)["results"])

    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        log = Path(folder) / "log"
        arguments = (http[0], str(http[1]), NEIGHBOUR, str(FLOOD_CONNECTIONS))
        with process(sys.executable, "-m", "benchmarks.paced", *arguments, log=log) as started:
            wait_for(lambda: count() > FLOOD_CONNECTIONS * 10, started, log)
            before, began_s = count(), time.perf_counter()

            def activity() -> dict[str, float]:
                after, ended_s = count(), time.perf_counter()
                if started.poll() is not None:
                    raise HarmlessNeighbour(
                        f"the flood has ended: {log.read_text(errors='replace')[-2000:]}"
                    )
                return {"neighbour": (after - before) / (ended_s - began_s)}

            yield activity


def _row(http: Address) -> dict[str, Any]:
    """Return the neighbour's row of the workers table."""
    with urllib.request.urlopen(f"http://{http[0]}:{http[1]}/workers") as answer:
        rows: list[dict[str, Any]] = json.load(answer)["workers"]
    return next(row for row in rows if row["agent"] == "neighbour")


NEIGHBOURS: Final[dict[str, Neighbour | None]] = {
    "alone": None,
    "crash loop": Neighbour("CrashLoop", _crash_loop),
    "busy loop": Neighbour("spin", _busy_loop),
    "flood": Neighbour("count", _flood),
}
