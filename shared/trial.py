"""What became of one call of a handler, as `em-runner try` shows it."""

from __future__ import annotations

from typing import NamedTuple


class Trial(NamedTuple):
    """One call.

    Attributes:
        result: what a node would be sent, as JSON; None when the handler failed.
        memory: what the next query would get, as Python writes it.
        seconds: how long it took, from the query to the answer.
        error: why it failed, else empty.
    """

    result: bytes | None
    memory: str
    seconds: float
    error: str
