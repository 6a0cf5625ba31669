"""Where a worker process begins. The runner names these three and imports no more of a worker than this.

What a worker needs is imported by the fork server, once, while the runner still imports its own.
"""

from __future__ import annotations

from multiprocessing.connection import Connection as Pipe
from typing import Any

from shared.handlers import HandlerRef
from shared.ipc import Launch


def run(launch: Launch) -> None:
    """Be one worker until told to leave; see `worker.main.run`."""
    from worker.main import run as be_worker

    be_worker(launch)


def probe(ref: HandlerRef, pipe: Pipe) -> None:
    """Load a handler and say how it went; see `worker.main.probe`."""
    from worker.main import probe as load_and_tell

    load_and_tell(ref, pipe)


def trial(ref: HandlerRef, text: str, memory: dict[str, Any], timeout_s: float, pipe: Pipe) -> None:
    """Call a handler once and say what came of it; see `worker.main.trial`."""
    from worker.main import trial as call_and_tell

    call_and_tell(ref, text, memory, timeout_s, pipe)
