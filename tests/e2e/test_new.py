"""`em-runner new`: what it writes runs as it is; and `worker.testing`, which its test uses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from shared.errors import ConfigError
from tests.cluster import ROOT
from worker.results import HandlerFault
from worker.testing import HandlerFailed, running


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_new_agent_runs_as_it_is_written(tmp_path: Path) -> None:
    made = run(tmp_path, "runner", "new", "weather_report")
    assert (made.returncode, made.stderr) == (0, "")
    folder = tmp_path / "weather_report"
    assert sorted(each.name for each in folder.iterdir()) == [
        "em-runner.toml",
        "test_weather_report.py",
        "weather_report.py",
    ]
    tried = run(folder, "runner", "try", "weather_report.py:handle", "red fish")
    assert tried.returncode == 0, tried.stderr
    assert '"words_so_far": 2' in tried.stdout
    tested = run(folder, "pytest", "-q", "-p", "no:cacheprovider")
    assert "1 passed" in tested.stdout, tested.stdout
    checked = run(folder, "runner", "check")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "weather_report_server" in checked.stdout
    styled = run(folder, "ruff", "check", "--config", str(ROOT / "pyproject.toml"), ".")
    assert styled.returncode == 0, styled.stdout


@pytest.mark.parametrize(
    ("packaged", "mode"), [(False, "prepend"), (True, "prepend"), (False, "importlib"), (True, "importlib")]
)
def test_test_of_a_new_agent_passes_wherever_pytest_is_started_and_however_it_imports(
    packaged: bool, mode: str, tmp_path: Path
) -> None:
    assert run(tmp_path, "runner", "new", "weather_report").returncode == 0
    if packaged:
        (tmp_path / "weather_report" / "__init__.py").touch()
    tested = run(tmp_path, "pytest", "-q", "-p", "no:cacheprovider", f"--import-mode={mode}", "weather_report")
    assert "1 passed" in tested.stdout, tested.stdout


def test_folder_that_a_shell_would_take_apart_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "my agents").mkdir()
    made = run(tmp_path, "runner", "new", "weather_report", "--folder", "my agents")
    assert "cd 'my agents/weather_report'" in made.stdout


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("weather-report", 78, "expected a name of letters, digits and _"),
        ("class", 78, "a word of Python's own"),
        ("json", 78, "a Python module that is there already"),
        ("msgspec", 78, "a Python module that is there already"),
        ("../up", 78, "expected a name"),
        ("worker", 78, "one of em-runner's own packages"),
        ("there", 1, "is there already"),
    ],
)
def test_name_that_cannot_be_is_one_clear_line(name: str, status: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    made = run(tmp_path, "runner", "new", name)
    assert made.returncode == status
    assert says in made.stderr
    assert "Traceback" not in made.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["there"], "nothing is written"


def count(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if body == "fail":
        raise ValueError("as it was told")
    number = memory.get("count", 0) + 1
    return [{"type": "count", "properties": {"number": number}}], {"count": number}


async def count_async(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return count(body, memory)


class Counting:
    closed = False

    def setup(self) -> None:
        self.first = 100

    def handle(self, body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return count(body, memory or {"count": self.first})

    def close(self) -> None:
        Counting.closed = True


@pytest.mark.parametrize(("handler", "first"), [(count, 1), (count_async, 1), (Counting, 101), (Counting(), 101)])
def test_handler_of_any_kind_answers_at_a_node_and_remembers(handler: Any, first: int) -> None:
    with running(handler) as agent:
        assert agent.ask("x") == [{"type": "count", "properties": {"number": first}}]
        with pytest.raises(HandlerFailed, match="ValueError: as it was told"):
            agent.ask("fail")
        assert agent.ask("x") == [{"type": "count", "properties": {"number": first + 1}}]
        assert agent.memory == {"count": first + 1}
    assert Counting.closed or first == 1


def test_disk_memory_outlives_the_agent(tmp_path: Path) -> None:
    for number in (1, 2):
        with running(count, memory="disk", folder=tmp_path) as agent:
            assert agent.ask("x")[0]["properties"]["number"] == number
    with pytest.raises(ValueError, match="needs a state_dir"), running(count, memory="disk"):
        pass


def test_failure_of_a_test_is_seen_as_it_is() -> None:
    with pytest.raises(AssertionError, match="two is not"), running(count):
        raise AssertionError("two is not one")


def test_handler_that_takes_too_long_or_cannot_be_used_says_so(tmp_path: Path) -> None:
    async def waits(body: str, memory: dict[str, Any]) -> Any:
        import anyio

        await anyio.sleep(30)

    class Broken:
        def setup(self) -> None:
            raise OSError("no database")

        def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return body, memory

    with running(waits, timeout_s=0.1) as agent, pytest.raises(HandlerFailed, match="longer than 100 ms"):
        agent.ask("x")
    with pytest.raises(HandlerFault, match="no database"), running(Broken):
        pass
    with pytest.raises(ConfigError, match="must take"), running(lambda body: body):
        pass
    with pytest.raises(ConfigError, match="there is no file"), running("nowhere.py:handle", folder=tmp_path):
        pass


def test_fixture_runs_agents_beside_the_test_until_its_end(tmp_path: Path) -> None:
    (tmp_path / "agents.py").write_text(
        "class Counts:\n"
        "    def handle(self, body, memory):\n"
        "        count = memory.get('count', 0) + 1\n"
        "        return [{'type': 'count', 'properties': {'count': count}}], {'count': count}\n"
        "    def close(self):\n"
        "        open('closed', 'w').close()\n"
    )
    (tmp_path / "test_agents.py").write_text(
        "import os\n"
        "def test_two_at_once(run_agent, tmp_path):\n"
        "    one, other = run_agent('agents.py:Counts'), run_agent('agents.py:Counts', memory='disk')\n"
        "    for agent in (one, one, other):\n"
        "        agent.ask('x')\n"
        "    assert (one.memory, other.memory) == ({'count': 2}, {'count': 1})\n"
        "    assert any(tmp_path.iterdir()) and not os.path.exists('closed')\n"
        "def test_both_are_closed():\n"
        "    assert os.path.exists('closed')\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    tested = run(elsewhere, "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path))
    assert "2 passed" in tested.stdout, tested.stdout


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_setup_that_hangs_is_told_and_given_up(kind: str) -> None:
    over = threading.Event()

    class Hangs:
        def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return [], memory

        def setup(self) -> None:
            over.wait(60)

    class HangsLater(Hangs):
        async def handle(self, body: str, memory: dict[str, Any]) -> Any:
            return [], memory

        async def setup(self) -> None:
            await anyio.sleep_forever()

    handler = Hangs if kind == "plain" else HangsLater
    try:
        with pytest.raises(HandlerFault, match=r"has not ended after 0\.1 s"), running(handler, setup_timeout_s=0.1):
            pass
    finally:
        over.set()
