"""Signals that a server handles from its start to the end of its process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def handle_signals(
    handler: Callable[[signal.Signals], object], *signals: signal.Signals
) -> Iterator[None]:
    """Call `handler` on the event loop for each of these signals.

    After the block the signals stay ignored.
    """
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(handler, signal.Signals(number))

    # `loop.add_signal_handler` would not do. When it removes a handler, the default action is
    # active for a moment. In that moment a second Ctrl-C would end a graceful shutdown with
    # another exit status, and a SIGTERM would kill the process.
    for each in signals:
        signal.signal(each, on_signal)
    try:
        yield
    finally:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
