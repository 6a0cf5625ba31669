"""What `em-runner try` shows of one call of a handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from runner.process import ForkServer
from shared.errors import ConfigError
from shared.handlers import parse_handler
from shared.logs import printable_json
from shared.trial import Trial

_ADVICE = (
    ("objects of type coroutine", "'await' it before you return it"),
    ("str-like or number-like keys", "JSON has texts as keys: write {str(key): value}"),
    ("surrogates not allowed", "a text holds half a character; decode with errors='replace'"),
    ("recursion depth", "what is returned holds itself, or nests too deep"),
    ("must return (result, memory)", "end it with: return result, memory"),
    ("must return a dict as memory", "the second value is what the next query gets; {} when there is nothing to keep"),
    ("Encoding objects of type", "return what JSON can hold: texts, numbers, lists, dicts with texts as keys"),
    ("bytes that are not JSON", "bytes are taken for JSON that is encoded already"),
)


class Report(NamedTuple):
    """What is printed, and why it failed; empty when it did not."""

    text: str
    failed: str


def try_out(handler: str, text: str, memory: str, timeout_s: float) -> Report:
    """Call a handler once, in a process of its own.

    Raises:
        ConfigError: when it cannot be found or loaded, or `memory` is no JSON object.
    """
    try:
        before = msgspec.json.decode(memory, type=dict[str, Any])
    except msgspec.DecodeError:
        raise ConfigError(f"--memory: found {memory!r}, expected a JSON object, such as '{{}}'") from None
    ref = parse_handler(handler, Path.cwd(), "HANDLER")
    fork_server = ForkServer()
    fork_server.start()
    return _told(fork_server.try_out(ref, text, before, timeout_s))


def _told(trial: Trial) -> Report:
    lines = []
    if trial.result is not None:
        lines.append(f"result  {_indented(printable_json(msgspec.json.format(trial.result).decode()))}")
    lines.append(f"memory  {printable_json(trial.memory)}")
    if trial.seconds is not None:
        milliseconds = trial.seconds * 1000
        lines.append(f"time    {milliseconds:{'.3g' if milliseconds < 100 else '.0f'}} ms")
    if trial.result is not None:
        objection = _objection(msgspec.json.decode(trial.result))
        lines += [f"note    {note}" for note in (objection, *trial.notes) if note]
    advice = next((words for found, words in _ADVICE if found in trial.error), "")
    return Report("\n".join(lines), f"{trial.error}; {advice}" if advice else trial.error)


def _indented(text: str) -> str:
    return text.replace("\n", "\n        ")


def _objection(result: Any) -> str:
    """Return what a node will not make of a result, or an empty text."""
    if not isinstance(result, list):
        return (
            "nodes expect a list of embryos, [{'type': ..., 'properties': {...}}, ...]; another value is sent as it is"
        )
    for number, each in enumerate(result):
        if not (isinstance(each, dict) and isinstance(each.get("type"), str)):
            return f"embryo {number} has no 'type'; nodes expect {{'type': ..., 'properties': {{...}}}}"
    return ""
