"""Makes `.venv` beside the scripts, or mends it, and installs em-runner in it.

A stamp is written last and names what was installed from what. While it fits, nothing is done;
without it the environment is taken for half-made: what is damaged is installed again, and what
cannot run is made anew. Runs before anything is installed: the standard library alone.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

ROOT: Final = Path(__file__).resolve().parent.parent
VENV: Final = ROOT / ".venv"
PYTHON: Final = VENV / "bin" / "python"
STAMP: Final = VENV / "em-runner.stamp"
LOG: Final = VENV / "install.log"
LOCK: Final = ROOT / ".venv.lock"
CONSTRAINTS: Final = "constraints.txt"
OLDEST: Final = (3, 11)

WHAT: Final = {"runtime": ".", "docs": ".[docs]", "test": ".[test]", "bench": ".[test,bench]"}
"""What pip is asked for, each with all that the ones before it are asked for: it serves for those too."""

PROGRESS_S: Final = 5.0
_IS_VENV: Final = "import sys; assert sys.prefix != sys.base_prefix; print(*sys.version_info[:3])"


def main(kind: str) -> None:
    """Return once the environment serves `kind`; leave with status 1 and a message when it cannot."""
    if is_ready(kind):
        return
    try:
        with locked() as lock:
            if not is_ready(kind):
                make(kind, lock)
    except OSError as exc:
        leave(f"the environment {VENV} cannot be made: {exc}")


def make(kind: str, lock: int) -> None:
    """Make or mend the environment, install, and write the stamp."""
    if VENV.exists() and not VENV.is_dir():
        leave(f"{VENV} is in the way, for it is no folder; move it and run this again")
    began_s = time.monotonic()
    stamped = STAMP.exists()
    STAMP.unlink(missing_ok=True)
    if not can_be_mended():
        create()
    elif not stamped:
        forget_damaged_packages()
    install(kind, lock)
    version = venv_version()
    if version is None:
        leave(f"{PYTHON} does not run although it was just made")
    STAMP.write_text(f"{fingerprint(version)}\n{kind}\n")
    say(f"the environment is ready, after {time.monotonic() - began_s:.0f} s")


def is_ready(kind: str) -> bool:
    """Return whether the stamp fits what the environment is now and what it is needed for."""
    try:
        stamp = STAMP.read_text().split()
    except OSError:
        return False
    version = venv_version()
    if version is None or not is_wanted(version):
        return False
    kinds = list(WHAT)
    return any(stamp == [fingerprint(version), each] for each in kinds[kinds.index(kind) :])


def fingerprint(version: tuple[int, ...]) -> str:
    """Return a hash of all that decides what is installed. The path is part of it: an environment cannot be moved."""
    parts = ((ROOT / "pyproject.toml").read_bytes(), (ROOT / CONSTRAINTS).read_bytes(), repr((version, ROOT)).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def venv_version() -> tuple[int, ...] | None:
    """Return the version of the environment's Python, or None when it does not run or is none."""
    printed = output_of(PYTHON, "-I", "-c", _IS_VENV)
    return None if printed is None else tuple(int(part) for part in printed.split())


def is_wanted(version: tuple[int, ...]) -> bool:
    """Return whether that version will do: a new enough one, and EM_PYTHON's own where that is set."""
    return version >= OLDEST and (not os.environ.get("EM_PYTHON") or version == sys.version_info[:3])


def can_be_mended() -> bool:
    """Return whether there is an environment with a Python and a pip that run."""
    version = venv_version()
    return version is not None and is_wanted(version) and output_of(PYTHON, "-I", "-m", "pip", "--version") is not None


def create() -> None:
    """Make an empty environment, in place of what there is."""
    say(f"making an environment with Python {sys.version.split()[0]} in {VENV}")
    # When the environment itself is activated, this may be its own Python, which is about to be removed.
    base = getattr(sys, "_base_executable", sys.executable)
    made = subprocess.run(
        [base, "-I", "-m", "venv", "--clear", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if made.returncode:
        leave(f"{base} cannot make an environment:\n{made.stdout.strip()}")


def forget_damaged_packages() -> None:
    """Have pip take for missing what an interrupted install left incomplete; it believes in their folders otherwise."""
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not is_whole(info):
            shutil.rmtree(info)


def is_whole(info: Path) -> bool:
    """Return whether every file that a package's RECORD lists is there in its size. pip writes RECORD last."""
    try:
        with (info / "RECORD").open(newline="", encoding="utf-8") as record:
            return all((info.parent / name).stat().st_size == int(size) for name, _, size in csv.reader(record) if size)
    except (OSError, ValueError):
        return False


def install(kind: str, lock: int) -> None:
    """Run pip, telling now and then how far it is; what it says goes to a log."""
    purpose = {"runtime": "run", "docs": "build its pages", "test": "be tested", "bench": "be measured"}[kind]
    say(f"installing what em-runner needs to {purpose}; this is done once")
    command: list[str | Path] = [PYTHON, "-I", "-m", "pip", "install", "-c", CONSTRAINTS, "-e", WHAT[kind]]
    # pip keeps the lock as well: should this process be killed, nobody meddles while pip goes on.
    with (
        LOG.open("wb") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=pip_environ(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(lock,)
        ) as pip,
    ):
        try:
            status = follow(pip)
        except BaseException:
            pip.terminate()
            raise
    if status:
        leave(f"pip failed:\n{what_failed()}\nem-runner: the whole log is {LOG}; mend what it names and run this again")


def follow(pip: subprocess.Popen[bytes]) -> int:
    """Return pip's exit status, once it has one; say what it is at every few seconds."""
    began_s, caller = time.monotonic(), os.getppid()
    while True:
        try:
            return pip.wait(timeout=PROGRESS_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != caller:
                raise SystemExit(1) from None  # who asked for it is gone
            say(f"installing, {time.monotonic() - began_s:.0f} s so far: {last_step()}")


def last_step() -> str:
    """Return the last line of the log that tells what pip does, cut to a readable length."""
    lines = (" ".join(line.split()) for line in reversed(LOG.read_text(errors="replace").splitlines()))
    return next((line[:90] for line in lines if line and not line.startswith("WARNING")), "starting")


def pip_environ() -> dict[str, str]:
    """Return the environment for pip, without what would make it install elsewhere, and with the pins for builds."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")}
    # Relative, because pip splits these at white space and a path may hold some.
    builds = {"PIP_CONSTRAINT": CONSTRAINTS, "PIP_BUILD_CONSTRAINT": CONSTRAINTS}
    return {
        **kept,
        **builds,
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def what_failed() -> str:
    """Return pip's errors, or the end of its log when it names none."""
    lines = LOG.read_text(errors="replace").splitlines()
    errors = list(dict.fromkeys(line.strip() for line in lines if line.strip().startswith("ERROR:")))
    if any("connection broken by" in line for line in lines):  # pip then blames the pins, of which it finds none
        errors = ["the package index cannot be reached"]
    return "\n".join(f"    {line}" for line in (errors or lines)[-15:])


@contextlib.contextmanager
def locked() -> Iterator[int]:
    """Be the only one who works on the environment; the lock goes with the last process that has it."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        waited_s, told_s = 0.0, -60.0
        while not try_lock(lock):
            if waited_s - told_s >= 2 * PROGRESS_S:
                say("another script is at work on the environment; waiting for it")
                told_s = waited_s
            time.sleep(0.1)
            waited_s += 0.1
        yield lock
    finally:
        os.close(lock)


def try_lock(lock: int) -> bool:
    """Take the lock, unless somebody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def output_of(*command: str | Path) -> str | None:
    """Return what a command prints, or None when it fails or hangs."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def say(message: str) -> None:
    """Tell the user; standard output belongs to what is run afterwards."""
    print(f"em-runner: {message}", file=sys.stderr, flush=True)


def leave(message: str) -> NoReturn:
    """Tell the user why nothing can be done, and end."""
    say(message)
    sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:] not in ([kind] for kind in WHAT):
        leave(f"usage: environment.py {'|'.join(WHAT)}")
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
