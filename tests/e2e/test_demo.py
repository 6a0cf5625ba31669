"""The demo and the commands, used as a newcomer uses them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import anyio
import httpx
import pytest

from shared.config import tokens
from tests.cluster import ROOT, TIMEOUT_S, Cluster, launch, until
from tests.e2e.commands import EM_RUNNER, em_runner, shell

pytestmark = pytest.mark.anyio
SECRET = "0123456789abcdef0123456789abcdef"
ECHO = "def handle(body, memory):\n    return body, memory\n"
ONE_NODE = ("--nodes", "1", "--first-port", "0")
TWO_NODES = ("--nodes", "2", "--first-port", "0")


def printed_lines(running: Cluster, start: str) -> list[str]:
    lines = [line.strip() for line in running.log.splitlines()]
    return [line for line in lines if line.startswith(start)]


def http_url(node_url: str) -> str:
    return node_url.replace("ws://", "http://")


async def test_demo_answers_direct_queries_in_two_workers(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *TWO_NODES) as running:
        await running.wait_ready()
        for worker in ("echo_server", "echo_server_2"):
            await running.wait_state(worker, "ready")
        first = await running.ask("hello")
        assert first.headers["x-worker"] == "echo_server"
        assert first.json()["results"][0]["properties"]["title"] == "hello"
        second = await running.ask("hello", worker="echo_server_2")
        assert second.headers["x-worker"] == "echo_server_2"
        rows = await running.rows()
        assert rows["echo_server"]["pid"] != rows["echo_server_2"]["pid"]


async def test_commands_that_the_demo_prints_can_be_pasted(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *TWO_NODES) as running:
        await running.wait_ready()
        commands = printed_lines(running, "curl ")
        assert len(commands) == 2
        for command in commands:
            pasted = await shell(command, tmp_path)
            assert '"title":"hello"' in pasted.stdout, command


async def test_each_node_of_the_demo_answers_queries(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *TWO_NODES) as running:
        for worker in ("echo_server", "echo_server_2"):
            row = await running.wait_state(worker, "ready")
            url = http_url(row["node"])
            async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:
                response = await http.post(f"{url}/query", json={"query": "to the node"})
                registry = await http.get(f"{url}/registry")
            embryos = response.json()["embryo_list"]
            assert [each["properties"]["title"] for each in embryos] == ["to the node"]
            [registered] = registry.json()["agents"]
            assert registered["name"] == "echo"
            assert registered["capabilities"] == ["search", "query", "echo"]


async def test_ctrl_c_stops_the_demo_with_all_its_processes(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *TWO_NODES) as running:
        await running.wait_ready()
        running.record_processes()
        # A terminal sends the signal to the whole process group.
        os.killpg(running.process.pid, signal.SIGINT)
        await until(lambda: running.process.poll() is not None, "the demo has exited")
        assert running.process.returncode == 0
        await running.wait_exited()
        assert not (running.state_dir / "ipc").exists()
        assert "Traceback" not in running.log


async def test_query_command_finds_the_runner_and_prints_the_results(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *ONE_NODE) as running:
        await running.wait_ready()
        by_state = ("--state-dir", str(running.state_dir))
        by_url = ("--url", str(running.http.base_url))
        done = await em_runner("query", "what is new?", *by_state)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[0]["properties"]["title"] == "what is new?"
        done = await em_runner("query", "x", "--worker", "echo_server", *by_url)
        assert done.returncode == 0, done.stderr


async def test_query_command_reports_an_unknown_agent_and_the_known_ones(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *ONE_NODE) as running:
        await running.wait_ready()
        state = ("--state-dir", str(running.state_dir))
        done = await em_runner("query", "x", "--agent", "unknown", *state)
        assert done.returncode == 2
        assert "unknown" in done.stderr
        assert "echo" in done.stderr


async def test_query_command_without_a_runner_fails_in_one_line(tmp_path: Path) -> None:
    done = await em_runner("query", "x", "--state-dir", str(tmp_path))
    assert done.returncode == 1
    assert "em-runner run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def test_demo_reports_an_occupied_port_and_the_option(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        nodes = ("--first-port", port, "--nodes", "1")
        runner = ("--http", "127.0.0.1:0", "--state-dir", str(tmp_path))
        done = await em_runner("demo", *nodes, *runner)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert f"127.0.0.1:{port}" in last
    assert "--first-port" in last
    assert "Traceback" not in done.stderr


async def test_token_command_prints_a_valid_token(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    done = await em_runner("token", "--sub", "echo", "--secret-file", str(secret))
    assert done.returncode == 0, done.stderr
    claims = tokens.verify(done.stdout.strip(), SECRET)
    assert claims.subject == "echo"


async def test_token_command_rejects_a_short_secret(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("short")
    secret.chmod(0o600)
    done = await em_runner("token", "--sub", "echo", "--secret-file", str(secret))
    assert done.returncode == 78
    assert str(secret) in done.stderr
    assert len(done.stderr.splitlines()) == 1


async def check_invalid_tokens(folder: Path) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Check a configuration of three agents. The second and the third have invalid tokens.

    Returns:
        The result of the check, and the tokens.
    """
    expired = tokens.mint(SECRET, "b", ttl_s=-7200)
    for_another_agent = tokens.mint(SECRET, "another", ttl_s=600)
    (folder / "h.py").write_text(ECHO)
    (folder / "b.jwt").write_text(expired)
    (folder / "b.jwt").chmod(0o600)
    (folder / "em-runner.toml").write_text(
        f"""
[[agent]]
name = "a"
handler = "h.py:handle"
nodes = ["localhost", "disco.example.com"]
capabilities = ["search"]
[[agent]]
name = "b"
handler = "h.py:handle"
jwt_token_file = "b.jwt"
nodes = ["localhost"]
[[agent]]
name = "c"
handler = "h.py:handle"
jwt_token = "{for_another_agent}"
nodes = ["localhost"]
"""
    )
    done = await em_runner("check", cwd=folder, COLUMNS="200")
    return done, {expired, for_another_agent}


async def test_check_prints_the_workers_and_reports_invalid_tokens(tmp_path: Path) -> None:
    done, _ = await check_invalid_tokens(tmp_path)
    assert done.returncode == 1
    assert "a_server_2" in done.stdout
    assert "wss://disco.example.com:443" in done.stdout
    assert "ws://localhost:8080" in done.stdout
    assert "search" in done.stdout
    assert "h.py:handle" in done.stdout
    expired, for_another_agent = done.stderr.splitlines()
    assert "'b'" in expired
    assert "'c'" in for_another_agent
    assert "'another'" in for_another_agent


async def test_check_prints_no_token(tmp_path: Path) -> None:
    done, secrets = await check_invalid_tokens(tmp_path)
    for token in secrets:
        assert token not in done.stdout + done.stderr


@pytest.mark.message_text
async def test_check_gives_the_reason_why_a_token_is_invalid(tmp_path: Path) -> None:
    done, _ = await check_invalid_tokens(tmp_path)
    expired, for_another_agent = done.stderr.splitlines()
    assert "expired 2 hours ago" in expired
    assert "'another', not the agent's name 'c'" in for_another_agent


async def test_disco_command_runs_a_node(tmp_path: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [*EM_RUNNER, "disco", "--port", "0", "--no-auth"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = await anyio.to_thread.run_sync(process.stdout.readline)
            url = http_url(line.split()[-1])
            async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as http:
                registry = await http.get(f"{url}/registry")
            assert registry.json() == {"agents": []}
        finally:
            process.terminate()
            status = await anyio.to_thread.run_sync(process.wait)
    assert status == 0


@pytest.mark.parametrize(
    "name", ["run", "reload", "status", "check", "try", "new", "demo", "disco", "token", "query"]
)
async def test_help_of_every_command_has_an_example(name: str) -> None:
    done = await em_runner(name, "--help", COLUMNS="200")
    assert done.returncode == 0
    assert f"Example: em-runner {name}" in done.stdout
