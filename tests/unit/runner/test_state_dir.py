"""`runner.state_dir`: one runner at a time, a private folder, an address that clients read."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.state_dir import RunnerAddress, locked_state_dir, read_address
from shared.errors import StartError

ROOT = Path(__file__).resolve().parents[3]


def test_only_this_user_can_enter_the_state_and_socket_folders(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path / "new" / "state") as state:
        folder = state.router_path.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_announced_address_is_readable_until_the_folder_is_released(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path) as state:
        assert read_address(tmp_path) is None
        state.announce("http://127.0.0.1:1")
        state.announce("http://127.0.0.1:2")
        assert read_address(tmp_path) == RunnerAddress(os.getpid(), "http://127.0.0.1:2")
    assert read_address(tmp_path) is None
    assert not state.router_path.parent.exists()


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refuse)
        yield


@pytest.mark.usefixtures("full_disk")
def test_runner_that_meets_a_full_disk_releases_the_folder(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path) as state, pytest.raises(StartError):
        state.announce("http://127.0.0.1:1")
    with locked_state_dir(tmp_path):
        pass


@pytest.mark.message_text
@pytest.mark.usefixtures("full_disk")
def test_message_for_a_full_disk_names_the_cause(tmp_path: Path) -> None:
    with (
        locked_state_dir(tmp_path) as state,
        pytest.raises(StartError, match="cannot be used: No space left on device"),
    ):
        state.announce("http://127.0.0.1:1")


def test_second_runner_is_refused(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path) as state:
        state.announce("http://127.0.0.1:1")
        with pytest.raises(StartError), locked_state_dir(tmp_path):
            pytest.fail("two runners in one folder")
        assert read_address(tmp_path) is not None, "the refused runner removes nothing"
    with locked_state_dir(tmp_path):
        pass


@pytest.mark.message_text
def test_message_for_a_second_runner_names_the_pid_of_the_first(tmp_path: Path) -> None:
    message = rf"another em-runner \(pid {os.getpid()}\) uses the state folder"
    with locked_state_dir(tmp_path) as state:
        state.announce("http://127.0.0.1:1")
        with pytest.raises(StartError, match=message), locked_state_dir(tmp_path):
            pass


def test_files_of_a_killed_runner_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from runner.state_dir import locked_state_dir\n"
        "with locked_state_dir(Path(sys.argv[1])) as state:\n"
        "    state.announce('http://127.0.0.1:1'); state.router_path.touch()\n"
        "    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=200, check=False
    )
    assert killed.returncode == -9
    assert (tmp_path / "runner.json").exists()
    assert read_address(tmp_path) is None, "its pid and port may belong to other processes"
    with locked_state_dir(tmp_path) as state:
        assert read_address(tmp_path) is None
        assert not state.router_path.exists()


def test_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError), locked_state_dir(tmp_path / ("x" * 200)):
        pass


@pytest.mark.message_text
def test_message_for_a_long_path_names_the_socket(tmp_path: Path) -> None:
    with (
        pytest.raises(StartError, match="too long for a socket"),
        locked_state_dir(tmp_path / ("x" * 200)),
    ):
        pass


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError), locked_state_dir(tmp_path / "file"):
        pass


@pytest.mark.message_text
def test_message_for_a_file_in_place_of_the_folder_names_the_cause(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"cannot be used: (Not a directory|File exists)"
    with pytest.raises(StartError, match=message), locked_state_dir(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid":"x","http":"y"}', b'{"pid":1}', b'{"pid":1,"http":"\xff"}'],
)
def test_invalid_address_file_is_ignored(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runner.json").write_bytes(content)
    assert read_address(tmp_path) is None


def test_runner_starts_while_others_read_its_address(tmp_path: Path) -> None:
    with locked_state_dir(tmp_path) as state:
        state.announce("http://127.0.0.1:1")
    stopped = threading.Event()
    (tmp_path / "runner.json").write_text('{"pid": 1, "http": "http://127.0.0.1:1"}')

    def read() -> None:
        while not stopped.is_set():
            read_address(tmp_path)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with locked_state_dir(tmp_path):
                pass
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
