"""A reader who does what a page says: writes its files, runs its commands, compares the output.

Each of the ports in the text is replaced by a reserved port, and back in the output. The home
folder is temporary. All processes are stopped at the end of the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.docs.markdown import ROOT, Block, Command
from tests.ports import reserved_port, reserved_ports

TIMEOUT_S = 120.0
POLL_S = 0.05
BIN = Path(sys.executable).parent
PORTS = ("9600", "8080", "8081")
_PORT = re.compile(r"(?<![\d.])(?:" + "|".join(PORTS) + r")(?!\d)")
_EXAMPLE_PID = re.compile(r"(?<!\d)41\d\d(?!\d)")
"""Process ids in the text are 41xx. The id that is printed there replaces it in later commands."""

_DEFAULTS = (
    (
        re.compile(r"(scripts/run_cluster\.sh|em-runner demo)(?!.*--)"),
        "--first-port 8080 --http 127.0.0.1:9600",
    ),
    (
        re.compile(r"(em-runner run|scripts/run_cluster\.sh -c \S+)(?!.*--http)"),
        "--http 127.0.0.1:9600",
    ),
)
"""Commands with default ports, and the options that set these ports."""


@dataclass
class Server:
    """A command that keeps running in its terminal."""

    command: str
    process: subprocess.Popen[bytes]
    output: Path

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def stop(self) -> int:
        """Press Ctrl-C, kill what remains, and return the exit status."""
        processes = self.processes()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(TIMEOUT_S)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


class Reader:
    """A user at a terminal, in an empty folder.

    Attributes:
        ran: the commands that the reader has run.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ran: list[Command] = []
        self._servers: list[Server] = []
        self._reserved = contextlib.ExitStack()
        self._ports = self._reserve_ports()
        self._pids: dict[str, str] = {}
        self._start_folder = home
        self._terminal = "1"
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EM_", "VIRTUAL_ENV"))
        }
        self._environ = inherited | {
            "HOME": str(home),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "COLUMNS": "160",
        }
        self._environ.pop("PYTHONPATH", None)

    def take(self, block: Block) -> None:
        """Take the step that a block asks for."""
        if block.language == "checkout":
            self._start_folder = self.check_out()
        elif block.language == "stop":
            self._stop(block)
        elif block.not_run is not None:
            if any(command.text.startswith("git clone") for command in block.commands):
                self.check_out()
        elif block.file is not None:
            self._write(block, block.file)
        elif block.language == "console":
            self._terminal = block.terminal or self._terminal
            *before, last = block.commands
            self.ran += block.commands
            for command in before:
                self._run(block, command)
            if block.ready_text is None:
                self._run(block, last)
            else:
                self._start(last, block.ready_text, f"{block.where}: $ {last.text}")

    def check_out(self) -> Path:
        """Create a checkout, made of links, and return its folder."""
        folder = self.home / "em-runner"
        folder.mkdir()
        for each in ROOT.iterdir():
            (folder / each.name).symlink_to(each)
        return folder

    def written(self, name: str) -> Path:
        """Return the path of a file that the text names."""
        return (
            Path(name.replace("~", str(self.home), 1)) if name.startswith("~") else self._cwd / name
        )

    def leave(self) -> None:
        """Stop the servers that are still running."""
        for server in self._servers:
            # A server that ignores Ctrl-C has been killed. The others must be stopped, too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.stop()
        self._servers.clear()
        self._reserved.close()

    def _reserve_ports(self) -> dict[str, str]:
        """Return a reserved port for each port in the text. The ports of nodes are consecutive."""
        http = self._reserved.enter_context(reserved_port())
        nodes = self._reserved.enter_context(reserved_ports(len(PORTS) - 1))
        return dict(zip(PORTS, map(str, [http, *nodes]), strict=True))

    @property
    def _shell_state(self) -> Path:
        """The folder for the terminal's current folder and variables, between two commands."""
        return self.home / f".terminal-{self._terminal}"

    @property
    def _cwd(self) -> Path:
        pwd = self._shell_state / "pwd"
        return Path(pwd.read_text().strip()) if pwd.exists() else self._start_folder

    def _write(self, block: Block, name: str) -> None:
        path = self.written(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._with_real_values(block.text))

    def _stop(self, block: Block) -> None:
        [name] = block.lines
        running = [
            each
            for each in self._servers
            if each.command.startswith(name) and each.process.poll() is None
        ]
        assert running, f"{block.where}: {name!r} is not running"
        server = running[0]
        self._servers.remove(server)
        status = server.stop()
        output = server.output.read_text()[-3000:]
        assert status == 0, f"{block.where}: {name} exited with {status}\n{output}"

    def _run(self, block: Block, command: Command) -> None:
        where = f"{block.where}: $ {command.text}"
        ends = time.monotonic() + TIMEOUT_S
        while True:
            status, printed = self._call(command.text, where)
            mismatch = self._mismatch(block, command, status, printed)
            if mismatch is None:
                return
            if not block.repeats or time.monotonic() > ends:
                outcome = f"it exited with {status} and printed\n{printed}{self._logs()}"
                raise AssertionError(f"{where}\n{mismatch}; {outcome}")
            time.sleep(POLL_S)

    def _call(self, text: str, where: str) -> tuple[int, str]:
        self._shell_state.mkdir(exist_ok=True)
        state = shlex.quote(str(self._shell_state))
        save_state = f"pwd > {state}/pwd; {{ export -p; echo umask $(umask); }} > {state}/environ"
        script = f"{self._script(text)}\nstatus=$?; {save_state}; exit $status"
        with subprocess.Popen(
            ["bash", "-c", script],
            cwd=self._cwd,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                printed, _ = process.communicate(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"{where}\ndoes not exit; is it a server?") from None
        return process.returncode, self._with_example_values(printed.decode(errors="replace"))

    def _start(self, command: Command, ready_text: str, where: str) -> None:
        output = self.home / f".server-{len(list(self.home.glob('.server-*')))}"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                ["bash", "-c", self._script(command.text)],
                cwd=self._cwd,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        server = Server(command.text, process, output)
        self._servers.append(server)
        ends = time.monotonic() + TIMEOUT_S
        while True:
            printed = self._with_example_values(output.read_text(errors="replace"))
            mismatch = self._missing(command.shown, printed, vary=True)
            if ready_text in printed and mismatch is None:
                return
            assert process.poll() is None, f"{where}\nexited with {process.returncode}\n{printed}"
            assert time.monotonic() < ends, f"{where}\n{ready_text!r}, {mismatch}\n{printed}"
            time.sleep(POLL_S)

    def _script(self, text: str) -> str:
        """Return the bash script for a command. It first restores the terminal's variables."""
        command = self._with_real_values(_with_ports(text))
        environ = self._shell_state / "environ"
        restore = f". {shlex.quote(str(environ))}\n" if environ.exists() else ""
        return restore + command

    def _mismatch(self, block: Block, command: Command, status: int, printed: str) -> str | None:
        if status != block.status:
            return f"the exit status is not {block.status}"
        return self._missing(command.shown, printed, vary=block.numbers_vary)

    def _missing(self, shown: list[str], printed: str, *, vary: bool) -> str | None:
        """Return an error if the lines shown are not among the printed ones, in this order."""
        lines = iter([" ".join(line.split()) for line in printed.splitlines()])
        for expected in shown:
            pattern, pids = _pattern(" ".join(expected.split()), vary)
            if not pattern.pattern:
                continue
            for line in lines:
                if found := pattern.fullmatch(line):
                    self._pids |= dict(zip(pids, found.groups(), strict=True))
                    break
            else:
                return f"not printed: {expected!r}"
        return None

    def _with_real_values(self, text: str) -> str:
        """Return text from the page, with real ports and process ids."""
        text = _PORT.sub(lambda found: self._ports[found[0]], text)
        return _EXAMPLE_PID.sub(lambda found: self._pids.get(found[0], found[0]), text)

    def _with_example_values(self, printed: str) -> str:
        """Return output, with the ports and the home folder of the page."""
        for example, port in self._ports.items():
            printed = re.sub(rf"(?<!\d){port}(?!\d)", example, printed)
        return printed.replace(str(self.home), "~")

    def _logs(self) -> str:
        """Return the end of each server's output."""
        logs = ""
        for server in self._servers:
            output = server.output.read_text(errors="replace")
            logs += f"\n--- {server.command}\n{output[-3000:]}"
        return logs


def _with_ports(command: str) -> str:
    """Return a command with options for the ports that it would use by default."""
    for uses_ports, options in _DEFAULTS:
        command = uses_ports.sub(rf"\1 {options}", command)
    return command


_NUMBER = r"\d+(?:\.\d+)?"
_DURATION = rf"{_NUMBER} [um]s"
_VARIABLE_PART = re.compile(rf"(\.\.\.|{_EXAMPLE_PID.pattern}|{_DURATION}\b|{_NUMBER})")


def _pattern(shown: str, vary: bool) -> tuple[re.Pattern[str], list[str]]:
    """Return the pattern of a printed line, and the example process ids that its groups capture.

    Args:
        shown: the line in the text. `...` stands for anything.
        vary: whether other numbers and durations match those in the text.
    """
    if shown == "...":
        return re.compile(""), []
    pattern = ""
    for part in _VARIABLE_PART.split(shown):
        if part == "...":
            pattern += ".*"
        elif _EXAMPLE_PID.fullmatch(part):
            pattern += r"(\d+)"
        elif vary and re.fullmatch(_DURATION, part):
            pattern += _DURATION
        elif vary and re.fullmatch(_NUMBER, part):
            pattern += _NUMBER
        else:
            pattern += re.escape(part)
    return re.compile(pattern), _EXAMPLE_PID.findall(shown)


@contextlib.contextmanager
def reading(home: Path) -> Iterator[Reader]:
    """Yield a reader, and stop the reader's servers at the end of the block."""
    reader = Reader(home)
    try:
        yield reader
    finally:
        reader.leave()
