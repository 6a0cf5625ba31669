"""The routes and every error of the HTTP interface, with a real runner."""

from __future__ import annotations

import re
import signal
import socket
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from disco import Node
from tests.cluster import COMMAND_TIMEOUT_S, Cluster, agent, cluster, until
from tests.integration.test_reload import configure

pytestmark = pytest.mark.anyio

ECHO = "def handle(body, memory):\n    return body, memory\n"
GATED = """
import pathlib, time
def handle(body, memory):
    pathlib.Path("began").touch()
    while body != "free" and not pathlib.Path("gate").exists():
        time.sleep(0.005)
    return body, memory
"""


async def test_query_goes_to_the_named_worker_or_the_first_one(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url, other_node.url]), agent("b", [node.url]), handlers=ECHO
    ) as running:
        await running.wait_ready()
        await running.wait_state("a_server_2", "ready")
        http = running.http

        async def answered_by(path: str, **named: str) -> str | None:
            answer = await http.post(path, json={"query": "x", **named})
            assert (answer.status_code, answer.json()) == (200, {"results": "x"}), answer.text
            assert answer.headers["content-type"] == "application/json"
            return answer.headers.get("x-worker")

        assert await answered_by("/agent/query", agent="a") == "a_server"
        assert await answered_by("/agent/query", agent="b") == "b_server"
        assert await answered_by("/agent/query", worker="a_server_2") == "a_server_2"
        assert await answered_by("/agent/query", worker="a_server_2", agent="a") == "a_server_2"
        assert await answered_by("/agents/b/query") == "b_server"
        assert await answered_by("/workers/a_server_2/query") == "a_server_2"

        several = await http.post("/agent/query", json={"query": "x"})
        assert several.status_code == 400
        assert several.json()["code"] == "agent_required"
        assert "a, b" in several.json()["error"]
        for body, code, names in (
            ({"agent": "zz"}, "unknown_agent", "a, b"),
            ({"worker": "zz"}, "unknown_worker", "a_server, a_server_2, b_server"),
            ({"worker": "b_server", "agent": "a"}, "unknown_worker", "b_server"),
        ):
            unknown = await http.post("/agent/query", json={"query": "x", **body})
            assert (unknown.status_code, unknown.json()["code"]) == (404, code)
            assert names in unknown.json()["error"]
        unknown = await http.post("/agents/zz/query", json={"query": "x"})
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_agent")
        conflict = await http.post("/agents/a/query", json={"query": "x", "agent": "b"})
        assert (conflict.status_code, conflict.json()["code"]) == (400, "name_conflict")


BAD_BODIES: list[bytes] = [
    b"",
    b"nonsense",
    b"[]",
    b"{}",
    b'"x"',
    b'{"query":1}',
    b'{"query":null}',
    b'{"q":"x"}',
    b'{"query":"\xff"}',
    b'{"query":"\\ud800"}',
    b"[" * 60_000,
    b'{"query":"x","agent":1}',
]


async def test_every_invalid_request_gets_its_status_and_a_json_error(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        http = running.http
        for body in BAD_BODIES:
            answer = await http.post("/agent/query", content=body)
            assert answer.status_code == 400, body[:40]
            assert answer.json()["code"] == "invalid_body"
        for method, path, status, code in (
            ("GET", "/agent/query", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
            ("DELETE", "/workers", 405, "method_not_allowed"),
            ("GET", "/nowhere", 404, "unknown_route"),
        ):
            answer = await http.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert answer.json()["error"]
        for method in ("GET", "HEAD", "DELETE", "PUT", "OPTIONS", "PROPFIND"):
            for path in ("/agent/query", "/agents/a/query", "/workers/a_server/query"):
                answer = await http.request(method, path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), (
                    method,
                    path,
                )
        assert (await http.get("/health")).json() == {"status": "ok"}
        fits = await http.post("/agent/query", json={"query": "x" * 60_000})
        assert fits.status_code == 200


@pytest.mark.message_text
async def test_error_for_a_body_that_is_not_a_query(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        answer = await running.http.post("/agent/query", content=b"{}")
        expected = {"error": "body must be JSON with a 'query' field", "code": "invalid_body"}
        assert answer.json() == expected


async def test_too_large_body_is_refused_without_being_read(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        url = running.http.base_url
        async with await anyio.connect_tcp(url.host, url.port or 0) as stream:
            await stream.send(
                b"POST /agent/query HTTP/1.1\r\nHost: localhost\r\nContent-Length: 65537\r\n\r\n"
            )
            answer = b"".join(
                [chunk async for chunk in stream]
            )  # the client has sent no part of the body
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert b"65536" in answer, "the response is complete before the connection is closed"

        async def chunks() -> Any:
            for _ in range(70):
                yield b"x" * 1024

        answer = await running.http.post("/agent/query", content=chunks())
        assert answer.status_code == 413
        assert "65536" in answer.json()["error"]


async def test_query_that_expires_is_answered_504_and_never_run(tmp_path: Path, node: Node) -> None:
    handlers = """
import pathlib, time
def handle(body, memory):
    with open("ran", "a") as file:
        file.write(body + "\\n")
    while body == "slow" and not pathlib.Path("gate").exists():
        time.sleep(0.005)
    return body, memory
"""
    only = agent("a", [node.url])
    beats = "liveness_timeout_ms = 4000"  # a heartbeat each second
    async with cluster(tmp_path, only, handlers=handlers, supervision=beats) as running:
        await running.wait_ready()
        answers: list[httpx.Response] = []

        async def ask(text: str) -> None:
            answers.append(await running.ask(text))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "slow")
            await until((tmp_path / "ran").exists, "the handler has started")
            tasks.start_soon(ask, "behind")
            await running.wait_in_flight(2)
            configure(tmp_path, only, runner="query_timeout_ms = 1", supervision=beats)
            running.process.send_signal(signal.SIGHUP)
        assert {answer.status_code for answer in answers} == {504}
        for _ in range(
            2
        ):  # The worker got this query after it was notified that the first one was cancelled.
            await heartbeat(running)
        configure(tmp_path, only, supervision=beats)
        running.process.send_signal(signal.SIGHUP)
        await until(lambda: len(running.events("reloaded")) == 2, "the timeout is the default")
        (tmp_path / "gate").touch()
        assert await running.results("next") == "next"
        assert (tmp_path / "ran").read_text().split() == ["slow", "next"]


async def heartbeat(running: Cluster) -> None:
    """Wait for the next heartbeat of the only worker."""
    age = re.compile(r"^em_runner_worker_heartbeat_age_seconds\{.*\} (\S+)$", re.MULTILINE)

    async def silent_s() -> float:
        found = age.search((await running.http.get("/metrics")).text)
        assert found is not None
        return float(found[1])

    before_s = 0.0

    async def has_reported() -> bool:
        nonlocal before_s
        last_s, before_s = before_s, await silent_s()
        return before_s < last_s

    await until(has_reported, "a heartbeat")


async def test_full_worker_refuses_immediately_with_retry_after(tmp_path: Path, node: Node) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=GATED, runner="max_in_flight = 4"
    ) as running:
        await running.wait_ready()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await running.ask("x"))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(ask)
            await until(lambda: len(answers) == 6, "the queries beyond the limit are refused")
            assert {answer.status_code for answer in answers} == {503}
            assert {answer.headers["retry-after"] for answer in answers} == {"1"}
            (tmp_path / "gate").touch()
        assert [answer.status_code for answer in answers[6:]] == [200] * 4


async def test_client_that_disconnects_frees_its_place(tmp_path: Path, node: Node) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=GATED, runner="max_in_flight = 2"
    ) as running:
        await running.wait_ready()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(running.ask, "x")
            tasks.start_soon(running.ask, "x")
            await running.wait_in_flight(2)
            await until((tmp_path / "began").exists, "the handler has started")
            assert (await running.ask("free")).status_code == 503, "the worker is full"
            tasks.cancel_scope.cancel()  # both clients disconnect
        await running.wait_in_flight(0)
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await running.results("free"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            await running.wait_in_flight(1)  # accepted: it waits for the handler
            (tmp_path / "gate").touch()
        assert answers == ["free"]


async def test_every_route_except_health_requires_the_token(tmp_path: Path, node: Node) -> None:
    (tmp_path / "token").write_text("let-me-in\n")
    (tmp_path / "token").chmod(0o600)
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=ECHO, runner='http_token_file = "token"'
    ) as running:
        http = running.http
        assert (await http.get("/health")).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "let-me-in"}):
            for method, path in (
                ("GET", "/workers"),
                ("GET", "/ready"),
                ("POST", "/agent/query"),
                ("GET", "/zz"),
            ):
                refused = await http.request(method, path, headers=headers)
                assert refused.status_code == 401
                assert refused.headers["www-authenticate"] == "Bearer"
        http.headers["authorization"] = "Bearer let-me-in"
        await running.wait_ready()
        assert await running.results("x") == "x"
        assert "let-me-in" not in running.log + str(await running.rows())


async def test_error_for_a_port_in_use_is_one_line(tmp_path: Path, node: Node) -> None:
    import subprocess
    import sys

    from tests.cluster import ROOT

    (tmp_path / "handlers.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("a", [node.url]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "runner",
            "run",
            "-c",
            str(tmp_path / "em-runner.toml"),
            "--http",
            address,
        ]
        ended = await anyio.to_thread.run_sync(
            lambda: subprocess.run(
                [*command, "--state-dir", str(tmp_path / "s")],
                capture_output=True,
                text=True,
                cwd=ROOT,
                timeout=COMMAND_TIMEOUT_S,
            )
        )
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert address in ended.stderr
    assert "--http" in ended.stderr


async def test_ready_names_the_worker_that_is_not_ready(tmp_path: Path, node: Node) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        down = f"ws://127.0.0.1:{closed.getsockname()[1]}"
        async with cluster(
            tmp_path, agent("a", [node.url]), agent("b", [down]), handlers=ECHO
        ) as running:
            await running.wait_state("a_server", "ready")
            await running.wait_state("b_server", "backoff")
            answer = await running.http.get("/ready")
            assert answer.status_code == 503
            agents = answer.json()["agents"]
            assert agents["a"] == {"ready": True, "workers": {"a_server": "ready"}}
            assert not agents["b"]["ready"]
            assert "refused" in agents["b"]["workers"]["b_server"]
            assert await running.results("x", agent="b") == "x", (
                "a worker answers direct queries without its node"
            )


async def test_queries_go_to_the_next_worker_that_is_up(
    tmp_path: Path, node: Node, other_node: Node
) -> None:
    handlers = """
import pathlib, os, sys
class Agent:
    def setup(self):
        title = __import__("setproctitle").getproctitle()
        if " a_server " in title and pathlib.Path("broken").exists():
            os._exit(1)
    def handle(self, body, memory):
        return body, memory
"""
    import os

    async with cluster(
        tmp_path,
        agent("a", [node.url, other_node.url], handler="handlers.py:Agent"),
        handlers=handlers,
    ) as running:
        await running.wait_ready()
        await running.wait_state("a_server_2", "ready")
        assert (await running.ask("x")).headers["x-worker"] == "a_server"
        (tmp_path / "broken").touch()
        os.kill(await running.worker_pid("a_server"), signal.SIGKILL)

        async def moved() -> bool:
            return (await running.ask("x")).headers.get("x-worker") == "a_server_2"

        await until(moved, "the next worker answers")
        assert (await running.ask("x", worker="a_server")).status_code == 503


async def test_row_counts_queries_and_errors(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        await running.results("x")
        await node.query("y")
        await _check_row(running, node)


async def _check_row(running: Cluster, node: Node) -> None:
    async def counted() -> bool:
        return (await running.row("a_server"))["queries"] == 2

    await until(counted, "both queries are counted")
    row = await running.row("a_server")
    assert (row["agent"], row["node"], row["state"]) == ("a", node.url, "ready")
    assert (row["queries_node"], row["queries_direct"], row["errors"], row["restarts"]) == (
        1,
        1,
        0,
        0,
    )
    assert row["uptime_s"] > 0
