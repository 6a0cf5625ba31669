"""The smallest agent: answers every query with one embryo that holds the query's text.

The demo runs it; copy it as a start for your own.
"""

from __future__ import annotations

from typing import Any


def handle(body: str, memory: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the results for one query, and the memory for the next."""
    return [{"type": "echo", "properties": {"title": body, "resume": f"You asked: {body}"}}], memory
