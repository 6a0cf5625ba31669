"""A reader who does what a page says: writes its files, runs its commands, and looks whether it is as shown.

The ports of the text are taken for others that are held for it, here and there and back in what is printed; the home
folder is the page's own. All that was started is ended by its id.
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
from tests.ports import held_port, held_ports

LIMIT_S = 30.0
POLL_S = 0.05
BIN = Path(sys.executable).parent
PORTS = ("9600", "8080", "8081")
_PORT = re.compile(r"(?<![\d.])(?:" + "|".join(PORTS) + r")(?!\d)")
_EXAMPLE_PID = re.compile(r"(?<!\d)41\d\d(?!\d)")
"""Process ids in the text are 41xx: what is printed in that place is meant wherever the text says it again."""

_DEFAULTS = (
    (re.compile(r"(scripts/run_cluster\.sh|em-runner demo)(?!.*--)"), "--first-port 8080 --http 127.0.0.1:9600"),
    (re.compile(r"(em-runner run|scripts/run_cluster\.sh -c \S+)(?!.*--http)"), "--http 127.0.0.1:9600"),
)
"""Commands that have ports without naming them, and the options that name them."""


@dataclass
class Server:
    """A command that runs in a terminal of its own."""

    command: str
    process: subprocess.Popen[bytes]
    output: Path

    def family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def stop(self) -> int:
        """Do what Ctrl-C does, and return how it ended."""
        family = self.family()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(LIMIT_S)
        finally:
            for each in family:  # by id, and only what this command started
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


class Reader:
    """Somebody at a terminal, in a folder where nothing is yet."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ran: list[Command] = []
        self._servers: list[Server] = []
        self._held = contextlib.ExitStack()
        self._ports = self._hold_ports()
        self._pids: dict[str, str] = {}
        self._here = home
        self._terminal = "1"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("EM_", "VIRTUAL_ENV"))}
        self._environ = inherited | {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "160"}
        self._environ.pop("PYTHONPATH", None)

    def take(self, block: Block) -> None:
        """Take one step."""
        if block.language == "checkout":
            self._here = self.check_out()
        elif block.language == "stop":
            self._stop(block)
        elif block.not_run is not None:
            if any(command.text.startswith("git clone") for command in block.commands_if_console):
                self.check_out()
        elif block.file is not None:
            self._write(block, block.file)
        elif block.language == "console":
            self._terminal = block.terminal or self._terminal
            *before, last = block.commands
            self.ran += block.commands
            for command in before:
                self._run(block, command)
            if block.until is None:
                self._run(block, last)
            else:
                self._start(last, block.until, f"{block.where}: $ {last.text}")

    def check_out(self) -> Path:
        """Make what `git clone` would, of links."""
        folder = self.home / "em-runner"
        folder.mkdir()
        for each in ROOT.iterdir():
            (folder / each.name).symlink_to(each)
        return folder

    def written(self, name: str) -> Path:
        """Return where a file of that name is."""
        return Path(name.replace("~", str(self.home), 1)) if name.startswith("~") else self._cwd / name

    def leave(self) -> None:
        """End what still runs."""
        for server in self._servers:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed then; the others have their turn
                server.stop()
        self._servers.clear()
        self._held.close()

    def _hold_ports(self) -> dict[str, str]:
        """Return a port for each of the text. Those of its nodes are neighbours there, and so they are here."""
        http, nodes = self._held.enter_context(held_port()), self._held.enter_context(held_ports(len(PORTS) - 1))
        return dict(zip(PORTS, map(str, [http, *nodes]), strict=True))

    @property
    def _memory(self) -> Path:
        """Where a terminal keeps its folder and its variables from command to command."""
        return self.home / f".terminal-{self._terminal}"

    @property
    def _cwd(self) -> Path:
        where = self._memory / "pwd"
        return Path(where.read_text().strip()) if where.exists() else self._here

    def _write(self, block: Block, name: str) -> None:
        path = self.written(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._here_for(block.text))

    def _stop(self, block: Block) -> None:
        [name] = block.lines
        server = next(
            (each for each in self._servers if each.command.startswith(name) and each.process.poll() is None), None
        )
        assert server is not None, f"{block.where}: nothing like {name!r} runs"
        self._servers.remove(server)
        status = server.stop()
        assert status == 0, f"{block.where}: {name} ended with {status}\n{server.output.read_text()[-3000:]}"

    def _run(self, block: Block, command: Command) -> None:
        where = f"{block.where}: $ {command.text}"
        ends = time.monotonic() + LIMIT_S
        while True:
            status, printed = self._call(command.text, where)
            wrong = self._objection(block, command, status, printed)
            if wrong is None:
                return
            if not block.again or time.monotonic() > ends:
                raise AssertionError(f"{where}\n{wrong}; it ended with {status} and printed\n{printed}{self._logs()}")
            time.sleep(POLL_S)

    def _call(self, text: str, where: str) -> tuple[int, str]:
        self._memory.mkdir(exist_ok=True)
        memory = shlex.quote(str(self._memory))
        after = f"status=$?; pwd > {memory}/pwd; {{ export -p; echo umask $(umask); }} > {memory}/environ; exit $status"
        script = f"{self._before()}{self._here_for(_explicit(text))}\n{after}"
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
                printed, _ = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"{where}\ndoes not end; is it a server?") from None
        return process.returncode, self._as_in_the_text(printed.decode(errors="replace"))

    def _start(self, command: Command, until: str, where: str) -> None:
        output = self.home / f".server-{len(list(self.home.glob('.server-*')))}"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                ["bash", "-c", self._before() + self._here_for(_explicit(command.text))],
                cwd=self._cwd,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        server = Server(command.text, process, output)
        self._servers.append(server)
        ends = time.monotonic() + LIMIT_S
        while True:
            printed = self._as_in_the_text(output.read_text(errors="replace"))
            if until in printed and self._missing(command.shown, printed, vary=True) is None:
                return
            assert process.poll() is None, f"{where}\nended with {process.returncode}\n{printed}"
            assert time.monotonic() < ends, f"{where}\ndid not print {until!r} and what is shown, but\n{printed}"
            time.sleep(POLL_S)

    def _before(self) -> str:
        environ = self._memory / "environ"
        return f". {shlex.quote(str(environ))}\n" if environ.exists() else ""

    def _objection(self, block: Block, command: Command, status: int, printed: str) -> str | None:
        if status != block.status:
            return f"the status is not {block.status}"
        return self._missing(command.shown, printed, vary=block.numbers_vary)

    def _missing(self, shown: list[str], printed: str, *, vary: bool) -> str | None:
        """Return what is wrong when the lines shown are not among those printed, in their order."""
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

    def _here_for(self, text: str) -> str:
        """Return a command or a file of the text with the ports and process ids of this reader."""
        text = _PORT.sub(lambda found: self._ports[found[0]], text)
        return _EXAMPLE_PID.sub(lambda found: self._pids.get(found[0], found[0]), text)

    def _as_in_the_text(self, printed: str) -> str:
        for told, port in self._ports.items():
            printed = re.sub(rf"(?<!\d){port}(?!\d)", told, printed)
        return printed.replace(str(self.home), "~")

    def _logs(self) -> str:
        return "".join(f"\n--- {s.command}\n{s.output.read_text(errors='replace')[-3000:]}" for s in self._servers)


def _explicit(command: str) -> str:
    """Return a command with the ports named that it would take otherwise."""
    for takes_ports, options in _DEFAULTS:
        command = takes_ports.sub(lambda found, options=options: f"{found[1]} {options}", command)
    return command


def _pattern(shown: str, vary: bool) -> tuple[re.Pattern[str], list[str]]:
    """Return what a printed line must be, and the example ids whose places it captures."""
    if shown == "...":
        return re.compile(""), []
    text, pids = "", _EXAMPLE_PID.findall(shown)
    for part in re.split(r"(\.\.\.|(?<!\d)41\d\d(?!\d)|\d+(?:\.\d+)? [um]s\b|\d+(?:\.\d+)?)", shown):
        if part == "...":
            text += ".*"
        elif _EXAMPLE_PID.fullmatch(part):
            text += r"(\d+)"
        elif vary and re.fullmatch(r"\d+(?:\.\d+)? [um]s", part):
            text += r"\d+(?:\.\d+)? [um]s"
        elif vary and re.fullmatch(r"\d+(?:\.\d+)?", part):
            text += r"\d+(?:\.\d+)?"
        else:
            text += re.escape(part)
    return re.compile(text), pids


@contextlib.contextmanager
def reading(home: Path) -> Iterator[Reader]:
    """Have a reader who leaves nothing behind."""
    reader = Reader(home)
    try:
        yield reader
    finally:
        reader.leave()
