"""Failures of the connection between a worker and its node.

The worker reconnects within one reconnect interval after the network is restored. It is the same
process, and leaks nothing. The other worker and the runner are not affected.
"""

from __future__ import annotations

import asyncio
import gc
import operator
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import psutil
import pytest

from disco import Node, NodeSettings, serve
from shared.config.load import Agent, HandlerRef, WorkerSpec
from shared.config.nodes import NodeAddress
from shared.config.schema import ConnectionSection
from tests.chaos.load import ECHO, http_load, node_load, report
from tests.chaos.proxy import Proxy, proxied
from tests.cluster import Cluster, agent, cluster, outlive, until
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.handler import load as load_handler
from worker.memory.base import Memory
from worker.node._connection import NodeConnection
from worker.node.client import NodeClient
from worker.node.session import Session

pytestmark = pytest.mark.anyio

FAILURE_S = float(os.environ.get("EM_CHAOS_SECONDS", "1.2"))
"""How long each failure lasts at least. EM_CHAOS_SECONDS=30 is for thorough runs."""

INTERVAL_MS = 300
TIMEOUT_MS = 400
HANDSHAKE_MS = 3500
"""How long a reconnect may take after its interval, on a machine under other load.

Together, they are shorter than the default interval.
"""

MIB = 1024 * 1024
LEAK_BYTES = 4 * MIB

Failure = Callable[[Proxy], Awaitable[None]]
"""Lasts until it is cancelled and the proxy is restored."""


async def _close_repeatedly(proxy: Proxy) -> None:
    while True:
        proxy.close_connections()
        await anyio.sleep(0.1)


async def _reset_in_mid_frame(proxy: Proxy) -> None:
    choose = random.Random(7)
    while True:
        proxy.reset_after(choose.randrange(1, 600))
        await anyio.sleep(0.05)


def lasting(start: Callable[[Proxy], Any]) -> Failure:
    """Return a failure that starts with `start`."""

    async def failure(proxy: Proxy) -> None:
        started = start(proxy)
        if isinstance(started, Awaitable):
            await started

    return failure


FAILURES: dict[str, Failure] = {
    "closed": _close_repeatedly,
    "half-open": lasting(Proxy.discard),
    "stalled for 90 % of the time": lasting(lambda proxy: proxy.stall(0.9, 0.5)),
    "stalled all the time": lasting(lambda proxy: proxy.stall(1.0, 3600)),
    "a few bytes at a time": lasting(lambda proxy: proxy.trickle(3, 0.01)),
    "reset in mid-frame": _reset_in_mid_frame,
    "reset 50 times a second": lasting(lambda proxy: proxy.flap(50)),
    "refused": lasting(Proxy.refuse),
}

_ATTEMPTS = FAILURE_S * 1000 / (INTERVAL_MS * 1.5)
MIN_FAILURES = {
    "half-open": 1,
    "stalled all the time": 1,
    "closed": _ATTEMPTS,
    "reset 50 times a second": _ATTEMPTS,
    "refused": _ATTEMPTS,
}
"""How often the worker loses its connection, or fails to connect, until a failure ends."""


class Resources(NamedTuple):
    """The resources that a process uses."""

    fds: int
    threads: int
    rss: int

    @classmethod
    def of(cls, pid: int) -> Resources:
        process = psutil.Process(pid)
        return cls(process.num_fds(), process.num_threads(), process.memory_info().rss)

    def with_rss_of(self, later: Resources) -> Resources:
        """Return the same resources, with the larger of both memories."""
        return self._replace(rss=max(self.rss, later.rss))

    def at_most(self, before: Resources) -> bool:
        return (
            self.fds <= before.fds
            and self.threads <= before.threads
            and self.rss <= before.rss + LEAK_BYTES
        )


async def _ready(running: Cluster, proxy: Proxy, node: Node, failures: int) -> dict[str, Any]:
    """Wait until the proxied worker has reconnected that often, is ready and answers a query."""

    async def reconnected() -> dict[str, Any] | None:
        row = await running.row("a_server")
        ready = row["state"] == "ready" and row["connection_failures"] >= failures
        return row if ready and proxy.open_connections == 1 else None

    row: dict[str, Any] = await until(reconnected, f"it is ready again\n{running.log[-2000:]}")

    async def answers() -> bool:
        return [item["properties"]["body"] for item in await node.query("ping")] == ["ping"]

    await until(answers, "it answers")
    return row


@asynccontextmanager
async def one_worker_proxied(
    tmp_path: Path, node: Node
) -> AsyncIterator[tuple[Cluster, Proxy, Node]]:
    """Run `calm_server` at `node`, and `a_server` at another node behind a proxy."""
    options = {
        "reconnect_interval_ms": INTERVAL_MS,
        "connect_timeout_ms": TIMEOUT_MS,
        "upgrade_timeout_ms": TIMEOUT_MS,
        "ping_interval_ms": TIMEOUT_MS,
    }
    settings = NodeSettings(port=0, query_timeout_ms=500)
    async with serve(settings) as far, proxied(far.port) as proxy:
        async with cluster(
            tmp_path,
            agent("calm", [node.url], capabilities=["calm"]),
            agent("a", [proxy.url], capabilities=["a"], **options),
            handlers=ECHO,
        ) as running:
            await running.wait_state("calm_server", "ready")
            await running.wait_state("a_server", "ready")
            yield running, proxy, far


async def _warm_up(running: Cluster, proxy: Proxy, far: Node) -> int:
    """Have the worker reconnect three times, and return how often it has reconnected.

    What a process allocates once is then allocated, so that it does not look like a leak.
    """
    failures = 0
    for _ in range(3):
        proxy.reset_connections()
        failures = (await _ready(running, proxy, far, failures + 1))["connection_failures"]
    return failures


@pytest.mark.parametrize("name", FAILURES)
async def test_worker_reconnects_within_an_interval_after_the_network_is_restored(
    name: str, tmp_path: Path, node: Node
) -> None:
    async with one_worker_proxied(tmp_path, node) as (running, proxy, far):
        earlier_failures = await _warm_up(running, proxy, far)
        pid, runner_pid = await running.worker_pid("a_server"), running.process.pid
        neighbour = await running.row("calm_server")
        minimum = earlier_failures + MIN_FAILURES.get(name, 0)

        async def reconnected() -> bool:
            return (await running.row("a_server"))["connection_failures"] >= minimum

        idle, runner_idle = Resources.of(pid), Resources.of(runner_pid)
        async with (
            http_load(running, "/agents/calm/query", "/agents/a/query", clients=4) as by_http,
            node_load(node, "calm", clients=1) as by_node,
            node_load(far, "a", clients=2) as by_far,
        ):
            await until(lambda: by_http.answered > 200, "200 queries are answered")
            before = idle.with_rss_of(Resources.of(pid))
            runner_before = runner_idle.with_rss_of(Resources.of(runner_pid))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(FAILURES[name], proxy)
                await anyio.sleep(FAILURE_S)
                await until(reconnected, "it detects a lost connection, and keeps trying")
                tasks.cancel_scope.cancel()
            await proxy.restore()
            restored_s = time.monotonic()

            async def answers() -> bool:
                return bool(await far.query("ping"))

            await until(answers, f"it answers again\n{running.log[-2000:]}")
            took_s = time.monotonic() - restored_s
        row = await _ready(running, proxy, far, 0)
        report(
            name,
            f"reconnected after {took_s * 1000:.0f} ms, {row['connection_failures']} failures",
            by_http,
            by_far,
        )

        assert took_s <= (INTERVAL_MS + HANDSHAKE_MS) / 1000
        by_http.assert_nothing_lost()
        assert not by_http.refused, "direct queries do not need the connection to the node"
        by_node.assert_nothing_lost()
        assert by_node.empty == 0
        assert not by_far.wrong
        assert (row["pid"], row["restarts"]) == (pid, 0)
        after = await running.row("calm_server")
        assert (after["pid"], after["connection_failures"]) == (
            neighbour["pid"],
            neighbour["connection_failures"],
        )
        assert len(far.registry) == 1
        await no_leak(name, "worker", pid, before)
        await no_leak(name, "runner", runner_pid, runner_before)
        assert "Traceback" not in running.log


async def no_leak(title: str, process: str, pid: int, before: Resources) -> None:
    """Wait until a process uses no more resources than before."""

    def released() -> bool:
        return Resources.of(pid).at_most(before)

    await until(released, f"the {process} uses no more than {before}")
    report(title, f"{process} before {before}, after {Resources.of(pid)}")


async def test_worker_registers_again_after_the_node_drops_its_dead_connection(
    tmp_path: Path,
) -> None:
    # Long enough that the worker connects again before it, even on a busy machine.
    idle_timeout_ms = 3000
    settings = NodeSettings(port=0, idle_timeout_ms=idle_timeout_ms)
    async with serve(settings) as node, proxied(node.port) as proxy:
        options = f"reconnect_interval_ms = {INTERVAL_MS}\nping_interval_ms = 1000"
        async with cluster(
            tmp_path, agent("a", [proxy.url]), connection=options, handlers=ECHO
        ) as running:
            await running.wait_ready()
            proxy.reset_clients_only()

            async def refused() -> bool:
                return "name_taken" in (await running.row("a_server"))["last_error"]

            await until(refused, "the node refuses the name, which its dead connection holds")
            refused_s = time.monotonic()
            await running.wait_ready()
            took_s = time.monotonic() - refused_s
            assert took_s < (idle_timeout_ms + INTERVAL_MS + HANDSHAKE_MS) / 1000
            assert await node.query("x")


async def test_pings_keep_a_worker_registered_at_an_idle_node(tmp_path: Path) -> None:
    idle_s = max(FAILURE_S, 3.0)
    idle_timeout_ms = int(idle_s * 1000 / 3)
    async with (
        serve(NodeSettings(port=0, idle_timeout_ms=idle_timeout_ms)) as node,
        proxied(node.port) as proxy,
    ):
        options = f"ping_interval_ms = {idle_timeout_ms // 3}"
        async with cluster(
            tmp_path, agent("a", [proxy.url]), connection=options, handlers=ECHO
        ) as running:
            await running.wait_ready()
            pid = await running.worker_pid("a_server")
            before_bytes = proxy.to_node_bytes
            await outlive(node, "a", idle_s)
            assert proxy.to_node_bytes - before_bytes >= 6 * 7, "it has sent pings"
            assert await running.worker_pid("a_server") == pid
            assert await node.query("x")


async def test_lost_connection_leaves_no_task_and_no_object(node: Node, tmp_path: Path) -> None:
    states: list[str] = []
    async with proxied(node.port) as proxy:
        spec = WorkerSpec(
            name="w",
            agent=Agent(
                name="a",
                handler=HandlerRef("worker.echo", None, "handle", tmp_path),
                nodes=(),
                connection=ConnectionSection(reconnect_interval_ms=10, ping_interval_ms=500),
            ),
            node=NodeAddress("127.0.0.1", proxy.port, False),
        )
        dispatcher = create_dispatcher(load_handler(spec.agent.handler), Memory())
        client = NodeClient(spec, (), dispatcher, lambda state, _: states.append(state))

        def counts() -> tuple[int, ...]:
            gc.collect()
            kinds = (NodeConnection, Session, asyncio.Task)
            return (
                len(asyncio.all_tasks()),
                *(sum(isinstance(each, kind) for each in gc.get_objects()) for kind in kinds),
            )

        async def reconnect() -> None:
            """Reset the connection, and wait until the client has reconnected."""
            seen = len(states)
            proxy.reset_connections()

            def reconnected() -> bool:
                ready = "ready" in states[seen:] and "a" in node.registry
                return ready and proxy.open_connections == 1

            await until(reconnected, "the client has reconnected")

        async with dispatcher.running(), anyio.create_task_group() as tasks:
            tasks.start_soon(client.run)
            await until(lambda: states[-1:] == ["ready"], "the client is ready")
            for _ in range(3):
                await reconnect()
            # The proxy's tasks end one or two iterations of the loop after the client's.
            await until(lambda: counts()[1:3] == (1, 1), "there is one connection and one session")
            before = counts()
            for _ in range(30):
                await reconnect()

            def are_no_more() -> bool:
                return all(map(operator.le, counts(), before))

            await until(are_no_more, f"the counts are at most {before} again")
            tasks.cancel_scope.cancel()
