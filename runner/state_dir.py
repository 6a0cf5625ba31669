"""The runner's folder: one runner at a time, its address for the other commands, its private socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from shared.errors import StartError
from shared.logs import shortened

LOOK_S: Final = 0.01
"""How long another command may take to look whether a folder is held."""

KEPT_RELOADS: Final = 16

RESERVED_BYTES: Final = 4096
"""The room for what is to be written when the disk is full: what a file takes of it at least."""

LONGEST_KEPT_CHARS: Final = 500
"""How much of a reload's outcome is told then; as JSON, a character has up to six bytes."""

_MAX_SOCKET_PATH: Final = 107  # sun_path of unix(7) holds 108 bytes, one of them the end


class Address(msgspec.Struct, frozen=True):
    """What `runner.json` holds: where to find the running runner."""

    pid: int
    http: str


class Reloaded(msgspec.Struct, frozen=True):
    """How a reload went, and when it began, by the clock that all processes share and that only goes forward.

    Not `done` and `changed` is one that some workers did not follow: their old processes stay.
    """

    began_s: float
    done: bool
    message: str
    changed: bool = True


class StateDir:
    """A state folder that this process holds alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket_path = path / "ipc" / "router.sock"
        self._address_path = path / "runner.json"
        self._reload_path = path / "reload.json"
        self._reloads: deque[Reloaded] = deque(maxlen=KEPT_RELOADS)

    def reserve(self) -> None:
        """Have room for what is to be written later, though the disk may be full then.

        Raises:
            OSError: when there is none.
        """
        for path in (self._address_path, self._reload_path):
            path.write_bytes(b" " * RESERVED_BYTES)

    def announce(self, http: str) -> None:
        """Write where the runner listens, whole or not at all."""
        _write(self._address_path, Address(os.getpid(), http))

    def tell_reload(self, outcome: Reloaded) -> None:
        """Write how a reload went, for the command that waits for it; the last ones stay."""
        self._reloads.append(outcome)
        last = msgspec.structs.replace(outcome, message=shortened(outcome.message, LONGEST_KEPT_CHARS))
        _write(self._reload_path, list(self._reloads), [last])

    def clear(self) -> None:
        """Remove what only a running runner has."""
        with contextlib.suppress(OSError):
            self._address_path.unlink(missing_ok=True)
            self._reload_path.unlink(missing_ok=True)
        shutil.rmtree(self.socket_path.parent, ignore_errors=True)


@contextmanager
def hold(path: Path) -> Iterator[StateDir]:
    """Hold a state folder, making it if need be; what a killed runner left in it is cleared.

    Raises:
        StartError: when another runner holds it, or it cannot be made or written.
    """
    state = StateDir(path.absolute())
    if len(os.fsencode(state.socket_path)) > _MAX_SOCKET_PATH:
        raise StartError(f"the path of the state folder {path} is too long for a socket in it; choose a shorter one")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(_lock(state.path))
            held.callback(state.clear)
            state.clear()
            state.socket_path.parent.mkdir(mode=0o700)
            state.reserve()
        except OSError as exc:
            raise StartError(
                f"the state folder {path} cannot be used: {exc.strerror or exc}; "
                "choose another one with --state-dir or runner.state_dir"
            ) from None
        yield state


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            _lock_soon(lock)
        except BlockingIOError:
            raise StartError(_held_by_another(lock, path)) from None
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(lock)


def _lock_soon(lock: int) -> None:
    """Take the lock. Whoever only looks whether it is held has it for a moment, see `read_address`."""
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(LOOK_S)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_address(path: Path) -> Address | None:
    """Return the address that the runner of a state folder announced, or None when none runs.

    One that was killed could not take its address back: who holds the lock is asked of the kernel, for its pid and
    its port may be somebody else's by now.

    Raises:
        StartError: when this user may not look.
    """
    try:
        address = msgspec.json.decode((path / "runner.json").read_bytes(), type=Address)
        with (path / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return address
    except PermissionError:
        raise StartError(_not_for_us(path)) from None
    except (OSError, UnicodeDecodeError, msgspec.DecodeError):
        pass
    return None


def _not_for_us(path: Path) -> str:
    owner = "USER"
    for folder in (path, *path.parents):  # nobody sees whose a folder is that is in one they may not enter
        with contextlib.suppress(OSError):
            uid = folder.stat().st_uid
            try:
                owner = pwd.getpwuid(uid).pw_name
            except KeyError:
                owner = f"'#{uid}'"
            break
    return (
        f"the state folder {path} may not be read by this user; ask as its owner, with 'sudo -u {owner}', or "
        "name the runner's address with --url"
    )


def read_reload(path: Path, since_s: float = 0.0) -> Reloaded | None:
    """Return how the first reload went that began after `since_s`, by `time.monotonic`; None while none has ended."""
    try:
        reloads = msgspec.json.decode((path / "reload.json").read_bytes(), type=list[Reloaded])
    except (OSError, msgspec.DecodeError):
        return None
    return next((each for each in reloads if each.began_s >= since_s), None)


def _write(path: Path, value: msgspec.Struct | list[Reloaded], less: list[Reloaded] | None = None) -> None:
    """Write a file anew, or where there is no room for that into the room that it has; `less` fits into it."""
    try:
        partial = path.with_suffix(".tmp")
        partial.write_bytes(_lines(value))
        partial.replace(path)
    except OSError:
        with path.open("r+b", buffering=0) as file:  # the whole at once: whoever reads finds all of it
            file.write(_lines(value if less is None else less).ljust(path.stat().st_size))


def _lines(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"


def _held_by_another(lock: int, path: Path) -> str:
    pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
    return (
        f"another em-runner{f' (pid {pid})' if pid else ''} uses the state folder {path}; "
        "stop it, or choose another folder with --state-dir or runner.state_dir"
    )
