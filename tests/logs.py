"""Captures em-runner's log lines, for tests of logging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from shared.logs import logger as logs


def drop(logger: Any, method: str, event: Any) -> Any:
    """Drop every log line. This is a processor for `use_processors`."""
    raise structlog.DropEvent


@contextmanager
def use_processors(*processors: Any) -> Iterator[None]:
    """Send log lines of every level through these processors, until the end of the block."""
    before = logs.use(logs.Logging("debug", processors))
    try:
        yield
    finally:
        logs.use(before)


@contextmanager
def capture_logs() -> Iterator[list[Any]]:
    """Collect log lines as dicts instead of writing them."""
    captured = structlog.testing.LogCapture()
    with use_processors(captured):
        yield captured.entries
