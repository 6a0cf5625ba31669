"""Loads handlers in separate processes, to check them and to get their capabilities.

The runner itself never imports a handler, because an import may hang or end its process.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any, Final

from runner.supervision._process import STATUS_TIMEOUT_S, release
from runner.supervision.fork_server import ForkServer
from runner.supervision.restarts import Failure
from shared.config.handlers import HandlerRef
from shared.errors import ConfigError
from shared.trial import Phase, Trial
from worker.entry import probe, trial

PROBE_TIMEOUT_S: Final = 60.0
"""How long an import may take."""

SLOW_IMPORT_S: Final = 5.0
"""How long an import may take before it is reported as slow."""

_STOP_GRACE_S: Final = 2.0
"""The time between a call's own timeout and the report that it hangs."""

_STEPS: Final = {
    Phase.IMPORTING: "its import",
    Phase.SETTING_UP: "setup()",
    Phase.HANDLING: "handle()",
    Phase.HANDLING_ASYNC: "handle()",
    Phase.SHOWING: "the memory's __repr__ or __reduce__",
    Phase.CLOSING: "close()",
}
"""Each phase as the subject of a message."""


class Probes:
    """The processes that load handlers. Its methods may be called on any thread."""

    def __init__(self, fork_server: ForkServer) -> None:
        self._fork_server = fork_server
        self._processes: dict[ForkServerProcess, HandlerRef] = {}
        self._lock = threading.Lock()

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        """Load a handler and return its capabilities.

        Raises:
            ConfigError: if it cannot be loaded, or takes more than a minute.
            StartError: if no process can be started.
        """
        with self._running(probe, ref) as (process, receiver):
            try:
                if not receiver.poll(PROBE_TIMEOUT_S):
                    late = f"is not imported after {PROBE_TIMEOUT_S:.0f} s"
                    raise ConfigError(f"the handler {ref} {late}")
                return tuple(_unwrap(*receiver.recv()))
            except EOFError:
                ended = f"ended the process that imported it: {_status(process)}"
                raise ConfigError(f"the handler {ref} {ended}") from None

    def try_out(
        self,
        ref: HandlerRef,
        text: str,
        memory: dict[str, Any],
        timeout_s: float,
        report: Callable[[str], None],
    ) -> Trial:
        """Call a handler once. A call that hangs or ends its process has failed.

        Args:
            ref: the handler.
            text, memory: its arguments.
            timeout_s: how long it may take.
            report: gets a message if the import takes long.

        Raises:
            ConfigError: if it cannot be loaded.
            StartError: if no process can be started.
        """
        # What is known so far. It is the result if the process ends without a further message.
        phase = Phase.IMPORTING
        latest = Trial(None, repr(memory))
        with self._running(trial, ref, text, memory, timeout_s) as (process, receiver):
            try:
                while _wait_for_message(receiver, phase, timeout_s, report):
                    message = receiver.recv()
                    if isinstance(message, Phase):
                        phase = message
                    elif isinstance(message, Trial):
                        latest = message
                    else:
                        result: Trial = _unwrap(*message)
                        return result
                process.kill()
                error = _late(phase, timeout_s)
            except EOFError:
                error = f"{_STEPS[phase]} has ended its process: {_status(process)}"
        if phase is Phase.IMPORTING:
            raise ConfigError(f"the handler {ref}: {error}")
        return latest._replace(error=error)

    def kill(self, ref: HandlerRef | None = None) -> None:
        """Kill the processes that still load this handler; without an argument, all of them."""
        with self._lock:
            for process, loading in self._processes.items():
                if ref in (None, loading):
                    process.kill()

    @contextmanager
    def _running(
        self,
        target: Callable[..., None],
        ref: HandlerRef,
        *arguments: Any,
    ) -> Iterator[tuple[ForkServerProcess, Connection]]:
        """Run `target` in a process. Its last argument is a pipe to the receiver."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        with receiver, sender:
            process = self._fork_server.fork(
                target,
                (ref, *arguments, sender),
                f"probe {ref}",
            )
            with self._lock:
                self._processes[process] = ref
            try:
                # Without this end, the receiver gets an EOFError as soon as the process ends.
                sender.close()
                yield process, receiver
                process.join()
            except BaseException:
                # Also at Ctrl-C: at its exit, multiprocessing waits for every process that runs.
                process.kill()
                raise
            finally:
                # In this order: `kill` must not kill a process that is closed already.
                with self._lock:
                    del self._processes[process]
                process.join(STATUS_TIMEOUT_S)
                release(process)


def _wait_for_message(
    receiver: Connection,
    phase: Phase,
    timeout_s: float,
    report: Callable[[str], None],
) -> bool:
    """Wait for the next message about a call; return False if none comes in time."""
    # A call has its own timeout in its process. A process that is silent after that hangs in code
    # that nothing can cancel.
    if phase is not Phase.IMPORTING:
        return receiver.poll(timeout_s + _STOP_GRACE_S)
    if receiver.poll(SLOW_IMPORT_S):
        return True
    late = f"{_STEPS[phase]} has not ended after {SLOW_IMPORT_S:g} s"
    report(f"{late}; it is stopped after {PROBE_TIMEOUT_S:g} s")
    return receiver.poll(PROBE_TIMEOUT_S - SLOW_IMPORT_S)


def _late(phase: Phase, timeout_s: float) -> str:
    limit_s = PROBE_TIMEOUT_S if phase is Phase.IMPORTING else timeout_s
    error = f"{_STEPS[phase]} has not ended after {limit_s:g} s"
    if phase is Phase.HANDLING_ASYNC:
        error += (
            ", and blocks the event loop: an 'async def' must not compute or sleep without "
            "'await', nor catch CancelledError"
        )
    return error


def _status(process: ForkServerProcess) -> str:
    process.join()
    return Failure.from_exit(process.exitcode).reason


def _unwrap(found: Any, error: str | None) -> Any:
    if error is not None:
        raise ConfigError(error)
    return found
