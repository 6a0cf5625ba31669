"""One worker process: its end, its exit status, and how it is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from typing import Final

import anyio

from runner.supervision.restarts import Failure

STATUS_TIMEOUT_S: Final = 2.0
"""How long the exit status of an ended process may take to arrive from the fork server.

It arrives at once, unless the machine is busy. Without it the cause of the end is unknown.
"""


class WorkerProcess:
    """One running worker process. Create it on the running event loop.

    Attributes:
        pid: its process ID.
        ended: set when the process has ended.
    """

    def __init__(self, process: ForkServerProcess) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self.ended = asyncio.Event()
        self._process = process
        # The kernel reports an end through a pidfd. The sentinel of multiprocessing will not do:
        # it is a pipe of the fork server, so it reports an end when the *fork server* dies. It is
        # watched only for a process that has no pidfd, because it has ended and the fork server has
        # already reaped it.
        self._pidfd: int | None = None
        with suppress(OSError):
            self._pidfd = os.pidfd_open(self.pid)
        self._watched = process.sentinel if self._pidfd is None else self._pidfd
        loop = asyncio.get_running_loop()
        loop.add_reader(self._watched, self._on_end)

    def _on_end(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._watched)
        self.ended.set()

    async def exit_failure(self) -> Failure:
        """Return what the exit status of the ended process means, also if its end was planned."""
        # The fork server reports the status a little later than the kernel reports the end.
        with anyio.move_on_after(STATUS_TIMEOUT_S):
            await anyio.wait_readable(self._process.sentinel)
        return Failure.from_exit(self._process.exitcode)

    def kill(self) -> None:
        """Kill the process with SIGKILL."""
        with suppress(ProcessLookupError):
            if self._pidfd is None:
                self._process.kill()
            else:
                # Unlike a process ID, a pidfd can never name a later process.
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def release(self) -> None:
        """Close an ended process, and kill what its handler left behind."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        release(self._process)


def release(process: ForkServerProcess) -> None:
    """Close an ended process, and kill what its handler left in its process group."""
    assert process.pid is not None
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    # Without its exit status a process cannot be closed yet. The garbage collector does it later.
    with suppress(ValueError):
        process.close()
