"""Signals that a server obeys, from its start to the end of its process."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def obeyed(*numbers: signal.Signals, by: Callable[[signal.Signals], Any]) -> Iterator[None]:
    """Have the running event loop call `by` for each of these signals; behind the `with` they are ignored for good.

    Not by the loop's own signal handlers: whoever gives those back has the defaults for a moment, in which an
    impatient second Ctrl-C ends an orderly end with another exit status, or a SIGTERM with none.
    """
    loop = asyncio.get_running_loop()

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(by, signal.Signals(number))

    for number in numbers:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
