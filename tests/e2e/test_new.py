"""`em-runner new` writes a working agent. `em_runner.testing`, which the agent's test uses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from em_runner.testing import HandlerFault, QueryFailed, running
from shared.errors import ConfigError
from tests.cluster import ROOT

PYTEST = ("pytest", "-q", "-p", "no:cacheprovider")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module as a command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture
def created(tmp_path: Path) -> Path:
    """The folder of an agent that `em-runner new` has created."""
    done = run(tmp_path, "runner", "new", "weather_report")
    assert (done.returncode, done.stderr) == (0, "")
    return tmp_path / "weather_report"


def test_new_agent_is_a_handler_with_a_test_and_a_configuration(created: Path) -> None:
    assert sorted(file.name for file in created.iterdir()) == [
        "em-runner.toml",
        "test_weather_report.py",
        "weather_report.py",
    ]


def test_new_agent_can_be_tried(created: Path) -> None:
    done = run(created, "runner", "try", "weather_report.py:handle", "red fish")
    assert done.returncode == 0, done.stderr
    assert '"words_so_far": 2' in done.stdout


def test_configuration_of_a_new_agent_is_valid(created: Path) -> None:
    done = run(created, "runner", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "weather_report_server" in done.stdout


def test_new_agent_passes_our_linter(created: Path) -> None:
    done = run(created, "ruff", "check", "--config", str(ROOT / "pyproject.toml"), ".")
    assert done.returncode == 0, done.stdout


def test_test_of_a_new_agent_passes_in_its_folder(created: Path) -> None:
    done = run(created, *PYTEST)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("package", [False, True], ids=["plain folder", "package"])
@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_test_of_a_new_agent_passes_from_the_parent_folder(
    package: bool, mode: str, created: Path
) -> None:
    if package:
        (created / "__init__.py").touch()
    done = run(created.parent, *PYTEST, f"--import-mode={mode}", "weather_report")
    assert "1 passed" in done.stdout, done.stdout


def test_command_that_new_prints_quotes_a_folder_with_a_space(tmp_path: Path) -> None:
    (tmp_path / "my agents").mkdir()
    done = run(tmp_path, "runner", "new", "weather_report", "--folder", "my agents")
    assert "cd 'my agents/weather_report'" in done.stdout


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("weather-report", 78),
        ("class", 78),
        ("json", 78),
        ("msgspec", 78),
        ("../up", 78),
        ("worker", 78),
        ("existing", 1),
    ],
)
def test_invalid_name_is_refused_in_one_line(name: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "existing").mkdir()
    done = run(tmp_path, "runner", "new", name)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["existing"], "nothing is written"


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("weather-report", "expected a name of letters, digits and _"),
        ("class", "not a Python keyword"),
        ("json", "exists already"),
        ("existing", "exists already"),
    ],
)
def test_message_about_an_invalid_name_gives_the_reason(
    name: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "existing").mkdir()
    assert text in run(tmp_path, "runner", "new", name).stderr


def count(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if body == "fail":
        raise ValueError("as requested")
    number = memory.get("count", 0) + 1
    return [{"type": "count", "properties": {"number": number}}], {"count": number}


async def count_async(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return count(body, memory)


class Counter:
    closed = False

    def setup(self) -> None:
        self.start = 100

    def handle(self, body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return count(body, memory or {"count": self.start})

    def close(self) -> None:
        Counter.closed = True


@pytest.mark.parametrize(
    ("handler", "first"), [(count, 1), (count_async, 1), (Counter, 101), (Counter(), 101)]
)
def test_handler_of_any_kind_answers_and_remembers(handler: Any, first: int) -> None:
    with running(handler) as agent:
        assert agent.ask("x") == [{"type": "count", "properties": {"number": first}}]
        with pytest.raises(QueryFailed, match="ValueError: as requested"):
            agent.ask("fail")
        assert agent.ask("x") == [{"type": "count", "properties": {"number": first + 1}}]
        assert agent.memory == {"count": first + 1}


def test_handler_is_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counter, "closed", False)
    with running(Counter) as agent:
        agent.ask("x")
        assert not Counter.closed
    assert Counter.closed


def test_disk_memory_outlives_the_agent(tmp_path: Path) -> None:
    for number in (1, 2):
        with running(count, memory="disk", folder=tmp_path) as agent:
            assert agent.ask("x")[0]["properties"]["number"] == number


def test_disk_memory_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="state_dir"), running(count, memory="disk"):
        pass


def test_failure_of_the_test_itself_is_raised_unchanged() -> None:
    with pytest.raises(AssertionError, match="two is not"), running(count):
        raise AssertionError("two is not one")


def test_query_that_exceeds_the_timeout_fails() -> None:
    async def waits(body: str, memory: dict[str, Any]) -> Any:
        await anyio.sleep(30)

    with running(waits, timeout_s=0.1) as agent, pytest.raises(QueryFailed, match=" 100 "):
        agent.ask("x")


def test_exception_in_setup_is_a_fault_of_the_handler() -> None:
    class Broken:
        def setup(self) -> None:
            raise OSError("no database")

        def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return body, memory

    with pytest.raises(HandlerFault, match="no database"), running(Broken):
        pass


def test_handler_with_one_parameter_is_rejected() -> None:
    with pytest.raises(ConfigError, match="argument"), running(lambda body: body):
        pass


def test_handler_in_a_missing_file_is_rejected(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"nowhere\.py"),
        running("nowhere.py:handle", folder=tmp_path),
    ):
        pass


AGENTS = """
class Counter:
    def handle(self, body, memory):
        count = memory.get("count", 0) + 1
        return [{"type": "count", "properties": {"count": count}}], {"count": count}
    def close(self):
        open("closed", "w").close()
"""
TEST_AGENTS = """
import os
def test_two_agents(run_agent, tmp_path):
    one = run_agent("agents.py:Counter")
    other = run_agent("agents.py:Counter", memory="disk")
    for agent in (one, one, other):
        agent.ask("x")
    assert (one.memory, other.memory) == ({"count": 2}, {"count": 1})
    assert any(tmp_path.iterdir())
    assert not os.path.exists("closed")
def test_both_are_closed():
    assert os.path.exists("closed")
"""


def test_fixture_runs_several_agents_until_the_test_ends(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(AGENTS)
    (tmp_path / "test_agents.py").write_text(TEST_AGENTS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(elsewhere, *PYTEST, "-W", "error", str(tmp_path))
    assert "2 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_setup_that_exceeds_its_timeout_is_a_fault(kind: str) -> None:
    finished = threading.Event()

    class Hangs:
        def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return [], memory

        def setup(self) -> None:
            finished.wait(60)

    class HangsAsync:
        async def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return [], memory

        async def setup(self) -> None:
            await anyio.sleep_forever()

    handler = Hangs if kind == "plain" else HangsAsync
    try:
        with (
            pytest.raises(HandlerFault, match=r" 0\.1 s"),
            running(handler, setup_timeout_s=0.1),
        ):
            pass
    finally:
        finished.set()
