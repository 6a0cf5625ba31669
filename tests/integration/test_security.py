"""Web pages, other users and other processes are refused, and no secret is shown."""

from __future__ import annotations

import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
import zmq

from disco import Node
from shared import ipc
from tests.cluster import COMMAND_TIMEOUT_S, ROOT, agent, cluster, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:9600"}, 200),
        ({"host": "[::1]:9600"}, 200),
        ({"host": "127.0.0.1:1"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:9600"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost:9600", "origin": "http://localhost:9600"}, 200),
        ({"host": "localhost:9600", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:9600", "origin": "null"}, 403),
    ],
)
async def test_requests_of_web_pages_are_refused(
    headers: dict[str, str], status: int, shared_cluster: object
) -> None:
    http = shared_cluster.http  # type: ignore[attr-defined]
    assert (await http.get("/workers", headers=headers)).status_code == status
    assert (
        await http.post("/agent/query", json={"query": "x"}, headers=headers)
    ).status_code == status


@pytest.fixture
async def shared_cluster(tmp_path: Path, node: Node):  # type: ignore[no-untyped-def]
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        yield running


async def test_private_socket_is_in_a_private_folder(tmp_path: Path, node: Node) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    async with cluster(tmp_path, agent("count", [node.url], memory="disk")) as running:
        await running.wait_ready()
        await running.results("x")
        for folder in ("ipc", "memory"):
            assert stat.S_IMODE((tmp_path / "state" / folder).stat().st_mode) == 0o700


async def test_process_without_the_key_cannot_impersonate_a_worker(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("count", [node.url])) as running:
        await running.wait_ready()
        with zmq.Context() as context, ExitStack() as sockets:
            for name in (b"count_server#1", b"count_server#2", b"count_server_2#1", b"x" * 200):
                socket = sockets.enter_context(context.socket(zmq.DEALER))
                socket.setsockopt(zmq.IDENTITY, name)
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(f"ipc://{tmp_path}/state/ipc/router.sock")
                for message in (
                    ipc.Hello(b"x" * 32),
                    ipc.Status("ready", "", ipc.Counters()),
                    ipc.Replies([(number, 0, b'"forged"') for number in range(1, 200)]),
                    ipc.DrainRequest(),
                    ipc.Failed("forged"),
                ):
                    socket.send(ipc.encode(message))
            for number in range(1, 101):
                assert (await running.results("x"))["properties"]["count"] == number
            row = await running.row("count_server")
            assert (row["state"], row["restarts"]) == ("ready", 0)
            await until(lambda: running.events("message_ignored"), "the refusal is logged")


@pytest.mark.message_text
@pytest.mark.parametrize(
    "key", ["jwt_token_file", "jwt_secret_file", "http_token_file", "jwt_token"]
)
async def test_secret_file_that_others_can_read_is_refused(key: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef")
    secret.chmod(0o640)
    (tmp_path / "h.py").write_text("def handle(body, memory):\n    return body, memory\n")
    value = "0123456789abcdef" if key == "jwt_token" else "secret"
    runner = f'[runner]\n{key} = "{value}"\n' if key == "http_token_file" else ""
    own = "" if runner else f'{key} = "{value}"\n'
    config = tmp_path / "em-runner.toml"
    config.write_text(
        f'{runner}[[agent]]\nname = "a"\nhandler = "h.py:handle"\nnodes = ["localhost"]\n{own}'
    )
    config.chmod(0o644)
    found = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", "check", "-c", str(config)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    )
    assert found.returncode in (1, 78)
    assert "chmod 600" in found.stderr
    assert "0123456789abcdef" not in found.stderr + found.stdout
    assert "Traceback" not in found.stderr
