"""Chooses where a handler runs."""

from __future__ import annotations

from shared.ipc import Counters
from worker.dispatch import Dispatcher
from worker.handler import Handler
from worker.loop_dispatcher import LoopDispatcher
from worker.memory import Memory
from worker.thread_dispatcher import ThreadDispatcher


def dispatcher_for(
    handler: Handler, memory: Memory, counters: Counters, concurrency: int = 1, timeout_s: float | None = None
) -> Dispatcher:
    """Return the dispatcher that a handler's kind asks for; see `Dispatcher` for the arguments."""
    kind = LoopDispatcher if handler.is_async else ThreadDispatcher
    return kind(handler, memory, counters, concurrency, timeout_s)
