"""Direct queries: the throughput by number of connections, and the latency at half load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from benchmarks.load_http import PATH, QUERY, closed_loop
from benchmarks.measure import Figure, figures, interleave, quantile
from benchmarks.paced import pace
from benchmarks.raw_http import Address, ask
from benchmarks.systems import em_runner, http_baseline, wait_for

SUITE: Final = "http"
CONNECTIONS: Final = (1, 8, 64, 256)
QUICK: Final = (64,)
SECONDS: Final = 2
PACED_CONNECTIONS: Final = 64
PACED_S: Final = 3.0
NO_NODE: Final = "127.0.0.1:9"
"""No program listens here. Workers answer direct queries even if their node is unreachable."""


class Served(NamedTuple):
    """The address of a system, and the names of the workers to query."""

    address: Address
    workers: tuple[str, ...] = ()


@contextmanager
def _runner(workers: int) -> Iterator[Served]:
    nodes = [NO_NODE, "127.0.0.2:9"][:workers]
    names = ("echo_server", "echo_server_2")[:workers]
    with em_runner(nodes) as running:
        address = running.http
        for name in names:
            wait_for(lambda name=name: _answers(address, name), running.process, running.log)
        yield Served(address, names if workers > 1 else ())


def _answers(address: Address, worker: str) -> bool:
    return ask(address, f"/workers/{worker}/query", QUERY).status == 200


@contextmanager
def _baseline(module: str, *arguments: str) -> Iterator[Served]:
    with http_baseline(module, *arguments) as address:
        yield Served(address)


SYSTEMS: Final = {
    "em-runner": lambda: _runner(1),
    "em-runner, 2 workers": lambda: _runner(2),
    "SDK technique": lambda: _baseline("sdk", "http", "PORT_FILE"),
    "SDK technique, keep-alive": lambda: _baseline("sdk", "http", "PORT_FILE", "--keep-alive"),
    "uvicorn (ceiling)": lambda: _baseline("uvicorn_app", "PORT_FILE"),
}
PACED: Final = ("em-runner", "uvicorn (ceiling)")


def run(runs: int, quick: bool, report: Callable[[str], None]) -> list[Figure]:
    """Measure all systems in turn.

    Return the throughput in requests per second, and the latency in milliseconds at half of the
    highest load.
    """
    cases = QUICK if quick else CONNECTIONS
    systems = {name: lambda name=name: _once(name, cases) for name in SYSTEMS}
    found = interleave(systems, runs, report)
    rates = {
        name: {key: each for key, each in values.items() if "ms" not in key}
        for name, values in found.items()
    }
    times = {
        name: {key: each for key, each in values.items() if "ms" in key}
        for name, values in found.items()
    }
    return [*figures(SUITE, "requests/s", rates), *figures(SUITE, "ms", times)]


def _once(system: str, cases: tuple[int, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    with SYSTEMS[system]() as (address, workers):
        closed_loop(address, 8, 1, workers)  # a warm-up
        for connections in cases:
            name = f"{connections} connection{'s' if connections != 1 else ''}"
            found[name] = closed_loop(address, connections, SECONDS, workers)
        if system in PACED:
            expected = b'{"results":"%b"}' % QUERY.encode()
            rate = found[f"{PACED_CONNECTIONS} connections"] / 2
            taken_s = pace(
                address,
                PATH,
                QUERY,
                expected,
                rate=rate,
                connections=PACED_CONNECTIONS,
                seconds=PACED_S,
            )
            for part in (0.5, 0.99):
                found[f"half load: p{part * 100:.0f}, ms"] = quantile(taken_s, part) * 1000
    return found
