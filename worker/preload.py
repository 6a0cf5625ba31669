"""What the fork server imports: all that a worker needs, so that starting one is a fork and no more.

Never a user's handler: that is loaded in the worker, where its faults belong.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.spawn  # noqa: F401 - the child's own entry imports it otherwise
import os
import signal

import anyio._backends._asyncio  # noqa: F401 - as above
import uvloop  # noqa: F401 - as above

import worker.main  # noqa: F401 - as above
from worker.rehearsal import rehearse

# Set for the fork server alone, so that it takes no module from the current folder; handlers may.
os.environ.pop("PYTHONSAFEPATH", None)

# Ctrl-C and a hang-up reach every process of a terminal, but how a cluster ends is the runner's to say. Set
# here, because a worker would be open to it between its fork and its own first line.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)

with contextlib.suppress(Exception):  # it spares time and memory, and must never cost a start
    rehearse()

# What is imported here never becomes garbage; keeping the collector off it keeps its pages shared.
gc.collect()
gc.freeze()
