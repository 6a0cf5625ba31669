"""What em-runner logs, for tests that are about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from shared import logs


def nothing(logger: Any, method: str, event: Any) -> Any:
    """A processor that writes nothing."""
    raise structlog.DropEvent


@contextmanager
def chain(*processors: Any) -> Iterator[None]:
    """Have lines go through these processors."""
    before = logs.CHAIN.copy()
    logs.CHAIN[:] = processors
    try:
        yield
    finally:
        logs.CHAIN[:] = before


@contextmanager
def capture_logs() -> Iterator[list[Any]]:
    """Keep lines as dicts, and write none."""
    kept = structlog.testing.LogCapture()
    with chain(kept):
        yield kept.entries
