"""What nodes make of a handler's result: `em-runner try` and the fixture for tests tell it in the same words."""

from __future__ import annotations

from typing import Any


def objection(result: Any) -> str:
    """Return what a node will not make of a result, as it is once JSON has had it; or an empty text."""
    if not isinstance(result, list | dict):
        return (
            f"the result is a {type(result).__name__}, which nodes drop: they expect a list of embryos, "
            "[{'type': ..., 'properties': {...}}, ...]; to a direct query it is sent as it is"
        )
    for number, each in enumerate([result] if isinstance(result, dict) else result):
        if not (isinstance(each, dict) and isinstance(each.get("type"), str)):
            return f"embryo {number} has no 'type'; nodes expect {{'type': ..., 'properties': {{...}}}}"
    return ""
