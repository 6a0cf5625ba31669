"""What a careless user does: interrupts, closes outputs, works in odd folders."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.cluster import ROOT, agent, launched, until

pytestmark = pytest.mark.anyio
ECHO = "def handle(body, memory):\n    return body, memory\n"
RUNNER = [sys.executable, "-m", "runner"]


async def shell(line: str, cwd: Path, **environ: str) -> Any:
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            ["bash", "-c", line],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable} | environ,
            capture_output=True,
            text=True,
            timeout=30,
        )
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_during_a_slow_import_ends_the_start_at_once(number: int, tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text("import pathlib, time\npathlib.Path('began').touch()\ntime.sleep(3600)\n")
    (tmp_path / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [*RUNNER, "run", "--state-dir", str(tmp_path / "state"), "--http", "127.0.0.1:0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        await until((tmp_path / "began").exists, "the import has begun")
        process.send_signal(number)
        _, errors = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=5))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if number == signal.SIGINT else 0)
    assert "Traceback" not in errors
    assert not (tmp_path / "state" / "ipc").exists()


@pytest.mark.parametrize("command", ["try", "check"])
async def test_folder_that_is_gone_is_said_to_be_or_not_needed(command: str, tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text("def handle(body, memory): return [], memory\n")
    (tmp_path / "em-runner.toml").write_text(agent("a", ["localhost:1"]))
    arguments = (
        ["try", "handlers.py:handle", "x"] if command == "try" else ["check", "-c", f"{tmp_path}/em-runner.toml"]
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    ended = await shell(f"rmdir ../gone; exec {shlex.join([*RUNNER, *arguments])}", gone)
    if command == "try":
        assert (ended.returncode, ended.stderr) == (1, "em-runner: the current folder is gone; change to another one\n")
    else:
        assert ended.returncode == 0, ended.stderr


async def test_modules_of_the_current_folder_are_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("worker", "shared", "runner"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "h.py").write_text("import os\nassert 'PYTHONSAFEPATH' not in os.environ\n" + ECHO)
    (tmp_path / "conf" / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    program = "import sys; sys.argv[0] = 'em-runner'; from runner.cli import main; main()"
    found = await shell(f'"$PYTHON" -P -c "{program}" check -c conf/em-runner.toml', tmp_path)
    assert found.returncode == 0, found.stderr
    assert "a_server" in found.stdout


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full", "2>&-", ">&- 2>&-", "| true"])
async def test_output_that_cannot_be_written_gives_no_traceback(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    found = await shell(f'"$PYTHON" -m runner check {redirection}', tmp_path)
    assert "Traceback" not in found.stderr + found.stdout


async def test_demo_goes_on_when_its_output_is_gone(tmp_path: Path) -> None:
    async with launched(tmp_path, "demo", "--first-port", "0", "--nodes", "1", output=Path("/dev/full")) as running:
        await running.wait_ready()
        assert (await running.ask("x")).status_code == 200
        assert await running.stop() == 0


async def test_check_shows_what_looks_like_markup_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(
        agent("a", ["[fe80::1]:9000"], handler="h.py:handle", capabilities=["[x]", "[/red]", ":smile:"])
    )
    found = await shell('"$PYTHON" -m runner check', tmp_path)
    assert found.returncode == 0, found.stderr
    for words in ("ws://[fe80::1]:9000", "[x], [/red], :smile:"):
        assert words in found.stdout


async def test_query_command_never_shows_the_token_nor_asks_a_proxy(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sekret1\nsekret2")
    (tmp_path / "token").chmod(0o600)
    url = "http://127.0.0.1:9"
    shown = await shell(f'"$PYTHON" -m runner query x --url {url} --token-file token', tmp_path)
    assert shown.returncode == 1
    assert "sekret" not in shown.stderr + shown.stdout
    assert "one line" in shown.stderr
    nonsense = await shell('"$PYTHON" -m runner query x --url nonsense', tmp_path)
    assert nonsense.returncode == 2
    assert "http://127.0.0.1:9600" in nonsense.stderr
    assert "Traceback" not in nonsense.stderr
    async with launched(tmp_path, "demo", "--first-port", "0", "--nodes", "1") as running:
        await running.wait_ready()
        line = f'"$PYTHON" -m runner query x --url {running.http.base_url}'
        asked = await shell(line, tmp_path, http_proxy="http://127.0.0.1:9")
        assert asked.returncode == 0, asked.stderr
