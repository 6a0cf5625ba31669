"""Calls a handler once, as a worker would, and says what came of it."""

from __future__ import annotations

import asyncio
import pickle
from time import perf_counter
from typing import Any

import anyio

from shared.handlers import HandlerRef
from shared.ipc import Counters, Outcome
from shared.trial import Trial
from worker.dispatchers import dispatcher_for
from worker.handler import Handler, load
from worker.jobs import Answer, Job
from worker.memory import RamMemory
from worker.results import HandlerFault, encode_result


def attempt(ref: HandlerRef, text: str, memory: dict[str, Any], timeout_s: float) -> Trial:
    """Load a handler, set it up, ask it `text` with `memory`, close it.

    Raises:
        ConfigError: when it cannot be loaded.
    """
    return anyio.run(_ask, load(ref), text, memory, timeout_s, backend_options={"use_uvloop": True})


class _Asker:
    """The source of the one query."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        self.answered.set_result(answer)

    def flush(self) -> None:
        pass


async def _ask(handler: Handler, text: str, before: dict[str, Any], timeout_s: float) -> Trial:
    memory = RamMemory()
    memory.open(pickle.dumps(before))
    dispatcher = dispatcher_for(handler, memory, Counters(), 1, timeout_s)
    asker = _Asker()
    async with dispatcher.running():
        try:
            await dispatcher.set_up()
            began_s = perf_counter()
            dispatcher.submit([Job(asker, None, text)])
            outcome, payload = await asker.answered
            took_s = perf_counter() - began_s
            if outcome is not Outcome.TIMED_OUT:  # one that hangs would hang here too
                await dispatcher.tear_down()
        except HandlerFault as exc:
            return Trial(None, repr(before), 0.0, str(exc))
    if outcome is Outcome.OK:
        return Trial(payload, repr(memory.checkout()), took_s, "")
    return Trial(None, repr(before), took_s, payload.decode("utf-8", "replace"))
