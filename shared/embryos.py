"""Whether nodes accept a handler's result. `em-runner try` and the test fixture share this text."""

from __future__ import annotations

from typing import Any

from shared.errors import kind_of


def drop_reason(result: Any) -> str | None:
    """Return why em_disco drops a result, given as decoded JSON; None if it accepts it."""
    if not isinstance(result, list | dict):
        return (
            f"the result is {kind_of(result)}, which nodes drop: they expect a list of "
            "embryos, [{'type': ..., 'properties': {...}}, ...]; "
            "a direct query is answered with it unchanged"
        )
    # Nodes treat a lone embryo like a list of one.
    embryos = result if isinstance(result, list) else [result]
    for number, embryo in enumerate(embryos):
        if not (isinstance(embryo, dict) and isinstance(embryo.get("type"), str)):
            return (
                f"embryo {number} is not an object with a 'type' that is a string; "
                "nodes expect {'type': ..., 'properties': {...}}"
            )
    return None
