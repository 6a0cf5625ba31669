"""The runner's state folder: a lock for one runner, its address, and its sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import msgspec

from shared.errors import CommandError, StartError

_LOCK_ATTEMPTS: Final = 10
_LOCK_RETRY_S: Final = 0.01

_MAX_SOCKET_PATH: Final = 107
"""The `sun_path` of unix(7) has 108 bytes, and the last one is NUL."""


class RunnerAddress(msgspec.Struct, frozen=True):
    """The content of `runner.json`: where the running runner is."""

    pid: int
    http: str


ReloadResult = Literal["done", "incomplete", "invalid", "refused"]
"""What a reload did.

`done`: the runner and all its workers have the new configuration, except for the keys that only a
restart changes. `incomplete`: some workers keep their old process, or an internal error left it
unknown what was changed. `invalid`, `refused`: nothing was changed, because the configuration is
invalid, or for another reason.
"""


class ReloadOutcome(msgspec.Struct, frozen=True):
    """The outcome of a reload, which the runner sends over its reload socket.

    Attributes:
        message: what changed, or why the reload failed.
    """

    result: ReloadResult
    message: str


class StateDir:
    """The files of a state folder. If the runner creates it, only its own user can enter it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.router_path = path / "ipc" / "router.sock"
        self.reload_path = path / "ipc" / "reload.sock"
        self._address_path = path / "runner.json"

    def announce(self, http: str) -> None:
        """Write the runner's address, for the other commands.

        Raises:
            StartError: if it cannot be written.
        """
        address = msgspec.json.encode(RunnerAddress(os.getpid(), http))
        # Through a second file, because a command may read the first one at any time.
        temporary = self._address_path.with_suffix(".tmp")
        try:
            temporary.write_bytes(msgspec.json.format(address) + b"\n")
            temporary.replace(self._address_path)
        except OSError as exc:
            raise _unusable(self.path, exc) from None

    def clear(self) -> None:
        """Remove the files that exist only while a runner is running."""
        # A full or read-only disk must not hide the error that ends the runner. A stale address
        # does no harm: `read_address` checks the lock.
        with contextlib.suppress(OSError):
            self._address_path.unlink(missing_ok=True)
        shutil.rmtree(self.router_path.parent, ignore_errors=True)


@contextmanager
def locked_state_dir(path: Path) -> Iterator[StateDir]:
    """Lock a state folder, and create it if necessary. Files of a killed runner are removed.

    Raises:
        StartError: if another runner has locked it, or it cannot be created or written.
    """
    state = StateDir(path.absolute())
    # Checked here, because ZeroMQ would only report "invalid argument".
    if len(os.fsencode(state.router_path)) > _MAX_SOCKET_PATH:
        raise StartError(
            f"the path of the state folder {path} is too long for a socket in it; "
            "choose a shorter one"
        )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_lock(state.path))
            # The lock is released last: the next runner must not write files that this one then
            # removes.
            held.callback(state.clear)
            state.clear()
            # Only this user may enter the folder of the sockets: a process that reaches them
            # needs no token.
            state.router_path.parent.mkdir(mode=0o700)
        except OSError as exc:
            raise _unusable(path, exc) from None
        yield state


def _unusable(path: Path, exc: OSError) -> StartError:
    return StartError(
        f"the state folder {path} cannot be used: {exc.strerror or exc}; "
        "choose another one with --state-dir or runner.state_dir"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(
        path / "lock",
        os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
        0o600,
    )
    try:
        _lock_with_retries(path, lock)
        # For the error message of another runner. The lock itself is the kernel's, which releases
        # it when the process ends in any way, so a pid in a file never keeps a folder locked.
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def _lock_with_retries(path: Path, lock: int) -> None:
    # Other commands hold the lock for a moment, to find out whether a runner has it (see
    # `read_address`). A start must not fail because of that.
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(_LOCK_RETRY_S)
    pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
    runner = f"another em-runner (pid {pid})" if pid else "another em-runner"
    raise StartError(
        f"{runner} uses the state folder {path}; "
        "stop it, or choose another folder with --state-dir or runner.state_dir"
    )


def read_address(path: Path) -> RunnerAddress | None:
    """Return the address that the runner of a state folder announced, or None if none is running.

    Raises:
        CommandError: if this user may not read the folder.
    """
    try:
        address = msgspec.json.decode((path / "runner.json").read_bytes(), type=RunnerAddress)
        # A killed runner leaves its address behind. Its pid and its port may belong to other
        # processes by now, so only the lock shows whether it is running.
        with (path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return address
    except PermissionError:
        raise CommandError(
            f"the state folder {path} may not be read by this user; run the command as its owner, "
            "with sudo -u, or name the runner's address with --url"
        ) from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError):
        pass
    return None
