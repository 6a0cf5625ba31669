"""The fork server: a small process that has imported what a worker needs, and forks the workers.

It is started before the runner has threads or sockets, and again if it is found dead.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from types import ModuleType
from typing import Any, Final

import anyio
import anyio.to_thread

from runner.supervision._process import WorkerProcess
from shared.errors import StartError
from shared.ipc import Launch
from worker.entry import run

_SAFE_PATH: Final = "PYTHONSAFEPATH"


class ForkServer:
    """The one fork server of this runner. With `tracing` it also imports what tracing needs."""

    def __init__(self, *, tracing: bool = False) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # `worker.preload` comes last, because it ends with `gc.freeze()`. What is imported before
        # that stays in memory pages that all workers share.
        tracing_modules = ["worker.preload_tracing"] if tracing else []
        self._context.set_forkserver_preload([*tracing_modules, "worker.preload"])
        self._one_at_a_time = anyio.CapacityLimiter(1)
        # A reload probes handlers on one thread while another thread starts a worker.
        self._starting = threading.Lock()

    def start(self) -> None:
        """Start the fork server unless it runs. Call it before there are threads or sockets.

        Raises:
            StartError: if it cannot be started.
        """
        # multiprocessing has each child change to the current folder. That folder may have been
        # removed, or be forbidden, such as root's home after `runuser`.
        if not os.access(".", os.X_OK) or os.stat(".").st_nlink == 0:
            os.chdir("/")
        try:
            with _isolated_imports():
                multiprocessing.forkserver.ensure_running()
        except OSError as exc:
            # The path of its Unix socket is too long, or the user has too many processes.
            raise StartError(
                f"the fork server cannot be started: {exc}; is TMPDIR too long a path?"
            ) from None

    async def spawn(self, launch: Launch) -> WorkerProcess:
        """Start a worker.

        Raises:
            StartError: if no process can be started.
        """
        # On a thread, because a fork server that has died is started again first, and that takes
        # as long as its imports. One thread at a time, because forks wait for each other anyway.
        try:
            process = await anyio.to_thread.run_sync(
                self.fork,
                run,
                (launch,),
                launch.spec.name,
                limiter=self._one_at_a_time,
            )
        except RuntimeError as exc:  # no thread can be started
            raise StartError(f"no process could be started: {exc}") from None
        return WorkerProcess(process)

    def fork(
        self,
        target: Callable[..., None],
        arguments: tuple[Any, ...],
        name: str,
    ) -> ForkServerProcess:
        """Start a process that calls `target`.

        Raises:
            StartError: if no process can be started (limits, memory, a fork server that died).
        """
        # Not a daemon in multiprocessing's sense: a daemon may have no children, a handler may.
        process = self._context.Process(target=target, args=arguments, name=name)
        try:
            with self._starting, _isolated_imports():
                process.start()
        except (OSError, EOFError) as exc:
            reason = str(exc) or "the fork server died"
            raise StartError(
                f"no process could be started: {reason}; may this user execute {sys.executable}, "
                "and have another process?"
            ) from None
        return process


@contextmanager
def _isolated_imports() -> Iterator[None]:
    """Keep new processes from importing the runner or modules of the current folder."""
    # multiprocessing sends each child the name or file of the program's main module, and the child
    # imports it. For a worker that would be the whole runner. No public setting turns this off, so
    # the main module is an empty one while a process is started.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    # The fork server is `python -c`, which looks for modules in the current folder first: a user's
    # worker.py would be imported instead of the package `worker`. This variable is for the fork
    # server alone. `worker.preload` removes it there, so that workers do not inherit it.
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[_SAFE_PATH]
        sys.modules["__main__"] = main
