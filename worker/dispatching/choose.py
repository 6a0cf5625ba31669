"""Chooses where a handler runs."""

from __future__ import annotations

from worker.dispatching._loop_dispatcher import LoopDispatcher
from worker.dispatching._thread_dispatcher import ThreadDispatcher
from worker.dispatching.dispatch import Dispatcher, DispatcherOptions
from worker.dispatching.handler import Handler
from worker.memory.base import Memory

_DEFAULTS = DispatcherOptions()


def create_dispatcher(
    handler: Handler,
    memory: Memory,
    options: DispatcherOptions = _DEFAULTS,
) -> Dispatcher:
    """Return a dispatcher that fits the handler. See `Dispatcher` for the arguments."""
    dispatcher_class = LoopDispatcher if handler.is_async else ThreadDispatcher
    return dispatcher_class(handler, memory, options)
