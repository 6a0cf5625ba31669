"""No worker outlives its runner, whatever its handler is doing.

The runner holds the write end of a pipe whose read end the worker has; the kernel is asked to kill
the worker, and what it has forked, when the last writer is gone. That works while a handler holds
the interpreter lock in C code for minutes, where a thread or the event loop would not come to run.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from typing import Final

_F_SETSIG: Final = 10  # from Linux's fcntl.h; the fcntl module does not name it


def leave_with_parent() -> None:
    """End this process as soon as its parent is gone. Without a parent process, do nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    pipe = parent.sentinel
    # A group of its own: what a handler forks belongs to its worker, and ends with it.
    os.setsid()
    if sys.platform == "linux":
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
        if not parent.is_alive():  # it went before the line above
            os._exit(1)
        return
    threading.Thread(target=_watch, args=(parent,), name="orphan", daemon=True).start()


def _watch(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
