"""`em-runner status` against a real runner, and without one."""

from __future__ import annotations

import http.server
import json
import os
import pty
import pwd
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
            asked = await command("query", "x", "--url", node.url.replace("ws://", "http://"))
            assert asked.returncode == 1
            assert b"is not em-runner" in asked.stderr

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
import os, time
def handle(body, memory):
    if body == "fail":
        raise ValueError("no")
    if body == "die":
        os._exit(3)
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
            (["die", "--agent", "a"], 4, b"; em-runner status says why"),
        ):
            done = await command("query", *arguments, *where)  # type: ignore[arg-type]
            assert done.returncode == status, done.stderr
            assert says in done.stderr
            assert done.stderr.count(b"\n") == 1


async def test_words_that_cannot_be_meant_are_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    where = ("--state-dir", str(tmp_path))
    for arguments, status, says in (
        (["-5"], 2, b"follows '--'"),
        (["- a list"], 2, b"follows '--'"),
        (["-what is new?"], 2, b"follows '--'"),
        (["x", "--agent", ""], 2, b"empty name"),
        (["x", "--worker", ""], 2, b"empty name"),
        (["x", "--url", "http://:s3cr3t@127.0.0.1:9600"], 2, b"--token-file"),
        (["--", "-5"], 1, b"no runner is known"),
    ):
        done = await command("query", *where, *arguments)
        assert (done.returncode, done.stdout) == (status, b""), arguments
        assert says in b" ".join(done.stderr.translate(None, "\u2502|".encode()).split())
        assert b"s3cr3t" not in done.stderr


async def test_state_folder_of_another_user_is_said_to_be_that(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / "runner.json").write_text("{}")
    ask = """
import os, sys, pathlib
from runner import client
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
else:
    os.chmod(sys.argv[1], 0)
for known in (lambda path: client.find(None, path), client.reload):
    try:
        known(pathlib.Path(sys.argv[1]))
    except client.StartError as exc:
        print(exc)
"""
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-c", ask, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    )
    folder.chmod(0o700)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert f"{folder} may not be read by this user" in line
        assert f"'sudo -u {pwd.getpwuid(os.getuid()).pw_name}'" in line
        assert "--url" in line


@contextmanager
def answering(
    status: int, body: bytes, headers: dict[str, str] | None = None, **at: bytes
) -> Iterator[tuple[str, list[str]]]:
    """Something that answers whatever is asked, or with the bodies in `at` by the last word of the path."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(at.get(self.path.rpartition("/")[2].partition(".")[0], body))

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


async def test_token_is_sent_nowhere_a_redirect_leads(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("let-me-in")
    secret.chmod(0o600)
    with answering(200, b'{"workers":[],"results":1}') as (elsewhere, asked_elsewhere):
        for location, named in ((f"{elsewhere}/login\x9b", f"{elsewhere}/login?"), (f"{elsewhere}/workers", elsewhere)):
            with answering(302, b"", {"location": location}) as (url, asked):
                for arguments, status in ((["status"], 2), (["query", "x"], 1)):
                    done = await command(*arguments, "--url", url, "--token-file", str(secret))
                    assert (done.returncode, done.stdout) == (status, b"")
                    assert f"{url} answers 302 to {elsewhere}".encode() in done.stderr
                    assert b"--url" in done.stderr
                    assert b"let-me-in" not in done.stderr
                    if arguments == ["status"]:
                        assert f" to {named}, which is not followed".encode() in done.stderr
                assert len(asked) == 2
        assert asked_elsewhere == []


async def test_answer_that_is_nested_too_deeply_to_be_read_is_told_in_a_line() -> None:
    with answering(200, b'{"workers":' + b"[" * 3000 + b"]" * 3000 + b"}") as (url, _):
        for arguments, status in ((["status"], 2), (["query", "x"], 1)):
            done = await command(*arguments, "--url", url)
            assert (done.returncode, done.stdout) == (status, b"")
            assert b"nested too deeply" in done.stderr
            assert done.stderr.count(b"\n") == 1


async def test_what_is_no_runner_or_another_one_is_told_from_one_that_is_up(tmp_path: Path) -> None:
    old = b'{"workers":[{"name":"a_server","state":"ready"}]}'
    document = b'{"info":{"title":"em-runner","version":"0.0.7"}}'
    for status, body, tls, says in (
        (502, b"<html>Bad Gateway</html>", False, b"502 from http://127.0.0.1:"),
        (502, b"<html>Bad Gateway</html>", False, b"; is the runner behind it up?"),
        (404, b"<html>", False, b"is not em-runner"),
        (404, b'{"error":"not_found"}', False, b"is not em-runner"),
        (200, b"{}", False, b"is not em-runner"),
        (200, b"{}", True, b"its address begins with http://"),
    ):
        with answering(status, body) as (url, _):
            for arguments, left_with in ((["status"], 2), (["query", "x"], 1)):
                done = await command(*arguments, "--url", url.replace("http", "https") if tls else url)
                assert (done.returncode, done.stdout) == (left_with, b"")
                assert says in done.stderr
                assert b"--timeout-s" not in done.stderr
    with answering(200, old, openapi=document) as (url, _):
        done = await command("status", "--url", url)
        assert done.returncode == 2
        assert b"is em-runner 0.0.7, and this command " in done.stderr
        assert b"after an upgrade" in done.stderr
    with answering(200, b'{"workers":[]}') as (url, _):
        done = await command("status", "--url", url)
        assert done.returncode == 1
        assert b"0 of 0 workers ready" in done.stdout
    done = await command("query", "x", "--url", url)
    assert done.returncode == 1
    assert b"Connection refused" in done.stderr
    assert b"--timeout-s" not in done.stderr, "nobody waited"


async def test_no_word_of_a_handler_is_obeyed_by_a_terminal(tmp_path: Path, anyio_backend: object) -> None:
    text = "\x1b[31m \x9b31m \x7f \u202e \U000e0041 \u00e9"
    handlers = f"def handle(body, memory):\n    return {text!a}, {{'last': {text!a}}}\n"
    async with cluster(tmp_path, agent("a", ["127.0.0.1:9"]), handlers=handlers) as running:
        await running.wait_up("a_server")
        done = await command("query", "x", "--state-dir", str(running.state_dir))
    tried = await command("try", f"{tmp_path / 'handlers.py'}:handle", "x")
    assert json.loads(done.stdout) == text
    for shown in (done.stdout, tried.stdout):
        assert b"\\u009b31m \\u007f \\u202e \\udb40\\udc41 \xc3\xa9" in shown
        assert all(char.isprintable() or char == "\n" for char in shown.decode())


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
