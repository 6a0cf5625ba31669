"""What became of one call of a handler, as `em-runner try` shows it."""

from __future__ import annotations

from typing import NamedTuple


class Trial(NamedTuple):
    """One call.

    Attributes:
        result: what a node would be sent, as JSON; None when the handler failed.
        memory: what the next query would get, as Python writes it.
        seconds: how long it took, from the query to the answer; None when there was none.
        error: why it failed, else empty.
        notes: what would surprise its author, though it did not fail.
    """

    result: bytes | None
    memory: str
    seconds: float | None
    error: str
    notes: tuple[str, ...] = ()


class Phase(NamedTuple):
    """What is being done with a handler: told before it begins, so that who waits knows where it hangs or ends.

    `on_loop`: an `async def` is called, which holds up its event loop when it does not wait.
    """

    words: str
    on_loop: bool = False


IMPORTING = Phase("its import")
SETTING_UP = Phase("setup()")
ASKING = Phase("handle()")
ASKING_ASYNC = Phase("handle()", on_loop=True)
SHOWING = Phase("what shows the memory, its __repr__ or __reduce__,")
CLOSING = Phase("close()")
