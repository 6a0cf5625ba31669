"""Starts, signals and reaps worker processes, by way of a fork server.

The fork server is a small process that has imported what a worker needs; a worker is a fork of it.
It is started before the runner has threads or sockets, and again whenever it is found dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from types import ModuleType
from typing import Any, Final

import anyio
import anyio.to_thread

from shared.errors import ConfigError, StartError
from shared.handlers import HandlerRef
from shared.ipc import Launch
from shared.logs import get_logger
from shared.trial import IMPORTING, Phase, Trial
from worker.entry import probe, run, trial  # the worker's entry points: the only line of the runner that knows them

PRELOAD: Final = "worker.preload"
PRELOAD_TRACING: Final = "worker.preload_tracing"
SAFE_PATH: Final = "PYTHONSAFEPATH"
PROBE_TIMEOUT_S: Final = 60.0
SLOW_IMPORT_S: Final = 5.0
"""How long an import may take before whoever waits for it is told."""

STOP_GRACE_S: Final = 2.0
"""How much later than the process itself a call that is tried out is taken to hang."""

_STATUS_TIMEOUT_S: Final = 0.2
_UNKNOWN_STATUS: Final = 255  # what multiprocessing says when the fork server took the status with it


class SpawnError(Exception):
    """A process could not be started; the text says why."""


class ForkServer:
    """The one fork server of this runner. With `tracing` it has imported what that needs, too."""

    def __init__(self, *, tracing: bool = False) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD_TRACING, PRELOAD] if tracing else [PRELOAD])
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._probes: set[ForkServerProcess] = set()
        self._probes_lock = threading.Lock()
        self._pid: int | None = None
        self._starting = threading.Lock()  # a reload probes handlers on one thread while another starts a worker

    def start(self) -> None:
        """Start the fork server, unless it runs. Call it before there are threads or sockets.

        Raises:
            StartError: when it cannot be started.
        """
        if not _can_be_entered("."):  # such as root's home, by `runuser`: multiprocessing has each child enter it
            os.chdir("/")
        try:
            with _nameless_main():
                multiprocessing.forkserver.ensure_running()
            self._look_who()
        except OSError as exc:  # its socket's path is too long, or there is no process to be had
            raise StartError(f"the fork server cannot be started: {exc}; is TMPDIR too long a path?") from None

    async def spawn(self, launch: Launch) -> WorkerProcess:
        """Fork a worker.

        Raises:
            SpawnError: when there is no process to be had (limits, memory, a fork server that died meanwhile).
        """
        try:
            process = await anyio.to_thread.run_sync(
                self._start_process, run, (launch,), launch.spec.name, limiter=self._one_at_a_time
            )
        except (OSError, EOFError, RuntimeError) as exc:  # a thread may be refused too
            raise SpawnError(f"no process could be started: {exc or 'the fork server died'}") from None
        return WorkerProcess(process)

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        """Load a handler in a process of its own and return the capabilities that it names.

        Raises:
            ConfigError: when it cannot be loaded, or takes more than a minute.
        """
        return tuple(self._ask(probe, (ref,), f"the handler {ref} is not imported after", PROBE_TIMEOUT_S))

    def try_out(
        self, ref: HandlerRef, text: str, memory: dict[str, Any], timeout_s: float, tell: Callable[[str], None]
    ) -> Trial:
        """Call a handler once in a process of its own. One that hangs or ends its process has failed.

        `tell` is told when its import takes long.

        Raises:
            ConfigError: when it cannot be loaded.
        """
        phase, told = IMPORTING, Trial(None, repr(memory), None, "")
        with self._probing(trial, (ref, text, memory, timeout_s)) as (process, receiver):
            try:
                while _heard(receiver, phase, timeout_s, tell):
                    news = receiver.recv()
                    if isinstance(news, Phase):
                        phase = news
                    elif isinstance(news, Trial):
                        told = news
                    else:
                        trial_found: Trial = _found(*news)
                        return trial_found
                process.kill()
                error = f"{phase.words} has not ended after {PROBE_TIMEOUT_S if phase == IMPORTING else timeout_s:g} s"
                if phase.on_loop:
                    error += ", and keeps the event loop: an 'async def' must not compute or sleep without 'await',"
                    error += " nor catch CancelledError"
            except EOFError:
                process.join()
                error = f"{phase.words} has ended its process: {_how(process.exitcode)}"
        if phase == IMPORTING:
            raise ConfigError(f"the handler {ref}: {error}")
        return told._replace(error=error)

    def _ask(self, target: Callable[..., None], arguments: tuple[Any, ...], late: str, timeout_s: float) -> Any:
        """Run `target` in a process that loads a handler, and return what it sends."""
        with self._probing(target, arguments) as (process, receiver):
            try:
                if not receiver.poll(timeout_s):
                    raise ConfigError(f"{late} {timeout_s:.0f} s")
                return _found(*receiver.recv())
            except EOFError:
                process.join()
                raise ConfigError(
                    f"the handler {arguments[0]} ended the process that imported it: {_how(process.exitcode)}"
                ) from None

    @contextlib.contextmanager
    def _probing(
        self, target: Callable[..., None], arguments: tuple[Any, ...]
    ) -> Iterator[tuple[ForkServerProcess, Connection]]:
        """Run `target` in a process of its own, whose last argument is a pipe to the receiver."""
        receiver, sender = self._context.Pipe(duplex=False)
        process: ForkServerProcess | None = None
        try:
            try:
                process = self._start_process(target, (*arguments, sender), _probe_name(arguments[0]))
            except (OSError, EOFError) as exc:
                why = str(exc) or "the fork server died"
                raise StartError(
                    f"no process could be started: {why}; may this user execute {sys.executable}, "
                    "and have another process?"
                ) from None
            with self._probes_lock:
                self._probes.add(process)
            sender.close()
            try:
                yield process, receiver
            except BaseException:  # Ctrl-C too: multiprocessing would wait for the import at the end
                process.kill()
                raise
            process.join()
        finally:
            if process is not None and process.pid is not None:
                with contextlib.suppress(OSError):  # what its handler has started is in its group, and in no other
                    os.killpg(process.pid, signal.SIGKILL)
                with self._probes_lock:  # from here on nobody else has it
                    self._probes.discard(process)
                process.join(_STATUS_TIMEOUT_S)
                with contextlib.suppress(ValueError):  # it still ends; the collector closes it later
                    process.close()
            receiver.close()
            sender.close()

    def abandon_probes(self, ref: HandlerRef | None = None) -> None:
        """End the processes that still load handlers, or this handler: nobody waits for what they find."""
        with self._probes_lock:
            for process in self._probes:
                if ref is None or process.name == _probe_name(ref):
                    process.kill()

    def _start_process(self, target: Callable[..., None], arguments: tuple[Any, ...], name: str) -> ForkServerProcess:
        # Not a daemon in multiprocessing's sense: those may have no children, and handlers may want some.
        process = self._context.Process(target=target, args=arguments, name=name)
        with self._starting, _nameless_main():
            process.start()
            self._look_who()
        return process

    def _look_who(self) -> None:
        """Log it when there is another fork server than before. multiprocessing starts one when it finds none."""
        pid = getattr(getattr(multiprocessing.forkserver, "_forkserver", None), "_forkserver_pid", None)
        if self._pid is not None and pid != self._pid:
            why = "the one before was killed or ended; the workers that it had started go on"
            get_logger("supervisor").warning("fork_server_restarted", pid=pid, before=self._pid, why=why)
        self._pid = pid


class WorkerProcess:
    """One running worker process."""

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self._process = process
        # The process's own sentinel belongs to the fork server and reports an end when *that* dies;
        # a pidfd belongs to the kernel. Where there is none, the sentinel has to do.
        self._pidfd: int | None = None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # it has ended already, or no descriptor is left
                self._pidfd = os.pidfd_open(self.pid)
        self._ended = asyncio.Event()
        self._watched = self._process.sentinel if self._pidfd is None else self._pidfd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._watched, self._end)

    def _end(self) -> None:
        self._loop.remove_reader(self._watched)
        self._ended.set()

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have ended."""
        return self._ended.is_set()

    async def ended(self) -> None:
        """Wait until the process has ended."""
        await self._ended.wait()

    async def how(self) -> str:
        """Return how the ended process ended, in words."""
        with anyio.move_on_after(_STATUS_TIMEOUT_S):
            await _readable(self._process.sentinel)
        status = self._process.exitcode
        return _how(status)

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                self._process.kill()

    def release(self) -> None:
        """Let go of what was kept of an ended process, and end what its handler has left in its group."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        with contextlib.suppress(ValueError):  # its status is still on the way; the collector takes it later
            self._process.close()


def _can_be_entered(folder: str) -> bool:
    """Return whether a folder can be entered: it may be forbidden, and the current one may have been removed."""
    return os.path.exists(folder) and os.access(folder, os.X_OK) and os.stat(folder).st_nlink > 0


def _heard(receiver: Connection, phase: Phase, timeout_s: float, tell: Callable[[str], None]) -> bool:
    """Wait for news of a call that is tried out; return whether there are any."""
    if phase != IMPORTING:
        return receiver.poll(timeout_s + STOP_GRACE_S)
    if receiver.poll(SLOW_IMPORT_S):
        return True
    tell(f"{phase.words} has not ended after {SLOW_IMPORT_S:g} s; it is given up after {PROBE_TIMEOUT_S:g} s")
    return receiver.poll(PROBE_TIMEOUT_S - SLOW_IMPORT_S)


def _how(status: int | None) -> str:
    if status is None or status == _UNKNOWN_STATUS:
        return "status unknown"
    return f"killed by {_signal_name(-status)}" if status < 0 else f"exit status {status}"


def _found(found: Any, error: str | None) -> Any:
    if error is not None:
        raise ConfigError(error)
    return found


async def _readable(fd: int) -> None:
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(fd)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _probe_name(ref: HandlerRef) -> str:
    return f"probe {ref}"


@contextlib.contextmanager
def _nameless_main() -> Iterator[None]:
    """Keep multiprocessing from importing the program's main module, and all the runner with it, in each child."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    # The fork server is `python -c`, which looks in the current folder first: a user's worker.py would be ours.
    safe_path = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if safe_path is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = safe_path
