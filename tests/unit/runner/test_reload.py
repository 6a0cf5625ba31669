"""`runner.reload`: an internal error during a reload is reported, and the runner continues."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from runner.reload import ACCEPT_RETRY_S, Reloader
from runner.state_dir import ReloadOutcome, ReloadResult
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, Config
from shared.config.nodes import parse_node
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio


class FakeRunner:
    """Every part of the runner that a reload uses. The method named `fails` raises."""

    def __init__(self, fails: str, *, stopping: bool = False) -> None:
        self.fails = fails
        self.stopping = stopping

    def __getattr__(self, name: str) -> Any:
        def method(*_: Any, **__: Any) -> Any:
            if name == self.fails:
                raise ZeroDivisionError

        return method


async def request_reload(path: Path) -> ReloadOutcome:
    with anyio.fail_after(60):
        async with await anyio.connect_unix(path) as stream:
            reply = b"".join([piece async for piece in stream])
    return msgspec.json.decode(reply, type=ReloadOutcome)


@asynccontextmanager
async def serve_reloads(runner: Any, path: Path) -> AsyncIterator[None]:
    handler = HandlerRef("worker.echo", None, "handle", Path("/"))
    config = Config(agents=(Agent(name="a", handler=handler, nodes=(parse_node("h"),)),))
    reloader = Reloader(
        lambda: config, config, runner, runner, runner.reserve_descriptors, runner.set_config
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(reloader.run)
        await tasks.start(reloader.serve, path)
        yield
        tasks.cancel_scope.cancel()


async def outcome_of(runner: Any, path: Path) -> ReloadOutcome:
    async with serve_reloads(runner, path):
        return await request_reload(path)


@pytest.mark.parametrize(
    ("fails", "result"), [("reserve_descriptors", "refused"), ("set_config", "incomplete")]
)
async def test_internal_error_of_a_reload_is_reported(
    fails: str, result: ReloadResult, tmp_path: Path
) -> None:
    with capture_logs() as logs:
        outcome = await outcome_of(FakeRunner(fails), tmp_path / "s")
    assert outcome.result == result
    assert "reload_fault" in [line["event"] for line in logs]


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("fails", "effect"),
    [
        ("reserve_descriptors", "nothing was changed"),
        ("set_config", "it is unknown what was changed"),
    ],
)
async def test_message_of_an_internal_error_names_its_effect_and_type(
    fails: str, effect: str, tmp_path: Path
) -> None:
    with capture_logs():
        outcome = await outcome_of(FakeRunner(fails), tmp_path / "s")
    assert effect in outcome.message
    assert "ZeroDivisionError" in outcome.message


@pytest.mark.parametrize("fails", ["reserve_descriptors", "set_config"])
async def test_next_reload_runs_after_an_internal_error(fails: str, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with serve_reloads(FakeRunner(fails), tmp_path / "s"):
            for _ in range(2):
                await request_reload(tmp_path / "s")
    assert [line["event"] for line in logs].count("reload_fault") == 2


async def test_only_this_user_can_connect_to_the_reload_socket(tmp_path: Path) -> None:
    async with serve_reloads(FakeRunner(""), tmp_path / "s"):
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600


async def test_next_client_is_served_after_one_that_does_not_wait(tmp_path: Path) -> None:
    with capture_logs():
        async with serve_reloads(FakeRunner("reserve_descriptors"), tmp_path / "s"):
            async with await anyio.connect_unix(tmp_path / "s"):
                pass
            assert (await request_reload(tmp_path / "s")).result == "refused"


async def test_stopping_runner_reloads_nothing(tmp_path: Path) -> None:
    with capture_logs():
        outcome = await outcome_of(FakeRunner("set_config", stopping=True), tmp_path / "s")
    assert outcome.result == "refused"


@pytest.mark.message_text
async def test_message_of_a_stopping_runner_says_that_it_stops(tmp_path: Path) -> None:
    with capture_logs():
        outcome = await outcome_of(FakeRunner("", stopping=True), tmp_path / "s")
    assert "the runner is stopping" in outcome.message


async def test_client_is_served_once_a_file_descriptor_is_free(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with capture_logs(), socket.socket(socket.AF_UNIX) as client:
        async with serve_reloads(FakeRunner("reserve_descriptors"), tmp_path / "s"):
            client.settimeout(60)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(), hard))
            try:
                client.connect(str(tmp_path / "s"))
                # No event shows that the reloader has tried to accept the client.
                await anyio.sleep(3 * ACCEPT_RETRY_S)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            reply = await anyio.to_thread.run_sync(client.recv, 65_536)
    assert msgspec.json.decode(reply, type=ReloadOutcome).result == "refused"


async def test_each_of_many_clients_at_once_gets_an_outcome(tmp_path: Path) -> None:
    outcomes: list[ReloadOutcome] = []

    async def request() -> None:
        outcomes.append(await request_reload(tmp_path / "s"))

    with capture_logs():
        async with (
            serve_reloads(FakeRunner("reserve_descriptors"), tmp_path / "s"),
            anyio.create_task_group() as clients,
        ):
            for _ in range(50):
                clients.start_soon(request)
    assert len(outcomes) == 50


def lowest_free_descriptor() -> int:
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    return free
