"""The smallest agent. It answers every query with one embryo (result) that has the query's text.

The demo runs this agent. Copy it to start your own.
"""

from __future__ import annotations

from typing import Any


def handle(
    body: str,
    memory: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the results for one query, and the memory for the next."""
    properties = {"title": body, "resume": f"You asked: {body}"}
    return [{"type": "echo", "properties": properties}], memory
