"""What the fork server imports: all that a worker needs, so that its start is only a fork.

It never imports a user's handler. Each worker loads its handler, so that a fault in it ends only
that worker.
"""

from __future__ import annotations

import contextlib
import gc

# This and the other unused imports are for the forked processes, which need not import them again.
import multiprocessing.spawn  # noqa: F401
import os
import signal

import uvloop  # noqa: F401

import worker.entry
import worker.main
import worker.trial  # noqa: F401
from worker.warm_up import warm_up

# The runner sets it, so that the fork server imports no module from the current folder. A handler
# may import such modules.
os.environ.pop("PYTHONSAFEPATH", None)

# Ctrl-C and SIGHUP reach all processes of a terminal, but only the runner decides when a worker
# ends. The fork server ignores them, and workers inherit that. If each worker ignored them itself,
# they could end it between its fork and its first line.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)

# This also imports what anyio imports only when a loop starts. It only saves time and memory, so a
# failure must not prevent the start.
with contextlib.suppress(Exception):
    warm_up()

# What is imported here never becomes garbage. If a collector in a worker visited these objects, it
# would write to their pages, and each worker would have its own copy of them.
gc.collect()
gc.freeze()
