"""Measures the cost of counting for /metrics, compared with the whole cost of a query.

    python -m benchmarks.counting

For each query a worker counts how long the handler ran (one line of the dispatcher) and how the
query ended (one line of the node connection). This program reads these lines from the sources and
times them. The runner counts the outcomes of direct queries in a method, which is called here. The
whole cost is the processor time of the worker, or of the runner, under load.
"""

from __future__ import annotations

import inspect
import statistics
import timeit
from time import perf_counter

import psutil

from benchmarks.http import NO_NODE
from benchmarks.load_http import closed_loop
from benchmarks.load_node import LoadNode
from benchmarks.raw_http import ask
from benchmarks.systems import em_runner, wait_for
from benchmarks.ws import workload_for
from runner.routing._queries import PendingQueries
from shared.config.schema import RunnerSection
from shared.ipc import Counters, Outcome
from worker.dispatching import _loop_dispatcher as loop_dispatcher
from worker.node import _connection as node_connection

ROUNDS = 20
SECONDS = 1.0
WINDOW = CONNECTIONS = 64
COUNTED = (("slot.durations", loop_dispatcher), ("counters.node_answers", node_connection))


class Slot:
    """The part of a dispatcher's slot in which it counts."""

    __slots__ = ("durations", "started_ns")

    def __init__(self) -> None:
        self.durations, self.started_ns = [0] * 64, 10**15


def lines() -> str:
    """Return the lines that count."""
    found = []
    for start, module in COUNTED:
        [line] = [
            each.strip()
            for each in inspect.getsource(module).splitlines()
            if start in each and "+=" in each
        ]
        found.append(line.replace("self._counters", "counters"))
    return "\n".join(found)


def counting_us() -> float:
    """Return the time of these lines for one query: the minimum of many rounds."""
    values = {"slot": Slot(), "counters": Counters(), "now": 10**15 + 3100, "outcome": Outcome.OK}
    names = {f"the_{name}": value for name, value in values.items()}
    # Bind local names: the timed lines also use local names in their functions.
    setup = "; ".join(f"{name} = the_{name}" for name in values)
    number = 100_000
    code, nothing = lines(), "pass"
    best = {
        each: min(timeit.repeat(each, setup, globals=names, number=number, repeat=ROUNDS))
        for each in (code, nothing)
    }
    return (best[code] - best[nothing]) / number * 1e6


def query_us() -> list[float]:
    """Return a worker's processor time for one query, once for each of several loads."""
    found = []
    with LoadNode() as node, em_runner([node.addresses[0]], handler="echo") as runner:
        node.wait_registered()
        node.serve(SECONDS)
        [worker] = [
            each
            for each in psutil.Process(runner.process.pid).children(recursive=True)
            if is_worker(each)
        ]
        for _ in range(9):
            before, began = worker.cpu_times(), perf_counter()
            blast = node.blast(workload_for("em-runner, async", 40), WINDOW, SECONDS, 0.0)
            after, took_s = worker.cpu_times(), perf_counter() - began
            used_s = after.user + after.system - before.user - before.system
            found.append(used_s / (blast.rate * took_s) * 1e6)
    return found


def is_worker(process: psutil.Process) -> bool:
    return "em-worker" in " ".join(process.cmdline())


def runner_counting_us() -> float:
    """Return the time of the runner's counting for one query: the minimum of many rounds."""
    queries, number = _queries(), 100_000
    names = {"count": queries._count, "outcome": Outcome.OK, "nothing": lambda name, outcome: None}
    times = [
        min(
            timeit.repeat(
                f'{each}("echo_server", outcome)', globals=names, number=number, repeat=ROUNDS
            )
        )
        for each in ("count", "nothing")
    ]
    return (times[0] - times[1]) / number * 1e6


def _queries() -> PendingQueries:
    return PendingQueries(
        perf_counter,
        lambda peer: None,
        RunnerSection(),
    )


def direct_query_us() -> list[float]:
    """Return the runner's processor time for one direct query, once for each of several loads."""
    found = []
    with em_runner([NO_NODE]) as runner:
        wait_for(
            lambda: ask(runner.http, "/agent/query", "x").status == 200, runner.process, runner.log
        )
        process = psutil.Process(runner.process.pid)
        for _ in range(5):
            before, began = process.cpu_times(), perf_counter()
            rate = closed_loop(runner.http, CONNECTIONS, 2)
            after, took_s = process.cpu_times(), perf_counter() - began
            found.append(
                (after.user + after.system - before.user - before.system) / (rate * took_s) * 1e6
            )
    return found


def main() -> None:
    """Print the time of counting, the time of a query and the ratio, for worker and runner."""
    print(lines())
    for process, counting, whole in (
        ("worker, a query from its node", counting_us(), statistics.median(query_us())),
        ("runner, a direct query", runner_counting_us(), statistics.median(direct_query_us())),
    ):
        print(
            f"{process}: counting {counting:.3f} us of {whole:.1f} us, "
            f"{100 * counting / whole:.2f} %"
        )


if __name__ == "__main__":
    main()
