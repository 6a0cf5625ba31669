"""Where the processes of `worker` start and exit: a worker, a probe and a trial.

A probe loads a handler to check it, and answers no query. The runner uses only this module of
`worker`: it passes these functions to the fork server.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import anyio

from shared.config.handlers import HandlerRef
from shared.errors import EXIT_FAILED, EXIT_OK, ConfigError
from shared.ipc import Launch
from shared.logs import logger as logs
from worker import output

# Other modules of `worker`, except `output`, are imported inside the functions, because the runner
# never needs them. A worker does not wait for these imports: the fork server has made them before
# the fork (`worker.preload`).

_F_SETSIG: Final = 10
"""From Linux's fcntl.h. The fcntl module has no name for it."""


def run(launch: Launch) -> None:
    """Run one worker until it has drained or failed. Ends the process.

    The exit status is 0 after a drain, 78 if the handler cannot be loaded or an OTEL_* variable is
    invalid, and 1 after any other failure.
    """
    # First, so that the worker cannot outlive its runner.
    _arm_exit_with_runner()
    from worker.main import Worker

    options = launch.spec.runner
    logs.configure(options.log_level, options.log_format, **launch.log_context)
    output.redirect_stdio()
    status = EXIT_FAILED
    try:
        worker = Worker(launch)
        status = anyio.run(worker.run, backend_options={"use_uvloop": True})
    except BaseException as exc:  # noqa: BLE001 - see below
        # Only an error of em-runner itself gets here. Without this, each line of its traceback
        # would be logged as a `printed` event. The runner restarts the worker.
        logs.get_logger().error("worker_fault", exc_info=exc)
    _exit(status)


def probe(ref: HandlerRef, pipe: Connection) -> None:
    """Load a handler and send `(capabilities, None)` or `(None, error)`. Ends the process."""
    _arm_exit_with_runner()
    from worker.dispatching.handler import load

    # A worker's logging and streams, because a handler may depend on them while it is imported.
    # Only errors are logged here. What else the import logs or prints is logged by each worker that
    # later imports the handler, with the worker's name.
    logs.configure("error", handler=str(ref))
    output.redirect_stdio()
    _send_result_and_exit(pipe, lambda: load(ref).capabilities)


def trial(
    ref: HandlerRef,
    text: str,
    memory: dict[str, Any],
    timeout_s: float,
    pipe: Connection,
) -> None:
    """Call a handler once, as `run_trial` does. Ends the process.

    The pipe gets what `run_trial` reports, then `(trial, None)` or `(None, error)`.
    """
    _arm_exit_with_runner()
    from worker.trial import run_trial

    logs.configure("warning", "console")
    _send_result_and_exit(
        pipe,
        lambda: run_trial(ref, text, memory, timeout_s, pipe.send),
    )


def _send_result_and_exit(
    pipe: Connection,
    compute: Callable[[], Any],
) -> None:
    """Send `(result, None)` or `(None, error)`, and end the process."""
    try:
        result = compute()
        pipe.send((result, None))
    except ConfigError as exc:
        pipe.send((None, str(exc)))
    pipe.close()
    _exit(EXIT_OK)


def _exit(status: int) -> None:
    output.finish()
    # Not `sys.exit`: the interpreter would wait for a thread of the handler that hangs, and run the
    # atexit hooks of the handler's libraries.
    os._exit(status)


def _arm_exit_with_runner() -> None:
    """Have the kernel kill this process as soon as its runner has ended.

    The runner holds the write end of a pipe, and this process the read end. The kernel sends
    SIGKILL when the write end closes. Only Linux has this (F_SETSIG, see fcntl(2)).
    """
    runner = multiprocessing.parent_process()
    if runner is None:
        return
    pipe = runner.sentinel
    # A thread or the event loop could not watch the pipe: a handler may hold the interpreter's lock
    # in C code for minutes. The process gets its own process group, and the signal goes to the
    # group. So it also ends the programs that the handler has started.
    os.setsid()
    fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    # The signal is sent only when the pipe changes. It would never come if the runner had ended
    # before the line above.
    if not runner.is_alive():
        os._exit(EXIT_FAILED)
