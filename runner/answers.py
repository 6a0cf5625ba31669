"""JSON answers of the HTTP interface, and the one form that every error has."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from starlette.responses import Response

RETRY_AFTER_S: Final = 1
_CONTENT_TYPE: Final = b"content-type: application/json\r\n"


class JSON(Response):
    """Any value as a JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return `content` as JSON; `bytes` are JSON already."""
        return content if isinstance(content, bytes) else msgspec.json.encode(content)


class Refusal(NamedTuple):
    """An answer to something that went wrong, as a status, words for the client, and headers."""

    status: int
    message: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        """The JSON that the client gets."""
        return msgspec.json.encode({"error": self.message})

    @property
    def header_lines(self) -> bytes:
        """The headers, as HTTP writes them."""
        return _CONTENT_TYPE + "".join(f"{name}: {value}\r\n" for name, value in self.headers).encode()

    def response(self) -> JSON:
        """Return it as an ASGI application."""
        return JSON(self.body, self.status, dict(self.headers))


def unavailable(message: str, *headers: tuple[str, str]) -> Refusal:
    """Return the answer to a query that nobody can answer now, but perhaps soon."""
    return Refusal(503, message, (("retry-after", str(RETRY_AFTER_S)), *headers))


def result_lines(worker: str) -> bytes:
    """Return the headers of a worker's result."""
    return b"content-type: application/json\r\nx-worker: %b\r\n" % worker.encode()
