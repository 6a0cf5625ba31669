"""What counting for /metrics costs worker and runner, of all that a query costs them: `python -m benchmarks.counting`.

A worker counts how long each handler took (one line of a dispatcher) and how it ended (one of an answer's source).
These lines are timed as they are, read out of the sources; the runner counts what the client of a direct query was
told, by a method that is called. The whole is the processor time of a worker, or of the runner, under load.
"""

from __future__ import annotations

import inspect
import statistics
import timeit
from pathlib import Path
from time import perf_counter

import psutil

from benchmarks.http import NO_NODE
from benchmarks.load_http import closed_loop
from benchmarks.load_node import LoadNode
from benchmarks.raw_http import ask
from benchmarks.systems import em_runner, wait_for
from benchmarks.ws import workload_for
from runner.lines import Ending
from runner.router import Router
from shared.ipc import Counters, Outcome
from worker import attempt, loop_dispatcher

ROUNDS = 20
SECONDS = 1.0
WINDOW = CONNECTIONS = 64
COUNTED = (("lane.durations", loop_dispatcher), ("counters.node", attempt))


class Lane:
    """What a dispatcher counts in."""

    __slots__ = ("durations", "since_ns")

    def __init__(self) -> None:
        self.durations, self.since_ns = [0] * 64, 10**15


def lines() -> str:
    """Return the lines that count."""
    found = []
    for begin, module in COUNTED:
        [line] = [each.strip() for each in inspect.getsource(module).splitlines() if begin in each and "+=" in each]
        found.append(line.replace("self._counters", "counters"))
    return "\n".join(found)


def counting_us() -> float:
    """Return what they take, the least of many rounds."""
    values = {"lane": Lane(), "counters": Counters(), "now": 10**15 + 3100, "outcome": Outcome.OK}
    names = {f"the_{name}": value for name, value in values.items()}
    setup = "; ".join(f"{name} = the_{name}" for name in values)  # local names, as they are where they stand
    number = 100_000
    code, nothing = lines(), "pass"
    best = {
        each: min(timeit.repeat(each, setup, globals=names, number=number, repeat=ROUNDS)) for each in (code, nothing)
    }
    return (best[code] - best[nothing]) / number * 1e6


def query_us() -> list[float]:
    """Return a worker's processor time for one query, of several blasts."""
    found = []
    with LoadNode() as node, em_runner([node.addresses[0]], handler="echo") as runner:
        node.wait_registered()
        node.serve(SECONDS)
        [worker] = [each for each in psutil.Process(runner.process.pid).children(recursive=True) if is_worker(each)]
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
    """Return what the runner's counting takes, the least of many rounds."""
    router, number = Router(Path("unused")), 100_000
    names = {"count": router._count, "ending": Ending.OK, "nothing": lambda name, ending: None}
    times = [
        min(timeit.repeat(f'{each}("echo_server", ending)', globals=names, number=number, repeat=ROUNDS))
        for each in ("count", "nothing")
    ]
    return (times[0] - times[1]) / number * 1e6


def direct_query_us() -> list[float]:
    """Return the runner's processor time for one direct query, of several blasts."""
    found = []
    with em_runner([NO_NODE]) as runner:
        wait_for(lambda: ask(runner.http, "/agent/query", "x").status == 200, runner.process, runner.log)
        process = psutil.Process(runner.process.pid)
        for _ in range(5):
            before, began = process.cpu_times(), perf_counter()
            rate = closed_loop(runner.http, CONNECTIONS, 2)
            after, took_s = process.cpu_times(), perf_counter() - began
            found.append((after.user + after.system - before.user - before.system) / (rate * took_s) * 1e6)
    return found


def main() -> None:
    """Print of both what counting takes, what a query takes, and the ratio."""
    print(lines())
    for whose, counting, whole in (
        ("worker, a query of its node", counting_us(), statistics.median(query_us())),
        ("runner, a direct query", runner_counting_us(), statistics.median(direct_query_us())),
    ):
        print(f"{whose}: counting {counting:.3f} us of {whole:.1f} us, {100 * counting / whole:.2f} %")


if __name__ == "__main__":
    main()
