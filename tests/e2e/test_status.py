"""`em-runner status`, `query` and `reload` as commands, with a runner and without one."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from disco import Node
from tests.cluster import ROOT, Cluster, agent, cluster, until
from tests.e2e.commands import EM_RUNNER, em_runner, run

pytestmark = pytest.mark.anyio

TOKEN = "let-me-in"
UNREACHABLE = "127.0.0.1:9"
STATUS_AND_QUERY = ((("status",), 2), (("query", "x"), 1))
"""The two commands that ask a runner, and their exit statuses if there is no valid answer."""


def counted(ready: int, workers: int) -> re.Pattern[str]:
    """Return a pattern for `2 of 2 workers ready`, in any words."""
    return re.compile(rf"{ready} \w+ {workers} \w+ \w+")


def line_count(text: str) -> int:
    return text.count("\n")


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


@pytest.fixture
async def running(tmp_path: Path, node: Node, token_file: Path) -> AsyncIterator[Cluster]:
    """A runner that requires a token. Its worker a is ready and b is in backoff."""
    # With this interval, b stays in backoff until the end of the test.
    unreachable = agent("b", [UNREACHABLE], reconnect_interval_ms=600_000)
    agents = [agent("a", [node.url]), unreachable]
    async with cluster(tmp_path, *agents, runner='http_token_file = "token"') as running:
        running.http.headers["authorization"] = f"Bearer {TOKEN}"
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        yield running


def state_option(running: Cluster) -> tuple[str, str]:
    return ("--state-dir", str(running.state_dir))


async def test_status_prints_the_state_of_each_worker(running: Cluster, token_file: Path) -> None:
    token = ("--token-file", str(token_file))
    done = await em_runner("status", *state_option(running), *token)
    assert done.returncode == 1, "a worker is not ready"
    assert counted(1, 2).search(done.stdout)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("b_server")]
    assert "backoff" in line
    assert "Connection refused" in line


async def test_status_prints_json_for_programs(running: Cluster, token_file: Path) -> None:
    token = ("--token-file", str(token_file))
    done = await em_runner("status", *state_option(running), *token, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    states = {row["name"]: row["state"] for row in json.loads(done.stdout)["workers"]}
    assert states == {"a_server": "ready", "b_server": "backoff"}


async def test_status_accepts_an_address_without_a_scheme(
    running: Cluster, token_file: Path
) -> None:
    url = ("--url", f"127.0.0.1:{running.http.base_url.port}")
    done = await em_runner("status", *url, "--token-file", str(token_file))
    assert done.returncode == 1
    assert counted(1, 2).search(done.stdout)


async def test_status_reports_a_missing_token_file(running: Cluster, tmp_path: Path) -> None:
    token = ("--token-file", str(tmp_path / "nowhere"))
    done = await em_runner("status", *state_option(running), *token)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere" in done.stderr


async def test_status_without_the_token_names_its_option(running: Cluster) -> None:
    done = await em_runner("status", *state_option(running))
    assert done.returncode == 2
    assert "--token-file" in done.stderr
    assert "Traceback" not in done.stderr


async def test_command_whose_address_is_a_nodes_reports_the_address(node: Node) -> None:
    url = node.url.replace("ws://", "http://")
    for command, status in STATUS_AND_QUERY:
        done = await em_runner(*command, "--url", url)
        assert done.returncode == status
        assert url in done.stderr


async def test_status_of_a_stopped_runner_names_the_state_folder(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
    done = await em_runner("status", *state_option(running))
    assert done.returncode == 2
    assert str(running.state_dir) in done.stderr


@contextmanager
def watching(
    state_dir: Path, output: Path, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `em-runner status --watch` until the end of the block. Then press Ctrl-C."""
    options = ("--watch", "--interval", "0.1", "--state-dir", str(state_dir))
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [*EM_RUNNER, "status", *options], cwd=ROOT, stdout=sink, stderr=sink, env=environ
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


async def test_watch_reports_that_the_runner_has_exited(tmp_path: Path, node: Node) -> None:
    terminal = {"TTY_COMPATIBLE": "1", "TERM": "xterm", "PATH": ""}
    output = tmp_path / "output"
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        with watching(running.state_dir, output, terminal) as watch:
            await until(lambda: counted(1, 1).search(output.read_text()), "the table is shown")
            await running.stop()
            gone = re.compile("--state-dir|refused")
            await until(lambda: gone.search(output.read_text()), "it reports the exit")
    assert watch.returncode == 0
    assert "Traceback" not in output.read_text()


async def test_watch_shows_a_runner_that_starts_later(tmp_path: Path, node: Node) -> None:
    output = tmp_path / "output"
    with watching(tmp_path / "state", output) as watch:
        await until(lambda: "--state-dir" in output.read_text(), "no runner is running")
        async with cluster(tmp_path, agent("a", [node.url])) as running:
            assert running.state_dir == tmp_path / "state"
            await until(lambda: counted(1, 1).search(output.read_text()), "the table is shown")
    assert watch.returncode == 0
    assert "\x1b" not in output.read_text(), "a file gets no control sequences"


async def test_address_of_a_killed_runner_is_not_used(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    bystander = subprocess.Popen(command)  # noqa: ASYNC220 - it returns at once
    # A killed runner leaves these files behind. Another process can get its process id.
    address = {"pid": bystander.pid, "http": f"http://{UNREACHABLE}"}
    (tmp_path / "runner.json").write_text(json.dumps(address))
    (tmp_path / "lock").touch()
    try:
        for command, status in ((("reload",), 1), *STATUS_AND_QUERY):
            done = await em_runner(*command, "--state-dir", str(tmp_path))
            assert done.returncode == status
            assert str(tmp_path) in done.stderr
        assert bystander.poll() is None, "reload has sent it no signal"
    finally:
        bystander.kill()
        bystander.wait()


FAILING = """
import os, time
def handle(body, memory):
    if body == "fail":
        raise ValueError("no")
    if body == "die":
        os._exit(3)
    time.sleep(float(body))
    return body, memory
"""


@asynccontextmanager
async def failing_agents(folder: Path) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Run two agents, and yield a function that runs `em-runner query` with arguments."""
    agents = [agent("a", [UNREACHABLE]), agent("b", [UNREACHABLE])]
    async with cluster(folder, *agents, handlers=FAILING) as running:
        await running.wait_up("a_server")
        yield lambda arguments: em_runner("query", *arguments, *state_option(running))


async def test_exit_status_of_a_failed_query_gives_the_kind_of_failure(
    tmp_path: Path, anyio_backend: object
) -> None:
    async with failing_agents(tmp_path) as query:
        for arguments, status in (
            (["0"], 2),
            (["0", "--agent", ""], 2),
            (["0", "--worker", ""], 2),
            (["fail", "--agent", "a"], 3),
            (["2", "--agent", "a", "--timeout-s", "0.3"], 1),
            ([b"\xff", "--agent", "a"], 2),
            (["die", "--agent", "a"], 4),
        ):
            done = await query(arguments)
            assert done.returncode == status, done.stderr
            assert line_count(done.stderr) == 1


@pytest.mark.message_text
async def test_message_about_a_failed_query_gives_the_next_step(
    tmp_path: Path, anyio_backend: object
) -> None:
    async with failing_agents(tmp_path) as query:
        for arguments, text in (
            (["0"], "use --agent NAME"),
            (["0", "--agent", ""], "there is no agent ''"),
            (["0", "--worker", ""], "there is no worker ''"),
            (
                ["fail", "--agent", "a"],
                "500: handler_failed (a_server); the traceback is in the runner's log",
            ),
            (
                ["2", "--agent", "a", "--timeout-s", "0.3"],
                " within 0.3 s; is the runner up? A query may take",
            ),
            ([b"\xff", "--agent", "a"], "the query is not text in UTF-8"),
            (["die", "--agent", "a"], "; em-runner status shows the reason"),
        ):
            done = await query(arguments)
            assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["-5"], 2, "No such option: -5"),
        (["x", "--url", "http://:s3cr3t@127.0.0.1:9600"], 2, "--token-file"),
        (["--", "-5"], 1, "--state-dir"),
    ],
)
async def test_invalid_arguments_are_refused_without_printing_a_password(
    arguments: list[str], status: int, text: str, tmp_path: Path
) -> None:
    done = await em_runner("query", "--state-dir", str(tmp_path), *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    # typer wraps its messages, and draws a frame around them.
    unframed = done.stderr.translate(dict.fromkeys(map(ord, "\u2502|")))
    assert text in " ".join(unframed.split())
    assert "s3cr3t" not in done.stderr


ASK_AS_ANOTHER_USER = """
import os, sys, pathlib
from runner.commands import client
folder = pathlib.Path(sys.argv[1])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
else:
    folder.chmod(0)
for ask in (lambda path: client.find(None, path), client.reload):
    try:
        ask(folder)
    except client.CommandError as exc:
        print(exc)
"""


async def ask_as_another_user(tmp_path: Path) -> list[str]:
    """Return the errors of a query and of a reload by a user who may not read the state folder."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    (folder / "runner.json").write_text("{}")
    done = await run([sys.executable, "-c", ASK_AS_ANOTHER_USER, str(folder)])
    folder.chmod(0o700)
    errors = done.stdout.splitlines()
    assert len(errors) == 2, done.stderr
    return errors


async def test_unreadable_state_folder_is_reported_with_the_alternative(tmp_path: Path) -> None:
    for error in await ask_as_another_user(tmp_path):
        assert str(tmp_path / "state") in error
        assert "--url" in error


@pytest.mark.message_text
async def test_message_about_an_unreadable_state_folder_names_sudo(tmp_path: Path) -> None:
    for error in await ask_as_another_user(tmp_path):
        assert "sudo -u" in error


@contextmanager
def server(
    status: int, body: bytes, headers: dict[str, str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Run a server that gives every request the same response.

    Yields:
        Its address, and the paths that were requested.
    """
    requested: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}", requested
        finally:
            listening.shutdown()
            thread.join()


async def test_commands_follow_no_redirect(token_file: Path) -> None:
    token = ("--token-file", str(token_file))
    with server(200, b'{"workers":[],"results":1}') as (target, requested_of_target):
        with server(302, b"", {"location": f"{target}/workers"}) as (url, requested):
            for command, status in STATUS_AND_QUERY:
                done = await em_runner(*command, "--url", url, *token)
                assert (done.returncode, done.stdout) == (status, "")
            assert len(requested) == 2
        assert requested_of_target == []


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/workers", ""), ("/login\x9b", "/login?")],
    ids=["the runner's own path", "another path"],
)
async def test_message_about_a_redirect_has_both_addresses(
    path: str, shown: str, token_file: Path
) -> None:
    target = f"http://{UNREACHABLE}"
    token = ("--token-file", str(token_file))
    with server(302, b"", {"location": target + path}) as (url, _):
        for command, _ in STATUS_AND_QUERY:
            done = await em_runner(*command, "--url", url, *token)
            assert url in done.stderr
            assert target in done.stderr
            assert "--url" in done.stderr
            assert TOKEN not in done.stderr
        done = await em_runner("status", "--url", url, *token)
        assert f" {target}{shown}, " in done.stderr


async def test_response_that_is_nested_too_deeply_is_reported_in_one_line() -> None:
    body = b'{"workers":' + b"[" * 3000 + b"]" * 3000 + b"}"
    with server(200, body) as (url, _):
        for command, status in STATUS_AND_QUERY:
            done = await em_runner(*command, "--url", url)
            assert (done.returncode, done.stdout) == (status, "")
            assert url in done.stderr
            assert line_count(done.stderr) == 1


OLD_TABLE = b'{"workers":[{"name":"a_server","state":"ready"}]}'
"""The table of a runner of an older version."""


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("status", "body", "scheme", "text"),
    [
        (502, b"<html>Bad Gateway</html>", "http", "502 from http://127.0.0.1:"),
        (502, b"<html>Bad Gateway</html>", "http", "; is the runner behind it up?"),
        (404, b"<html>", "http", "does not answer as em-runner"),
        (200, b"{}", "http", "does not answer as em-runner"),
        (200, b"{}", "https", "its address starts with http://"),
    ],
)
async def test_message_about_an_invalid_response_gives_the_cause(
    status: int, body: bytes, scheme: str, text: str
) -> None:
    with server(status, body) as (url, _):
        for command, _ in STATUS_AND_QUERY:
            done = await em_runner(*command, "--url", url.replace("http", scheme))
            assert text in done.stderr


@pytest.mark.message_text
async def test_message_about_an_older_runner_asks_for_a_restart() -> None:
    with server(200, OLD_TABLE) as (url, _):
        done = await em_runner("status", "--url", url)
        assert "does not answer as em-runner " in done.stderr
        assert "if it is an older em-runner, restart it" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "scheme"),
    [
        (502, b"<html>Bad Gateway</html>", "http"),
        (404, b"<html>", "http"),
        (404, b'{"error":"not_found"}', "http"),
        (404, b'{"error":"there is no agent x","code":404}', "http"),
        (200, b"{}", "http"),
        (200, b"{}", "https"),
    ],
)
async def test_invalid_response_is_a_failure(status: int, body: bytes, scheme: str) -> None:
    with server(status, body) as (url, _):
        for command, exit_status in STATUS_AND_QUERY:
            done = await em_runner(*command, "--url", url.replace("http", scheme))
            assert (done.returncode, done.stdout) == (exit_status, "")
            assert "--timeout-s" not in done.stderr, "nothing timed out"


async def test_table_of_an_older_runner_is_a_failure() -> None:
    with server(200, OLD_TABLE) as (url, _):
        done = await em_runner("status", "--url", url)
        assert done.returncode == 2
        assert url in done.stderr


async def test_status_of_a_runner_without_workers_is_not_ready() -> None:
    with server(200, b'{"workers":[]}') as (url, _):
        done = await em_runner("status", "--url", url)
        assert done.returncode == 1
        assert counted(0, 0).search(done.stdout)


async def test_refused_connection_is_reported_as_such(reserved_port: int) -> None:
    done = await em_runner("query", "x", "--url", f"http://127.0.0.1:{reserved_port}")
    assert done.returncode == 1
    assert "Connection refused" in done.stderr
    assert "--timeout-s" not in done.stderr, "nothing timed out"


CONTROL_CHARACTERS = "\x1b[31m \x9b31m \x7f \u202e \U000e0041 \u00e9"
SPEAKS_TO_TERMINALS = f"""
def handle(body, memory):
    return {CONTROL_CHARACTERS!a}, {{'last': {CONTROL_CHARACTERS!a}}}
"""


def assert_printable(output: str) -> None:
    assert "\\u009b31m \\u007f \\u202e \\udb40\\udc41 \u00e9" in output
    assert all(char.isprintable() or char == "\n" for char in output)


async def test_query_escapes_a_results_control_characters(
    tmp_path: Path, anyio_backend: object
) -> None:
    async with cluster(
        tmp_path, agent("a", [UNREACHABLE]), handlers=SPEAKS_TO_TERMINALS
    ) as running:
        await running.wait_up("a_server")
        done = await em_runner("query", "x", *state_option(running))
    assert json.loads(done.stdout) == CONTROL_CHARACTERS
    assert_printable(done.stdout)


async def test_try_escapes_a_results_control_characters(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(SPEAKS_TO_TERMINALS)
    done = await em_runner("try", f"{tmp_path / 'handlers.py'}:handle", "x")
    assert_printable(done.stdout)


def read_rest(terminal: int) -> bytes:
    """Return what was written to a terminal that no process has open any more."""
    rest = b""
    with contextlib.suppress(OSError):  # EIO at the end
        while piece := os.read(terminal, 10_000):
            rest += piece
    return rest


async def test_watch_restores_the_terminal_after_a_signal(tmp_path: Path) -> None:
    terminal, device = pty.openpty()
    watch = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [*EM_RUNNER, "status", "--watch", "--state-dir", str(tmp_path)],
        cwd=ROOT,
        stdin=device,
        stdout=device,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(device)
    enter, leave, show_cursor = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
    shown = b""
    try:
        while b"--state-dir" not in shown:
            shown += await anyio.to_thread.run_sync(os.read, terminal, 10_000)
        assert enter in shown
        watch.send_signal(signal.SIGTERM)
        status = await anyio.to_thread.run_sync(watch.wait, 60)
        assert status == 128 + signal.SIGTERM
        shown += await anyio.to_thread.run_sync(read_rest, terminal)
        assert leave in shown
        assert show_cursor in shown
    finally:
        watch.kill()
        watch.wait()
        os.close(terminal)


async def test_query_escapes_characters_that_the_terminal_cannot_show(
    tmp_path: Path, anyio_backend: object
) -> None:
    handlers = "def handle(body, memory):\n    return 'caf\\u00e9 \\u79d8', memory\n"
    async with cluster(tmp_path, agent("a", [UNREACHABLE]), handlers=handlers) as running:
        await running.wait_up("a_server")
        done = await em_runner("query", "x", *state_option(running), PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == '"caf\\xe9 \\u79d8"\n'
