"""The demo and the commands, as a newcomer meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from shared import tokens
from tests.cluster import ROOT, Cluster, launched, until

pytestmark = pytest.mark.anyio
SECRET = "0123456789abcdef0123456789abcdef"


async def command(*arguments: str, cwd: Path = ROOT, environ: dict[str, str] | None = None) -> Any:
    """Run `em-runner` to its end."""
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=30,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | (environ or {}),
        )
    )


def printed_lines(running: Cluster, start: str) -> list[str]:
    return [line.strip() for line in running.log.splitlines() if line.strip().startswith(start)]


async def test_demo_answers_by_every_way_that_it_prints_and_ctrl_c_ends_it_all(tmp_path: Path) -> None:
    async with launched(tmp_path, "demo", "--nodes", "2", "--first-port", "0") as running:
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

        lines = printed_lines(running, "curl ")
        assert len(lines) == 2
        for line in lines:  # as pasted
            pasted = await anyio.to_thread.run_sync(
                lambda line=line: subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20)
            )
            assert '"title":"hello"' in pasted.stdout, line

        for row in rows.values():
            url = row["node"].replace("ws://", "http://")
            async with httpx.AsyncClient(trust_env=False) as http:
                found = (await http.post(f"{url}/query", json={"query": "to the node"})).json()["embryo_list"]
                listed = (await http.get(f"{url}/registry")).json()["agents"]
            assert [item["properties"]["title"] for item in found] == ["to the node"]
            assert [(each["name"], each["capabilities"]) for each in listed] == [("echo", ["search", "query", "echo"])]

        running.note_processes()
        os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
        await until(lambda: running.process.poll() is not None, "Ctrl-C ends it", 6.0)
        assert running.process.returncode == 0
        await running.gone(2.0)
        assert not (running.state_dir / "ipc").exists()
        assert "Traceback" not in running.log


async def test_query_command_finds_the_runner_and_its_exit_status_says_how_it_went(tmp_path: Path) -> None:
    async with launched(tmp_path, "demo", "--nodes", "1", "--first-port", "0") as running:
        await running.wait_ready()
        state = ("--state-dir", str(running.state_dir))
        asked = await command("query", "what is new?", *state)
        assert asked.returncode == 0, asked.stderr
        assert json.loads(asked.stdout)[0]["properties"]["title"] == "what is new?"
        named = await command("query", "x", "--worker", "echo_server", "--url", str(running.http.base_url))
        assert named.returncode == 0
        unknown = await command("query", "x", "--agent", "nobody", *state)
        assert unknown.returncode == 2
        assert "nobody" in unknown.stderr
        assert "echo" in unknown.stderr
    nobody = await command("query", "x", *state)
    assert nobody.returncode == 1
    assert "em-runner run" in nobody.stderr
    assert len(nobody.stderr.splitlines()) == 1


async def test_demo_says_which_port_is_taken_and_what_to_do(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = await command(
            "demo", "--first-port", port, "--nodes", "1", "--http", "127.0.0.1:0", "--state-dir", str(tmp_path)
        )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert f"127.0.0.1:{port}" in last
    assert "--first-port" in last
    assert "Traceback" not in ended.stderr


async def test_token_command_prints_a_token_that_verifies(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret").chmod(0o600)
    made = await command("token", "--sub", "echo", "--secret-file", str(tmp_path / "secret"))
    assert made.returncode == 0
    claims = tokens.verify(made.stdout.strip(), SECRET)
    assert claims.subject == "echo"
    (tmp_path / "short").write_text("short")
    (tmp_path / "short").chmod(0o600)
    weak = await command("token", "--sub", "echo", "--secret-file", str(tmp_path / "short"))
    assert weak.returncode == 78
    assert "openssl rand" in weak.stderr


async def test_check_prints_the_workers_and_says_what_is_wrong_with_tokens(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text("def handle(body, memory):\n    return body, memory\n")
    expired = tokens.mint(SECRET, "b", ttl_s=-7200)
    other = tokens.mint(SECRET, "someone", ttl_s=60)
    (tmp_path / "b.jwt").write_text(expired)
    (tmp_path / "b.jwt").chmod(0o600)
    (tmp_path / "em-runner.toml").write_text(
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
jwt_token = "{other}"
nodes = ["localhost"]
"""
    )
    found = await command("check", cwd=tmp_path)
    assert found.returncode == 1
    for words in ("a_server_2", "wss://disco.example.com:443", "ws://localhost:8080", "search", "h.py:handle"):
        assert words in found.stdout
    problems = found.stderr.splitlines()
    assert len(problems) == 2
    assert "'b'" in problems[0]
    assert "expired 2 hours ago" in problems[0]
    assert "'someone', not the agent's name 'c'" in problems[1]
    assert expired not in found.stdout + found.stderr
    assert other not in found.stdout + found.stderr


async def test_disco_command_runs_a_node_alone(tmp_path: Path) -> None:
    with subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-m", "runner", "disco", "--port", "0", "--no-auth"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = await anyio.to_thread.run_sync(process.stdout.readline)
            url = line.split()[-1].replace("ws://", "http://")
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(f"{url}/registry")).json() == {"agents": []}
        finally:
            process.terminate()
            status = await anyio.to_thread.run_sync(process.wait)
    assert status == 0


@pytest.mark.parametrize("name", ["run", "reload", "status", "check", "try", "new", "demo", "disco", "token", "query"])
async def test_help_of_every_command_has_an_example(name: str) -> None:
    found = await command(name, "--help")
    assert found.returncode == 0
    assert f"Example: em-runner {name}" in found.stdout
