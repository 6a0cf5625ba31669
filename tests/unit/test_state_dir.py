"""`runner.state_dir`: one runner at a time, a private socket, an address that others find."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runner.state_dir import RESERVED_BYTES, Address, Reloaded, hold, read_address, read_reload
from shared.errors import StartError

ROOT = Path(__file__).resolve().parents[2]


def test_held_folder_has_a_socket_folder_that_only_this_user_enters(tmp_path: Path) -> None:
    with hold(tmp_path / "new" / "state") as state:
        folder = state.socket_path.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_announced_address_is_found_and_gone_afterwards(tmp_path: Path) -> None:
    with hold(tmp_path) as state:
        assert read_address(tmp_path) is None
        state.announce("http://127.0.0.1:1")
        state.announce("http://127.0.0.1:2")
        assert read_address(tmp_path) == Address(os.getpid(), "http://127.0.0.1:2")
    assert read_address(tmp_path) is None
    assert not state.socket_path.parent.exists()


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_keeps_neither_the_address_nor_an_outcome_from_those_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold(tmp_path) as state:
        monkeypatch.setattr(Path, "write_bytes", full)
        state.announce("http://127.0.0.1:1")
        assert read_address(tmp_path) == Address(os.getpid(), "http://127.0.0.1:1")
        for number in range(20):
            state.tell_reload(Reloaded(float(number), done=True, message=f"{number} " + "\x01" * 5000))
            told = read_reload(tmp_path, number)
            assert told is not None
            assert told.message.startswith(f"{number} ")
        assert (tmp_path / "reload.json").stat().st_size == RESERVED_BYTES


def test_full_disk_at_the_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StartError, match="cannot be used: No space left on device"):
        with hold(tmp_path):
            pytest.fail("it is held")
    monkeypatch.undo()
    with hold(tmp_path):
        pass


def test_second_runner_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with hold(tmp_path) as state:
        state.announce("http://127.0.0.1:1")
        with pytest.raises(StartError, match=rf"another em-runner \(pid {os.getpid()}\) uses the state folder"):
            with hold(tmp_path):
                pytest.fail("two runners in one folder")
        assert read_address(tmp_path) is not None, "the refused one clears nothing"
    with hold(tmp_path):
        pass


def test_what_a_killed_runner_left_is_cleared(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from runner.state_dir import hold\n"
        "with hold(Path(sys.argv[1])) as state:\n"
        "    state.announce('http://127.0.0.1:1'); state.socket_path.touch(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -9
    assert (tmp_path / "runner.json").exists()
    assert read_address(tmp_path) is None, "its pid and its port may be somebody else's"
    with hold(tmp_path) as state:
        assert read_address(tmp_path) is None
        assert not state.socket_path.exists()


def test_path_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="too long for a socket"), hold(tmp_path / ("x" * 200)):
        pass


def test_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match=r"cannot be used: (Not a directory|File exists)"), hold(tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"pid":"x","http":"y"}', b'{"pid":1}', b'{"pid":1,"http":"\xff"}']
)
def test_address_file_that_is_none_is_no_address(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "runner.json").write_bytes(content)
    assert read_address(tmp_path) is None


def test_runner_starts_although_others_look_whether_there_is_one(tmp_path: Path) -> None:
    with hold(tmp_path) as state:
        state.announce("http://127.0.0.1:1")
    looking = threading.Event()
    (tmp_path / "runner.json").write_text('{"pid": 1, "http": "http://127.0.0.1:1"}')

    def look() -> None:
        while not looking.is_set():
            read_address(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with hold(tmp_path):
                pass
    finally:
        looking.set()
        for thread in threads:
            thread.join()
