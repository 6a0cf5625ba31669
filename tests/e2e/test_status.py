"""`em-runner status` against a real runner, and without one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from disco import NodeSettings, serve
from tests.cluster import ROOT, agent, cluster, until

pytestmark = pytest.mark.anyio


async def status(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", "status", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    )


async def test_status_tells_people_programs_and_scripts_how_it_stands(tmp_path: Path, anyio_backend: object) -> None:
    secret = tmp_path / "token"
    secret.write_text("let-me-in")
    secret.chmod(0o600)
    async with serve(NodeSettings(port=0)) as node:
        agents = [agent("a", [node.url]), agent("b", ["127.0.0.1:9"])]
        async with cluster(tmp_path, *agents, runner='http_token_file = "token"') as running:
            running.http.headers["authorization"] = "Bearer let-me-in"
            await running.wait_state("a_server", "ready")
            await running.wait_state("b_server", "backoff")
            where = ("--state-dir", str(running.state_dir))
            known = (*where, "--token-file", str(secret))

            told = await status(*known)
            assert told.returncode == 1
            assert "1 of 2 workers ready" in told.stdout
            (line,) = [line for line in told.stdout.splitlines() if line.startswith("b_server")]
            assert "backoff" in line
            assert "Connection refused" in line

            answer = await status(*known, "--json")
            assert (answer.returncode, answer.stderr) == (1, "")
            rows = {row["name"]: row["state"] for row in json.loads(answer.stdout)["workers"]}
            assert rows == {"a_server": "ready", "b_server": "backoff"}

            by_address = await status("--url", f"127.0.0.1:{running.http.base_url.port}", "--token-file", str(secret))
            assert by_address.returncode == 1

            unread = await status(*where, "--token-file", str(tmp_path / "nowhere"))
            assert (unread.returncode, unread.stdout) == (2, "")
            assert "nowhere" in unread.stderr

            node_itself = await status("--url", node.url.replace("ws://", "http://"))
            assert node_itself.returncode == 2
            assert "is not em-runner" in node_itself.stderr

            refused = await status(*where)
            assert refused.returncode == 2
            assert "--token-file" in refused.stderr
            assert "Traceback" not in refused.stderr
    gone = await status(*known)
    assert gone.returncode == 2
    assert "no runner is known" in gone.stderr


async def test_watch_goes_on_until_ctrl_c_and_says_when_the_runner_is_gone(
    tmp_path: Path, anyio_backend: object
) -> None:
    async with serve(NodeSettings(port=0)) as node, cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        seen = tmp_path / "seen"
        with seen.open("wb") as sink:
            watching = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                [
                    sys.executable,
                    "-m",
                    "runner",
                    "status",
                    "-w",
                    "--interval",
                    "0.1",
                    "--state-dir",
                    str(running.state_dir),
                ],
                cwd=ROOT,
                stdout=sink,
                stderr=sink,
                env={"TTY_COMPATIBLE": "1", "TERM": "xterm", "PATH": ""},
            )
        try:
            await until(lambda: b"1 of 1 worker ready" in seen.read_bytes(), "the table is shown")
            await running.stop()
            await until(
                lambda: b"no runner is known" in seen.read_bytes() or b"is the runner up?" in seen.read_bytes(),
                "it is gone",
            )
        finally:
            watching.send_signal(2)
            await anyio.to_thread.run_sync(watching.wait)
        assert watching.returncode == 0
        assert b"Traceback" not in seen.read_bytes()


async def test_watch_of_a_pipe_finds_a_runner_that_is_started_later(tmp_path: Path, anyio_backend: object) -> None:
    seen = tmp_path / "seen"
    command = [
        sys.executable,
        "-m",
        "runner",
        "status",
        "-w",
        "--interval",
        "0.1",
        "--state-dir",
        str(tmp_path / "state"),
    ]
    with seen.open("wb") as sink:
        watching = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink)  # noqa: ASYNC220 - it returns at once
    try:
        await until(lambda: b"no runner is known" in seen.read_bytes(), "there is none")
        async with serve(NodeSettings(port=0)) as node, cluster(tmp_path, agent("a", [node.url])) as running:
            assert running.state_dir == tmp_path / "state"
            await until(lambda: b"1 of 1 worker ready" in seen.read_bytes(), "it is found")
    finally:
        watching.send_signal(2)
        await anyio.to_thread.run_sync(watching.wait)
    assert watching.returncode == 0
    assert b"\x1b" not in seen.read_bytes(), "a file gets no control sequences"


async def command(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run([sys.executable, "-m", "runner", *arguments], cwd=ROOT, capture_output=True, timeout=60)
    )


async def test_nobody_is_asked_by_the_address_of_a_runner_that_was_killed(tmp_path: Path) -> None:
    code = "import time; time.sleep(60)"
    bystander = subprocess.Popen([sys.executable, "-c", code])  # noqa: ASYNC220 - it returns at once
    try:
        (tmp_path / "runner.json").write_text(json.dumps({"pid": bystander.pid, "http": "http://127.0.0.1:9"}))
        (tmp_path / "lock").touch()
        for arguments, status in ((["reload"], 1), (["status"], 2), (["query", "x"], 1)):
            done = await command(*arguments, "--state-dir", str(tmp_path))
            assert done.returncode == status
            assert b"no runner is known" in done.stderr
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


async def test_query_that_is_refused_says_what_to_do(tmp_path: Path, anyio_backend: object) -> None:
    handlers = """
import time
def handle(body, memory):
    if body == "fail":
        raise ValueError("no")
    time.sleep(float(body))
    return body, memory
"""
    async with cluster(
        tmp_path, agent("a", ["127.0.0.1:9"]), agent("b", ["127.0.0.1:9"]), handlers=handlers
    ) as running:
        await running.wait_up("a_server")
        where = ("--state-dir", str(running.state_dir))
        for arguments, status, says in (
            (["0"], 2, b"that is --agent NAME"),
            (["fail", "--agent", "a"], 3, b"500: handler_failed (a_server); the traceback is in the runner's log"),
            (["2", "--agent", "a", "--timeout-s", "0.3"], 1, b"none within 0.3 s; is the runner up? A query may take"),
            ([b"\xff", "--agent", "a"], 2, b"the query is no text in UTF-8"),
        ):
            done = await command("query", *arguments, *where)  # type: ignore[arg-type]
            assert done.returncode == status, done.stderr
            assert says in done.stderr
            assert done.stderr.count(b"\n") == 1


async def test_terminal_of_one_who_watched_is_as_it_was_after_a_signal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(  # noqa: ASYNC220 - as above
        [sys.executable, "-m", "runner", "status", "--watch", "--state-dir", str(tmp_path)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    try:
        while b"no runner is known" not in shown:
            shown += await anyio.to_thread.run_sync(os.read, ours, 10_000)
        assert b"\x1b[?1049h" in shown
        watching.send_signal(signal.SIGTERM)
        assert await anyio.to_thread.run_sync(watching.wait, 20) == 128 + signal.SIGTERM
        shown += await anyio.to_thread.run_sync(os.read, ours, 10_000)
        assert b"\x1b[?1049l" in shown
        assert b"\x1b[?25h" in shown
    finally:
        watching.kill()
        watching.wait()
        os.close(ours)


async def test_what_a_terminal_cannot_show_is_no_traceback(tmp_path: Path, anyio_backend: object) -> None:
    handlers = "def handle(body, memory):\n    return 'caf\\u00e9 \\u79d8', memory\n"
    async with cluster(tmp_path, agent("a", ["127.0.0.1:9"]), handlers=handlers, environ={}) as running:
        await running.wait_up("a_server")
        done = await anyio.to_thread.run_sync(
            lambda: subprocess.run(
                [sys.executable, "-m", "runner", "query", "x", "--state-dir", str(running.state_dir)],
                cwd=ROOT,
                env={**os.environ, "PYTHONIOENCODING": "ascii"},
                capture_output=True,
                timeout=60,
            )
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == b'"caf\\xe9 \\u79d8"\n'
