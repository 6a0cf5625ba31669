"""`worker.testing`: what a user's own test is told when a handler hangs, fails, or answers what no node takes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from worker.pytest_plugin import RunAgent
from worker.results import HandlerFault
from worker.testing import HandlerFailed, running


def echo(body: str, memory: dict[Any, Any]) -> Any:
    if body == "fail":
        raise ValueError("as it was told")
    return [{"type": "echo", "properties": {"title": body}}], {"asked": memory.get("asked", 0) + 1}


def test_handler_that_hangs_fails_each_query_and_is_never_an_empty_answer(run_agent: RunAgent) -> None:
    def hang(body: str, memory: dict[Any, Any]) -> Any:
        time.sleep(60)

    agent = run_agent(hang, timeout_s=0.2)
    for _ in range(3):
        began_s = time.monotonic()
        with pytest.raises(HandlerFailed, match="took longer than 200 ms"):
            agent.ask("x")
        assert time.monotonic() - began_s < 5


def test_answer_that_no_node_takes_is_a_failure_and_the_next_one_is_had(run_agent: RunAgent) -> None:
    def large(body: str, memory: dict[Any, Any]) -> Any:
        return [{"type": "large", "properties": {"text": "x" * int(body)}}], memory

    agent = run_agent(large)
    with pytest.raises(HandlerFailed, match=r"did not reach the node.*too large"):
        agent.ask("18000000")
    assert agent.ask("3") == [{"type": "large", "properties": {"text": "xxx"}}]


def test_empty_answer_is_an_answer(run_agent: RunAgent) -> None:
    assert run_agent(lambda body, memory: ([], memory)).ask("x") == []


def test_threads_are_each_told_of_their_own_query(run_agent: RunAgent) -> None:
    agent = run_agent(echo)

    def ask(number: int) -> bool:
        text = "fail" if number % 5 == 0 else str(number)
        try:
            return bool(agent.ask(text)[0]["properties"]["title"] == text)
        except HandlerFailed:
            return text == "fail"

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, range(40)))


def test_object_is_a_handler(run_agent: RunAgent) -> None:
    class Agent:
        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return echo(body, memory)

    assert run_agent(Agent()).ask("x") == run_agent(Agent).ask("x")


def test_memory_of_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ValueError, match="found 'rum', expected one of"):
        with running(echo, memory="rum"):  # type: ignore[arg-type]
            pass


def test_asking_after_the_end_is_told() -> None:
    with running(echo) as agent:
        agent.ask("x")
    with pytest.raises(RuntimeError, match="the agent under test runs no more"):
        agent.ask("x")


SWALLOWS = """
import asyncio, time
async def swallow(body="", memory=None):
    while True:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            pass
class Handle:
    async def handle(self, body, memory):
        await swallow()
class Close:
    async def handle(self, body, memory):
        return [], memory
    async def close(self):
        await swallow()
class SetUp(Close):
    async def setup(self):
        await swallow()
async def blocks(body, memory):
    time.sleep(1.6)
    return [{"type": "late"}], memory
async def computes(body, memory):
    ends_s = time.monotonic() + 6  # not for ever: it goes on in this process
    while time.monotonic() < ends_s:
        pass
class CloseIsCancelled(Close):
    async def setup(self):
        self.task = asyncio.create_task(asyncio.sleep(3600))
    async def close(self):
        self.task.cancel()
        await self.task
class CloseFails(Close):
    async def close(self):
        raise ValueError("no way out")
class CloseHangs:
    def handle(self, body, memory):
        return [], memory
    def close(self):
        time.sleep(100)
"""


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("Handle", "took longer than 200 ms|goes on when it is cancelled"),
        ("Close", "close.*goes on when it is cancelled"),
        ("SetUp", "setup.*goes on when it is cancelled"),
        ("blocks", "keeps the event loop"),
        ("computes", "keeps the event loop"),
        ("CloseIsCancelled", "close.. failed: CancelledError"),
        ("CloseFails", "close.. failed: ValueError: no way out"),
        ("CloseHangs", "close.. has not ended after 0.2 s"),
    ],
)
def test_handler_that_does_not_let_go_fails_its_test_and_holds_up_nothing(
    handler: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.testing._PATIENCE_S", 1.0)
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    began_s = time.monotonic()
    with pytest.raises((HandlerFailed, HandlerFault), match=says):
        with running(f"swallows.py:{handler}", folder=tmp_path, timeout_s=0.2, setup_timeout_s=0.2) as agent:
            agent.ask("x")
    assert time.monotonic() - began_s < 15


def test_test_that_fails_fails_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    with pytest.raises(AssertionError, match="of its own"):
        with running("swallows.py:CloseIsCancelled", folder=tmp_path):
            raise AssertionError("of its own")


def test_class_that_wants_arguments_cannot_be_loaded() -> None:
    class Agent:
        def __init__(self, url: str) -> None:
            raise AssertionError

        def handle(self, body: str, memory: dict[Any, Any]) -> Any:
            return body, memory

    with pytest.raises(ConfigError, match="cannot be made"):
        with running(Agent):
            pass
