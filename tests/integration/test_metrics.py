"""GET /metrics of a real runner: correct counts, and counters that never decrease."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from disco import Node
from tests.cluster import Cluster, agent, cluster, until
from tests.integration.test_reload import configure

pytestmark = pytest.mark.anyio

HANDLERS = """
import time
def handle(body, memory):
    if body == "fail":
        raise ValueError(body)
    time.sleep(0.02 if body == "slow" else 0)
    return [{"type": "t"}], memory
"""
Value = Callable[..., Awaitable[float]]


def values(running: Cluster) -> Value:
    async def value(metric: str, **labels: str) -> float:
        """Return the sum of the samples with this name and these labels."""
        answer = await running.http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return sum(
            sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )

    return value


async def test_metrics_continue_after_a_worker_is_replaced(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        value = values(running)
        await running.wait_ready()
        assert await value("em_runner_worker_registered", worker="a_server") == 1
        for text in ("x", "x", "slow", "fail"):
            await running.ask(text)
        await node.query("x")

        async def counted() -> bool:
            return await value("em_runner_queries_total") == 5

        await until(counted, "a heartbeat has reported the queries")
        assert await value("em_runner_queries_total", source="direct", outcome="ok") == 3
        failed = await value("em_runner_queries_total", source="direct", outcome="handler_failed")
        assert failed == 1
        assert await value("em_runner_queries_total", source="node", outcome="ok") == 1
        assert await value("em_runner_handler_duration_seconds_count") == 5
        # On a busy machine the other queries may take as long as the slow one.
        assert await value("em_runner_handler_duration_seconds_bucket", le="0.016777216") < 5
        assert await value("em_runner_handler_duration_seconds_bucket", le="68.719476736") == 5
        assert await value("em_runner_handler_duration_seconds_sum") >= 0.02
        assert await value("em_runner_worker_resident_memory_bytes") > 10e6
        assert 0 <= await value("em_runner_worker_heartbeat_age_seconds") < 10

        os.kill(await running.worker_pid("a_server"), signal.SIGKILL)
        lowest = 5.0

        async def replaced() -> bool:
            nonlocal lowest
            lowest = min(lowest, await value("em_runner_queries_total"))
            return (
                await value("em_runner_worker_restarts_total", kind="killed") == 1
                and await running.ready()
            )

        await until(replaced, "the worker is replaced")
        await running.ask("x")

        async def more() -> bool:
            nonlocal lowest
            lowest = min(lowest, await value("em_runner_queries_total"))
            return await value("em_runner_queries_total") == 6

        await until(more, "the new process counts")
        assert lowest == 5, "the counter has never decreased"


async def test_graceful_replacement_neither_decreases_counters_nor_loses_queries(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

        async def scrape() -> None:
            text = (await running.http.get("/metrics")).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples if family.type in ("counter", "histogram") else ():
                    key = (sample.name, frozenset(sample.labels.items()))
                    assert sample.value >= seen.get(key, 0), key
                    seen[key] = sample.value

        asked = 0
        for number in range(3):
            pid = await running.worker_pid("a_server")
            configure(tmp_path, agent("a", [node.url], capabilities=[str(number)]))
            running.process.send_signal(signal.SIGHUP)

            async def replaced(before: int = pid, until_number: int = number + 1) -> bool:
                nonlocal asked
                await running.ask("x")
                asked += 1
                await scrape()
                done = len(running.events("reloaded")) == until_number
                return done and await running.worker_pid("a_server") not in (None, before)

            await until(replaced, "the worker is replaced")
        value = values(running)

        async def counted() -> bool:
            await scrape()
            return await value("em_runner_queries_total", source="direct", outcome="ok") >= asked

        await until(counted, "all queries are counted")
        assert await value("em_runner_queries_total") == asked
        assert await value("em_runner_handler_duration_seconds_count") == asked
        assert await value("em_runner_worker_restarts_total") == 0


async def test_metrics_require_the_token(tmp_path: Path, node: Node) -> None:
    (tmp_path / "token").write_text("let-me-in\n")
    (tmp_path / "token").chmod(0o600)
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, runner='http_token_file = "token"'
    ) as running:
        assert (await running.http.get("/metrics")).status_code == 401
        running.http.headers["authorization"] = "Bearer let-me-in"
        assert (await running.http.get("/metrics")).status_code == 200


GATED = """
import pathlib, time
def handle(body, memory):
    while not pathlib.Path("gate").exists():
        time.sleep(0.005)
    return body, memory
"""


async def test_direct_queries_are_counted_by_the_outcome_for_the_client(
    tmp_path: Path, node: Node
) -> None:
    gated, limit = agent("a", [node.url]), "max_in_flight = 2"
    async with cluster(tmp_path, gated, handlers=GATED, runner=limit) as running:
        await running.wait_ready()
        value = values(running)
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await running.ask("x")).status_code)

        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(ask)
            await running.wait_in_flight(2)
            for _ in range(4):
                await ask()
            configure(tmp_path, gated, runner=f"{limit}\nquery_timeout_ms = 1")
            running.process.send_signal(signal.SIGHUP)
        assert statuses == [503] * 4 + [504] * 2
        (tmp_path / "gate").touch()
        assert await value("em_runner_direct_queries_total", outcome="worker_busy") == 4
        assert await value("em_runner_direct_queries_total", outcome="timed_out") == 2
        assert await value("em_runner_direct_queries_total", outcome="ok") == 0
        assert await value("em_runner_max_in_flight") == 2


async def test_refused_requests_are_counted_and_logged_once(tmp_path: Path, node: Node) -> None:
    (tmp_path / "token").write_text("let-me-in\n")
    (tmp_path / "token").chmod(0o600)
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, runner='http_token_file = "token"'
    ) as running:
        for number in range(5):
            wrong = {"authorization": f"Bearer guess-{number}"}
            assert (await running.http.get("/workers", headers=wrong)).status_code == 401
            assert (
                await running.http.post("/agent/query", headers=wrong, json={"query": "x"})
            ).status_code == 401
        running.http.headers["authorization"] = "Bearer let-me-in"
        await running.wait_ready()
        assert (await running.http.post("/agents/b/query", json={"query": "x"})).status_code == 404
        assert (await running.http.post("/agent/query", json={})).status_code == 400
        value = values(running)
        assert await value("em_runner_requests_refused_total", status="401") == 10
        assert await value("em_runner_requests_refused_total", status="404") == 1
        assert await value("em_runner_requests_refused_total", status="400") == 1
        (logged,) = running.events("request_refused")
        assert (logged["status"], logged["client"]) == (401, "127.0.0.1")
        assert "guess" not in running.log


async def test_counters_restart_when_a_worker_moves_to_another_node(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        value = values(running)
        for _ in range(3):
            await running.ask("x")

        async def counted() -> bool:
            return await value("em_runner_queries_total", node=node.url) == 3

        await until(counted, "the queries are counted")
        configure(tmp_path, agent("a", [other_node.url]))
        running.process.send_signal(signal.SIGHUP)
        await until(lambda: running.events("reloaded"), "the configuration is reloaded")
        await running.wait_ready()
        await running.ask("x")

        async def restarted() -> bool:
            return await value("em_runner_queries_total", node=other_node.url) == 1

        await until(restarted, "the counters of the other node start at 0")
        assert await value("em_runner_queries_total", node=node.url) == 0, (
            "the counters of the old node are gone"
        )
        assert await value("em_runner_worker_restarts_total") == 0
