"""What `em-runner try` shows of one call of a handler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from runner.process import ForkServer
from shared.config import Connection
from shared.embryos import objection
from shared.errors import ConfigError
from shared.handlers import parse_handler
from shared.logs import printable_json
from shared.trial import Trial

MIB: Final = 2**20

_ADVICE: Final = (
    ("objects of type coroutine", "'await' it before you return it"),
    ("str-like or number-like keys", "JSON has texts as keys: write {str(key): value}"),
    ("surrogates not allowed", "a text holds half a character; decode with errors='replace'"),
    ("recursion depth", "what is returned holds itself, or nests too deep"),
    ("must return (result, memory)", "end it with: return result, memory"),
    ("are the two swapped?", "end it with: return result, memory"),
    ("must return a dict as memory", "the second value is what the next query gets; {} when there is nothing to keep"),
    ("Encoding objects of type", "return what JSON can hold: texts, numbers, lists, dicts with texts as keys"),
    ("bytes that are not JSON", "bytes are taken for JSON that is encoded already"),
)


class Report(NamedTuple):
    """What is printed, and why it failed; empty when it did not."""

    text: str
    failed: str


def try_out(handler: str, text: str, memory: str, timeout_s: float, tell: Callable[[str], None]) -> Report:
    """Call a handler once, in a process of its own. `tell` gets what its author should know meanwhile.

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
    return _told(fork_server.try_out(ref, text, before, timeout_s, tell))


def _told(trial: Trial) -> Report:
    lines = []
    if trial.result is not None:
        lines.append(f"result  {_indented(printable_json(msgspec.json.format(trial.result).decode()))}")
    lines.append(f"memory  {printable_json(trial.memory)}")
    if trial.seconds is not None:
        milliseconds = trial.seconds * 1000
        lines.append(f"time    {milliseconds:{'.3g' if milliseconds < 100 else '.0f'}} ms")
    if trial.result is not None:
        notes = (objection(msgspec.json.decode(trial.result)), _too_large(trial.result), *trial.notes)
        lines += [f"note    {note}" for note in notes if note]
    advice = next((words for found, words in _ADVICE if found in trial.error), "")
    return Report("\n".join(lines), f"{trial.error}; {advice}" if advice else trial.error)


def _too_large(result: bytes) -> str:
    most = Connection().max_frame_bytes
    if len(result) < most:
        return ""
    return (
        f"the result has {len(result) / MIB:.1f} MiB as JSON; a node takes {most / MIB:g} MiB, and cuts the connection "
        "at more"
    )


def _indented(text: str) -> str:
    return text.replace("\n", "\n        ")
