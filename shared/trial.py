"""The result of one trial call of a handler, for `em-runner try`."""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class EncodingFault(Enum):
    """Why a result cannot be encoded as JSON.

    Attributes:
        NOT_AWAITED: it is a coroutine.
        LONE_SURROGATE: a string in it has a lone surrogate.
        TOO_DEEP: it contains itself, or is nested too deeply.
        NOT_JSON: JSON has no such values, or no such keys.
    """

    NOT_AWAITED = auto()
    LONE_SURROGATE = auto()
    TOO_DEEP = auto()
    NOT_JSON = auto()


class Trial(NamedTuple):
    """One call.

    Attributes:
        result: the result as JSON, which a node would receive; None if the handler failed.
        memory: the `repr` of the memory that the next query would get.
        seconds: the time from the query to the answer; None without an answer.
        error: why the call failed; None if it succeeded.
        fault: why the result is not JSON, if that is why the call failed.
        notes: what may surprise the handler's author, although the call succeeded.
    """

    result: bytes | None
    memory: str
    seconds: float | None = None
    error: str | None = None
    fault: EncodingFault | None = None
    notes: tuple[str, ...] = ()


class Phase(Enum):
    """A step of a trial.

    The trial's process sends each phase before the phase starts. If the process then hangs or ends,
    the last phase that arrived names the cause.

    Attributes:
        IMPORTING: the handler's module is imported.
        SETTING_UP: its `setup` runs.
        HANDLING: the handler runs.
        HANDLING_ASYNC: it runs as an `async def`. If that hangs, it blocks its event loop, and the
            error says so.
        SHOWING: the `repr` of the memory is made.
        CLOSING: its `close` runs.
    """

    IMPORTING = auto()
    SETTING_UP = auto()
    HANDLING = auto()
    HANDLING_ASYNC = auto()
    SHOWING = auto()
    CLOSING = auto()
