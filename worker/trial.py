"""Calls a handler once, as a worker would, and returns the outcome."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
from collections.abc import Callable
from time import perf_counter
from typing import Any

import anyio
import msgspec

from shared.config.handlers import HandlerRef
from shared.ipc import Outcome
from shared.logs.logger import get_logger
from shared.trial import EncodingFault, Phase, Trial
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.dispatch import DispatcherOptions
from worker.dispatching.handler import Handler, load
from worker.dispatching.jobs import Answer, Job
from worker.dispatching.results import HandlerFault, encode_result
from worker.memory.base import RamMemory

_Report = Callable[[Phase | Trial], None]


def run_trial(
    ref: HandlerRef,
    text: str,
    memory: dict[str, Any],
    timeout_s: float,
    report: _Report,
) -> Trial:
    """Load a handler, set it up, ask it `text` with `memory`, and close it.

    `report` gets each phase before it starts, and the outcome of the query before the handler is
    closed. If a phase hangs or ends the process, the caller knows which phase it was.

    Raises:
        ConfigError: if the handler cannot be loaded.
    """
    report(Phase.IMPORTING)
    handler = load(ref)
    trial = anyio.run(
        _ask,
        handler,
        text,
        memory,
        timeout_s,
        report,
        backend_options={"use_uvloop": True},
    )
    # A destructor reports a coroutine that was never awaited, and a task's exception that nothing
    # retrieved. The process exits without running destructors.
    gc.collect()
    return trial


class _TrialSource:
    """The source of the query. It waits for the answer."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.answered: asyncio.Future[Answer] = loop.create_future()
        self.fault: EncodingFault | None = None

    def encode(self, result: Any) -> bytes:
        try:
            return encode_result(result)
        except Exception as exc:
            self.fault = _fault(result, exc)
            raise

    def answer(self, job: Job, answer: Answer) -> None:
        self.answered.set_result(answer)

    def send_answers(self) -> None:
        pass


async def _ask(
    handler: Handler,
    text: str,
    before: dict[str, Any],
    timeout_s: float,
    report: _Report,
) -> Trial:
    memory = RamMemory()
    memory.open(pickle.dumps(before))
    options = DispatcherOptions(timeout_s=timeout_s)
    dispatcher = create_dispatcher(handler, memory, options)
    source = _TrialSource()
    trial = Trial(None, repr(before))
    async with dispatcher.running():
        try:
            report(Phase.SETTING_UP)
            await dispatcher.set_up()
            report(Phase.HANDLING_ASYNC if handler.is_async else Phase.HANDLING)
            started_s = perf_counter()
            dispatcher.submit([Job(source, None, text)])
            outcome, payload = await source.answered
            trial = trial._replace(seconds=perf_counter() - started_s)
            if outcome is Outcome.OK:
                after = memory.checkout()
                trial = trial._replace(
                    result=payload,
                    memory="(not shown)",
                )
                # The result is reported first: a `__repr__` in the memory may hang.
                report(trial)
                report(Phase.SHOWING)
                trial = trial._replace(
                    memory=_shown(after),
                    notes=_notes(after),
                )
            else:
                trial = trial._replace(
                    error=payload.decode("utf-8", "replace"),
                    fault=source.fault,
                )
            report(trial)
            # After a timeout the handler's thread may still be busy, and `close` would wait for it.
            if outcome is not Outcome.TIMED_OUT:
                report(Phase.CLOSING)
                await dispatcher.tear_down()
        except HandlerFault as exc:
            get_logger().error("handler_failed", exc_info=exc.__cause__)
            return trial._replace(error=str(exc))
    return trial


def _fault(result: Any, exc: Exception) -> EncodingFault | None:
    if inspect.iscoroutine(result):
        return EncodingFault.NOT_AWAITED
    if isinstance(exc, UnicodeEncodeError):
        return EncodingFault.LONE_SURROGATE
    if isinstance(exc, RecursionError):
        return EncodingFault.TOO_DEEP
    # The message of a `HandlerFault` already contains a hint.
    return None if isinstance(exc, HandlerFault) else EncodingFault.NOT_JSON


def _notes(memory: dict[Any, Any]) -> tuple[str, ...]:
    """Return a note if `memory = "disk"` would refuse or change this memory."""
    try:
        blob = msgspec.msgpack.encode(memory)
        read = msgspec.msgpack.decode(blob)
    except Exception as exc:  # noqa: BLE001 - objects of any class may raise anything
        return (f'this memory is for memory = "ram" only, "disk" would refuse it: {exc}',)
    # As text, because equal values may differ in type.
    shown = _shown(read)
    if shown != _shown(memory):
        return (f'with memory = "disk" it changes on restart: {shown}',)
    return ()


def _shown(memory: Any) -> str:
    try:
        return repr(memory)
    except (Exception, SystemExit) as exc:  # noqa: BLE001 - a user's own `__repr__`
        return f"(cannot be shown: its __repr__ raised {type(exc).__name__})"
