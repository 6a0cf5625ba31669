"""What a bad neighbour in the same runner costs a healthy worker: its latency alone, and beside three of them.

The healthy agent is asked over HTTP at a modest fixed rate. The neighbour is another agent of the same
runner: one that dies again and again, one whose handler keeps a core busy for ever, one that is asked
as much as it can answer. What they share is the runner's process and the machine's cores. The generator
and, for the last one, the other load's, run on the same cores: where those are few, a neighbour costs
more here than it would by itself.
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
"""Enough for the rate while answers take up to 64 ms; with fewer, the generator's own queue would be what is seen."""

FLOOD_CONNECTIONS: Final = 64
BODY: Final = "x" * 40
EXPECTED: Final = json.dumps({"results": BODY}, separators=(",", ":")).encode()
HEALTHY: Final = "/agents/healthy/query"
NEIGHBOUR: Final = "/agents/neighbour/query"
SETTINGS: Final = "[supervision]\nmax_restarts = 1000\nhandler_timeout_ms = 600_000\nshutdown_timeout_ms = 500\n"
"""The crash loop must not be `failed` and left alone, the busy loop not be ended, while it is measured."""

UNITS: Final = {"p50": "ms", "p99": "ms", "restarts": "restarts", "neighbour": "queries/s"}
"""What is measured: the healthy worker's latency, and for the record how bad the neighbour was meanwhile."""

Said = Callable[[], dict[str, float]]


class NoTrouble(Exception):
    """The neighbour was not as bad as it should have been, so that the figures would say nothing."""


class Neighbour(NamedTuple):
    """A second agent's handler, and what makes it bad."""

    handler: str
    trouble: Callable[[Address], AbstractContextManager[Said]]


def run(runs: int, quick: bool, tell: Callable[[str], None]) -> list[Figure]:
    """Measure without a neighbour and beside each, `runs` times."""
    seconds = 2.0 if quick else 5.0
    found = interleave({name: partial(_once, each, seconds) for name, each in NEIGHBOURS.items()}, runs, tell)
    return [
        Figure(suite=SUITE, name=f"{name}: {quantity}", system="em-runner", unit=UNITS[quantity], runs=values)
        for name, quantities in found.items()
        for quantity, values in quantities.items()
    ]


def _once(neighbour: Neighbour | None, seconds: float) -> dict[str, float]:
    with LoadNode(2) as node:
        agents = [("healthy", f"{HANDLERS}:echo", "ram", node.addresses[:1])]
        if neighbour is not None:
            agents.append(("neighbour", f"{HANDLERS}:{neighbour.handler}", "ram", node.addresses[1:]))
        with em_runner((), agents=agents, settings=SETTINGS) as runner:
            node.wait_registered(len(agents))
            trouble = _none if neighbour is None else neighbour.trouble
            with _served(node), trouble(runner.http) as said:
                latencies_s = pace(
                    runner.http, HEALTHY, BODY, EXPECTED, rate=RATE, connections=CONNECTIONS, seconds=seconds
                )
                return {"p50": quantile(latencies_s, 0.5) * 1000, "p99": quantile(latencies_s, 0.99) * 1000, **said()}


@contextmanager
def _served(node: LoadNode) -> Iterator[None]:
    """Serve the node meanwhile, so that a worker that is started again can register."""
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
def _none(http: Address) -> Iterator[Said]:
    yield dict


@contextmanager
def _crash_loop(http: Address) -> Iterator[Said]:
    """It dies by itself."""
    before = _row(http)["restarts"]

    def said() -> dict[str, float]:
        if (restarts := _row(http)["restarts"] - before) < 1:
            raise NoTrouble("the crash loop's worker did not die")
        return {"restarts": restarts}

    yield said


@contextmanager
def _busy_loop(http: Address) -> Iterator[Said]:
    """One query, which does not end."""

    def said() -> dict[str, float]:
        sock.setblocking(False)
        try:
            answer = sock.recv(raw_http.READ_BYTES)
        except BlockingIOError:
            return {}
        raise NoTrouble(f"the busy loop's query was answered: {answer!r}")

    with raw_http.connect(http) as sock:
        sock.sendall(raw_http.request(http, NEIGHBOUR, "spin"))
        yield said


@contextmanager
def _flood(http: Address) -> Iterator[Said]:
    """As many queries as it answers, from a process of their own. The neighbour itself counts them."""

    def count() -> int:
        return int(json.loads(raw_http.ask(http, NEIGHBOUR, "count").body)["results"])

    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        log = Path(folder) / "log"
        arguments = (http[0], str(http[1]), NEIGHBOUR, str(FLOOD_CONNECTIONS))
        with process(sys.executable, "-m", "benchmarks.paced", *arguments, log=log) as started:
            wait_for(lambda: count() > FLOOD_CONNECTIONS * 10, started, log)
            before, began_s = count(), time.perf_counter()

            def said() -> dict[str, float]:
                after, ended_s = count(), time.perf_counter()
                if started.poll() is not None:
                    raise NoTrouble(f"the flood has ended: {log.read_text(errors='replace')[-2000:]}")
                return {"neighbour": (after - before) / (ended_s - began_s)}

            yield said


def _row(http: Address) -> dict[str, Any]:
    """Return the neighbour's row of the table of workers."""
    with urllib.request.urlopen(f"http://{http[0]}:{http[1]}/workers") as answer:
        rows: list[dict[str, Any]] = json.load(answer)["workers"]
    return next(row for row in rows if row["agent"] == "neighbour")


NEIGHBOURS: Final[dict[str, Neighbour | None]] = {
    "alone": None,
    "crash loop": Neighbour("CrashLoop", _crash_loop),
    "busy loop": Neighbour("spin", _busy_loop),
    "flood": Neighbour("count", _flood),
}
