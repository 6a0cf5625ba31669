"""JSON responses of the HTTP interface, and the one form of all errors."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from starlette.responses import Response

from shared.http.errors import ErrorBody, ErrorCode

CONTENT_TYPE_LINE: Final = b"content-type: application/json\r\n"
_RETRY_AFTER: Final = ("retry-after", "1")


class JSON(Response):
    """A JSON response with any value."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return `content` as JSON. `bytes` are JSON already."""
        if isinstance(content, bytes):
            return content
        return msgspec.json.encode(content)


class ErrorResponse(NamedTuple):
    """An error response: its code, a text for people, and headers."""

    code: ErrorCode
    message: str
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.code.status

    @property
    def body(self) -> bytes:
        """The body, as JSON."""
        return msgspec.json.encode(ErrorBody(self.message, self.code))

    @property
    def header_lines(self) -> bytes:
        """The headers as HTTP/1.1 has them, each with its line end."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return CONTENT_TYPE_LINE + lines.encode()

    def response(self) -> JSON:
        """Return it as an ASGI application."""
        return JSON(self.body, self.status, dict(self.headers))


def unavailable(
    code: ErrorCode,
    message: str,
    *headers: tuple[str, str],
) -> ErrorResponse:
    """Return the response to a request that may succeed if it is repeated soon."""
    return ErrorResponse(code, message, (_RETRY_AFTER, *headers))
