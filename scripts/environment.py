"""Creates or repairs `.venv` in the checkout, and installs em-runner in it.

The last step writes a stamp: a hash of the inputs, and the purpose of the environment. While the
stamp is current, the script does nothing. Without a stamp, the environment counts as incomplete:
damaged packages are installed again, and an environment whose Python does not run is replaced.
The script runs before anything is installed, so it uses only the standard library.
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

REQUIREMENTS: Final = {
    "runtime": ".",
    "docs": ".[docs]",
    "test": ".[test]",
    "bench": ".[test,bench]",
}
"""What pip installs for each purpose.

Each entry includes the ones before it, so an environment for a later purpose also serves the
earlier ones.
"""

PROGRESS_S: Final = 5.0
_PRINT_VERSION: Final = (
    "import sys; assert sys.prefix != sys.base_prefix; print(*sys.version_info[:3])"
)


def main(purpose: str) -> None:
    """Return when the environment is ready for `purpose`. On failure, exit with status 1."""
    if is_ready(purpose):
        return
    try:
        with locked() as lock:
            # Another script may have made it ready before this one got the lock.
            if not is_ready(purpose):
                make(purpose, lock)
    except OSError as exc:
        fail(f"the environment {VENV} cannot be created: {exc}")


def make(purpose: str, lock: int) -> None:
    """Create or repair the environment, install em-runner, and write the stamp."""
    if VENV.exists() and not VENV.is_dir():
        fail(f"{VENV} exists and is not a folder; move it and run this again")
    began_s = time.monotonic()
    stamped = STAMP.exists()
    # First, so that an environment that is left half made has no stamp.
    STAMP.unlink(missing_ok=True)
    if not can_be_repaired():
        create()
    elif not stamped:
        remove_damaged_packages()
    install(purpose, lock)
    version = venv_version()
    if version is None:
        fail(f"{PYTHON} does not run, although it was just created")
    STAMP.write_text(f"{fingerprint(version)}\n{purpose}\n")
    report(f"the environment is ready, after {time.monotonic() - began_s:.0f} s")


def is_ready(purpose: str) -> bool:
    """Return whether the stamp is current and covers the purpose."""
    try:
        stamp = STAMP.read_text().split()
    except OSError:
        return False
    version = venv_version()
    if version is None or not is_wanted(version):
        return False
    purposes = list(REQUIREMENTS)
    covering = purposes[purposes.index(purpose) :]
    return any(stamp == [fingerprint(version), each] for each in covering)


def fingerprint(version: tuple[int, ...]) -> str:
    """Return a hash of the inputs of the installation.

    The checkout's path is one of them, because an environment cannot be moved.
    """
    parts = (
        (ROOT / "pyproject.toml").read_bytes(),
        (ROOT / CONSTRAINTS).read_bytes(),
        repr((version, ROOT)).encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def venv_version() -> tuple[int, ...] | None:
    """Return the version of the environment's Python, or None if that does not exist or run."""
    printed = output_of(PYTHON, "-I", "-c", _PRINT_VERSION)
    return None if printed is None else tuple(int(part) for part in printed.split())


def is_wanted(version: tuple[int, ...]) -> bool:
    """Return whether a version is new enough and, if EM_PYTHON is set, equal to this interpreter's.

    `env.sh` runs this script with the Python that EM_PYTHON names.
    """
    return version >= OLDEST and (
        not os.environ.get("EM_PYTHON") or version == sys.version_info[:3]
    )


def can_be_repaired() -> bool:
    """Return whether there is an environment with the right Python, whose Python and pip run."""
    version = venv_version()
    return (
        version is not None
        and is_wanted(version)
        and output_of(PYTHON, "-I", "-m", "pip", "--version") is not None
    )


def create() -> None:
    """Create an empty environment in place of the existing one."""
    report(f"creating an environment with Python {sys.version.split()[0]} in {VENV}")
    # If the environment is activated, `sys.executable` may be inside it, and is about to be
    # removed.
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = shutil.which(name, path=os.path.join(sys.base_prefix, "bin")) or sys.executable
    made = subprocess.run(
        [base, "-I", "-m", "venv", "--clear", VENV],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if made.returncode:
        fail(f"{base} cannot create an environment:\n{made.stdout.strip()}")


def remove_damaged_packages() -> None:
    """Remove the metadata of incompletely installed packages, so that pip installs them again."""
    for info in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not is_whole(info):
            shutil.rmtree(info)


def is_whole(info: Path) -> bool:
    """Return whether every file in a package's RECORD exists with its size.

    pip writes RECORD last, so a package without it is incomplete.
    """
    try:
        with (info / "RECORD").open(newline="", encoding="utf-8") as record:
            return all(
                (info.parent / name).stat().st_size == int(size)
                for name, _, size in csv.reader(record)
                if size
            )
    except (OSError, ValueError):
        return False


def install(purpose: str, lock: int) -> None:
    """Run pip, and report its progress. pip's output goes to a log file."""
    suffix = {
        "runtime": "",
        "docs": " for its pages",
        "test": " for its tests",
        "bench": " for its benchmarks",
    }[purpose]
    report(f"installing the packages that em-runner needs{suffix}; this happens once")
    command: list[str | Path] = [
        PYTHON,
        "-I",
        "-m",
        "pip",
        "install",
        "-c",
        CONSTRAINTS,
        "-e",
        REQUIREMENTS[purpose],
    ]
    # pip inherits the lock. If this process is killed, pip continues, and until it exits no other
    # script changes the environment.
    with (
        LOG.open("wb") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=pip_environ(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
        ) as pip,
    ):
        try:
            status = wait_for(pip)
        except BaseException:
            pip.terminate()
            raise
    if status:
        fail(
            f"pip failed:\n{pip_errors()}\n"
            f"em-runner: the full log is {LOG}; fix the error and run this again"
        )


def wait_for(pip: subprocess.Popen[bytes]) -> int:
    """Wait for pip, and return its exit status. Report its current step every few seconds."""
    began_s, caller = time.monotonic(), os.getppid()
    while True:
        try:
            return pip.wait(timeout=PROGRESS_S)
        except subprocess.TimeoutExpired:
            if os.getppid() != caller:
                raise SystemExit(1) from None  # the calling script has exited
            report(f"installing, {time.monotonic() - began_s:.0f} s so far: {last_step()}")


def last_step() -> str:
    """Return the last line of pip's log that is not a warning, cut to a readable length."""
    lines = (
        " ".join(line.split()) for line in reversed(LOG.read_text(errors="replace").splitlines())
    )
    return next(
        (line[:90] for line in lines if line and not line.startswith("WARNING")), "starting"
    )


def pip_environ() -> dict[str, str]:
    """Return the environment variables for pip.

    They exclude those that change where pip installs, and include the pins for builds.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")
    }
    # The paths are relative, because pip splits these values at whitespace, which an absolute path
    # may contain.
    builds = {"PIP_CONSTRAINT": CONSTRAINTS, "PIP_BUILD_CONSTRAINT": CONSTRAINTS}
    return {
        **kept,
        **builds,
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def pip_errors() -> str:
    """Return pip's errors, or the end of its log if it has no errors."""
    lines = LOG.read_text(errors="replace").splitlines()
    errors = list(
        dict.fromkeys(line.strip() for line in lines if line.strip().startswith("ERROR:"))
    )
    # Without a connection, pip's errors are misleading: it cannot find the pinned versions.
    if any("connection broken by" in line for line in lines):
        errors = ["the package index cannot be reached"]
    return "\n".join(f"    {line}" for line in (errors or lines)[-15:])


@contextlib.contextmanager
def locked() -> Iterator[int]:
    """Hold the lock on the environment until the last process that inherited it exits."""
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        waited_s, reported_s = 0.0, -60.0
        while not try_lock(lock):
            if waited_s - reported_s >= 2 * PROGRESS_S:
                report("another script is changing the environment; waiting for it")
                reported_s = waited_s
            time.sleep(0.1)
            waited_s += 0.1
        yield lock
    finally:
        os.close(lock)


def try_lock(lock: int) -> bool:
    """Take the lock, and return whether that succeeded."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def output_of(*command: str | Path) -> str | None:
    """Return a command's output, or None if it fails or hangs."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def report(message: str) -> None:
    """Print a message to standard error.

    Standard output is reserved for the program that runs afterwards.
    """
    print(f"em-runner: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print the reason for a failure, and exit with status 1."""
    report(message)
    sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:] not in ([purpose] for purpose in REQUIREMENTS):
        fail(f"usage: environment.py {'|'.join(REQUIREMENTS)}")
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
