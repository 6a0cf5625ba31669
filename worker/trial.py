"""Calls a handler once, as a worker would, and says what came of it."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, Final

import anyio
import msgspec

from shared.handlers import HandlerRef
from shared.ipc import Counters, Outcome
from shared.logs import get_logger
from shared.trial import ASKING, ASKING_ASYNC, CLOSING, IMPORTING, SETTING_UP, SHOWING, Phase, Trial
from worker.dispatchers import dispatcher_for
from worker.handler import Handler, load
from worker.jobs import Answer, Job
from worker.memory import RamMemory
from worker.results import HandlerFault, encode_result

_DEEPEST: Final = 50

Tell = Callable[[Phase | Trial], None]


def attempt(ref: HandlerRef, text: str, memory: dict[str, Any], timeout_s: float, tell: Tell) -> Trial:
    """Load a handler, set it up, ask it `text` with `memory`, close it.

    `tell` gets each phase before it begins, and what came of the query before the handler is closed.

    Raises:
        ConfigError: when it cannot be loaded.
    """
    tell(IMPORTING)
    return anyio.run(_ask, load(ref), text, memory, timeout_s, tell, backend_options={"use_uvloop": True})


class _Asker:
    """The source of the one query."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.result: Any = None

    def encode(self, result: Any) -> bytes:
        self.result = result
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        self.answered.set_result(answer)

    def flush(self) -> None:
        pass


async def _ask(handler: Handler, text: str, before: dict[str, Any], timeout_s: float, tell: Tell) -> Trial:
    memory = RamMemory()
    memory.open(pickle.dumps(before))
    dispatcher = dispatcher_for(handler, memory, Counters(), 1, timeout_s)
    dispatcher.quotes_queries = True  # its author reads it, and nobody else
    asker = _Asker()
    trial = Trial(None, repr(before), None, "")
    async with dispatcher.running():
        try:
            tell(SETTING_UP)
            await dispatcher.set_up()
            tell(ASKING_ASYNC if handler.is_async else ASKING)
            began_s = perf_counter()
            dispatcher.submit([Job(asker, None, text)])
            outcome, payload = await asker.answered
            trial = trial._replace(seconds=perf_counter() - began_s)
            if outcome is Outcome.OK:
                after = memory.checkout()
                trial = trial._replace(result=payload, memory="(not shown)", notes=tuple(_changed(asker.result)))
                tell(trial)
                tell(SHOWING)
                trial = trial._replace(memory=_shown(after), notes=(*trial.notes, *_kept(after)))
            else:
                trial = trial._replace(error=payload.decode("utf-8", "replace"))
            tell(trial)
            if outcome is not Outcome.TIMED_OUT:  # one that hangs would hang here too
                tell(CLOSING)
                await dispatcher.tear_down()
        except HandlerFault as exc:
            get_logger("worker.trial").error("handler_failed", exc_info=exc.__cause__)
            return trial._replace(error=str(exc))
    return trial


def _changed(result: Any) -> Iterator[str]:
    """Tell what JSON makes another thing of, without a word."""
    found = set(_surprises(result, 0))
    if float in found:
        yield "NaN and infinity are sent as null: JSON has no such numbers"
    if set in found:
        yield "a set is sent as a list, in no certain order"
    if dict in found:
        yield "keys that are no texts become texts, and some are the same then: JSON's reader sees the last of them"


def _surprises(value: Any, depth: int) -> Iterator[type]:
    if depth > _DEEPEST:
        return
    if isinstance(value, float) and not math.isfinite(value):
        yield float
    elif isinstance(value, set | frozenset):
        yield set
    elif isinstance(value, dict):
        others = any(type(key) is not str for key in value)
        if others and len(msgspec.json.decode(msgspec.json.encode(dict.fromkeys(value)))) < len(value):
            yield dict
        for each in value.values():
            yield from _surprises(each, depth + 1)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _surprises(each, depth + 1)


def _kept(memory: dict[Any, Any]) -> Iterator[str]:
    """Tell what a memory is, or is not, once a disk or a successor has had it."""
    try:
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(memory))
        if not _same(read, memory):
            yield f'with memory = "disk" it is another one after a restart: {_shown(read)}'
    except (Exception, RecursionError) as exc:  # noqa: BLE001 - whatever a user's objects raise
        yield f'this memory is for memory = "ram" alone, "disk" would refuse it: {exc}'
        try:
            pickle.dumps(memory)
        except (Exception, RecursionError) as problem:  # noqa: BLE001 - as above
            yield f"and it is lost when the worker is replaced, at a reload too: {problem}"


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of the same types, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or one != one  # NaN is not equal to itself


def _shown(memory: Any) -> str:
    try:
        return repr(memory)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - a user's own __repr__
        return f"(cannot be shown: its __repr__ raised {type(exc).__name__})"
