"""Careless use: interrupts, closed outputs, unusual folders."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import anyio
import pytest

from tests.cluster import ROOT, agent, launch, until
from tests.e2e.commands import EM_RUNNER, TIMEOUT_S, em_runner, shell

pytestmark = pytest.mark.anyio
ECHO = "def handle(body, memory):\n    return body, memory\n"
ONE_NODE = ("--first-port", "0", "--nodes", "1")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
async def test_signal_interrupts_a_slow_import_at_startup(signum: int, tmp_path: Path) -> None:
    slow_import = "import pathlib, time\npathlib.Path('began').touch()\ntime.sleep(3600)\n"
    (tmp_path / "h.py").write_text(slow_import)
    (tmp_path / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    state_dir = tmp_path / "state"
    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [*EM_RUNNER, "run", "--state-dir", str(state_dir), "--http", "127.0.0.1:0"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        await until((tmp_path / "began").exists, "the import has begun")
        process.send_signal(signum)
        _, stderr = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=TIMEOUT_S))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if signum == signal.SIGINT else 0)
    assert "Traceback" not in stderr
    assert not (state_dir / "ipc").exists()


async def run_in_a_removed_folder(
    tmp_path: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run `em-runner` in a current folder that no longer exists."""
    removed = tmp_path / "removed"
    removed.mkdir()
    command = shlex.join([*EM_RUNNER, *arguments])
    return await shell(f"rmdir ../removed; exec {command}", removed)


async def test_try_needs_a_current_folder(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    done = await run_in_a_removed_folder(tmp_path, "try", "handlers.py:handle", "x")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.message_text
async def test_try_reports_a_missing_current_folder(tmp_path: Path) -> None:
    (tmp_path / "handlers.py").write_text(ECHO)
    done = await run_in_a_removed_folder(tmp_path, "try", "handlers.py:handle", "x")
    message = "em-runner: the current folder does not exist; change to another one\n"
    assert done.stderr == message


async def test_check_needs_no_current_folder(tmp_path: Path) -> None:
    config = tmp_path / "em-runner.toml"
    (tmp_path / "handlers.py").write_text(ECHO)
    config.write_text(agent("a", ["localhost:1"]))
    done = await run_in_a_removed_folder(tmp_path, "check", "-c", str(config))
    assert done.returncode == 0, done.stderr


async def test_modules_in_the_current_folder_do_not_shadow_em_runners(tmp_path: Path) -> None:
    for name in ("worker", "shared", "runner"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    folder = tmp_path / "conf"
    folder.mkdir()
    checks = "import os\nassert 'PYTHONSAFEPATH' not in os.environ\n"
    (folder / "h.py").write_text(checks + ECHO)
    (folder / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    # This is what the installed command `em-runner` does.
    program = "import sys; sys.argv[0] = 'em-runner'; from runner.cli import main; main()"
    command = f'"$PYTHON" -P -c "{program}" check -c conf/em-runner.toml'
    done = await shell(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a_server" in done.stdout


@pytest.mark.parametrize("redirection", [">&-", "> /dev/full", "2>&-", ">&- 2>&-", "| true"])
async def test_output_that_cannot_be_written_causes_no_traceback(
    redirection: str, tmp_path: Path
) -> None:
    (tmp_path / "h.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(agent("a", ["localhost"], handler="h.py:handle"))
    done = await shell(f'"$PYTHON" -m runner check {redirection}', tmp_path)
    assert "Traceback" not in done.stderr + done.stdout


async def test_demo_continues_when_its_output_cannot_be_written(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *ONE_NODE, output=Path("/dev/full")) as running:
        await running.wait_ready()
        assert (await running.ask("x")).status_code == 200
        assert await running.stop() == 0


async def test_check_prints_markup_in_the_configuration_literally(tmp_path: Path) -> None:
    capabilities = ["[x]", "[/red]", ":smile:"]
    node = "[fe80::1]:9000"
    section = agent("a", [node], handler="h.py:handle", capabilities=capabilities)
    (tmp_path / "h.py").write_text(ECHO)
    (tmp_path / "em-runner.toml").write_text(section)
    done = await em_runner("check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"ws://{node}" in done.stdout
    assert "[x], [/red], :smile:" in done.stdout


async def test_query_command_prints_no_part_of_an_invalid_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sekret1\nsekret2")
    token.chmod(0o600)
    options = ("--url", "http://127.0.0.1:9", "--token-file", str(token))
    done = await em_runner("query", "x", *options)
    assert done.returncode == 1
    assert "sekret" not in done.stderr + done.stdout
    assert len(done.stderr.splitlines()) == 1


async def test_query_command_rejects_an_invalid_address(tmp_path: Path) -> None:
    done = await em_runner("query", "x", "--url", "nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "127.0.0.1:9600" in done.stderr, "it shows an example"
    assert "Traceback" not in done.stderr


async def test_query_command_uses_no_proxy(tmp_path: Path) -> None:
    async with launch(tmp_path, "demo", *ONE_NODE) as running:
        await running.wait_ready()
        url = str(running.http.base_url)
        done = await em_runner("query", "x", "--url", url, http_proxy="http://127.0.0.1:9")
        assert done.returncode == 0, done.stderr
