"""`em-runner try`: calls a handler once, and shows the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from shared.config.handlers import parse_handler
from shared.embryos import drop_reason
from shared.errors import ConfigError, with_hint
from shared.logs.logger import printable_json
from shared.trial import EncodingFault, Trial

_HINTS: Final = {
    EncodingFault.NOT_AWAITED: "'await' it before you return it",
    EncodingFault.LONE_SURROGATE: "a string contains half a character; "
    "decode it with errors='replace'",
    EncodingFault.TOO_DEEP: "the result contains itself, or is nested too deeply",
    EncodingFault.NOT_JSON: "return what JSON supports: strings, numbers, lists, "
    "dicts with string keys",
}


def try_out(
    handler: str,
    text: str,
    memory: str,
    timeout_s: float,
    report: Callable[[str], None],
) -> tuple[list[str], str | None]:
    """Call a handler once, in a separate process.

    Args:
        handler: the handler, as in the configuration.
        text: the query.
        memory: the memory before the query, a JSON object.
        timeout_s: the handler's timeout.
        report: is called with a message for the user if the import takes long.

    Returns:
        The lines to print, and why the call failed; None if it succeeded.

    Raises:
        ConfigError: if the handler cannot be loaded, or `memory` is not a JSON object.
    """
    try:
        before = msgspec.json.decode(memory, type=dict[str, Any])
    except msgspec.DecodeError:
        raise ConfigError(
            f"--memory: found {memory!r}, expected a JSON object, such as '{{}}'"
        ) from None
    ref = parse_handler(handler, Path.cwd(), "HANDLER")
    # Not in this process: the handler may hang, crash or call `exit`.
    fork_server = ForkServer()
    fork_server.start()
    trial = Probes(fork_server).try_out(
        ref,
        text,
        before,
        timeout_s,
        report,
    )
    return _lines(trial), _error(trial)


def _error(trial: Trial) -> str | None:
    if trial.error is None:
        return None
    hint = None if trial.fault is None else _HINTS[trial.fault]
    return with_hint(trial.error, hint)


def _lines(trial: Trial) -> list[str]:
    lines = []
    if trial.result is not None:
        result = printable_json(msgspec.json.format(trial.result).decode())
        indented = result.replace("\n", "\n        ")
        lines.append(f"result  {indented}")
    lines.append(f"memory  {printable_json(trial.memory)}")
    if trial.seconds is not None:
        ms = trial.seconds * 1000
        # From 100 on, three digits need no decimal place, and ".3g" could write 1e+03.
        lines.append(f"time    {ms:.3g} ms" if ms < 100 else f"time    {ms:.0f} ms")
    if trial.result is not None:
        # A node may refuse a result that a direct query would get: notes, not errors.
        notes = (
            drop_reason(msgspec.json.decode(trial.result)),
            *trial.notes,
        )
        lines += [f"note    {note}" for note in notes if note is not None]
    return lines
