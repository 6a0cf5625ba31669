"""JSON answers of the HTTP interface, and the one form that every error has."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response


class JSON(Response):
    """Any value as a JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return `content` as JSON; `bytes` are JSON already."""
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


def error(status: int, message: str, **headers: str) -> JSON:
    """Return the answer to something that went wrong; `retry_after="1"` becomes the header `retry-after`."""
    return JSON({"error": message}, status, {name.replace("_", "-"): value for name, value in headers.items()})
