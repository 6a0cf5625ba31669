"""The errors of the runner's HTTP interface: a code for programs, and a text for people."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta


class ErrorCode(StrEnum):
    """What is wrong, for programs. Codes and their statuses never change, texts may.

    Attributes:
        status: the HTTP status of the response.
    """

    status: int

    def __new__(cls, code: str, status: int) -> ErrorCode:
        """Create a member with its status."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.status = status
        return member

    INVALID_REQUEST = "invalid_request", 400
    INVALID_BODY = "invalid_body", 400
    AGENT_REQUIRED = "agent_required", 400
    NAME_CONFLICT = "name_conflict", 400
    UNAUTHORIZED = "unauthorized", 401
    FOREIGN_HOST = "foreign_host", 403
    FOREIGN_ORIGIN = "foreign_origin", 403
    UNKNOWN_AGENT = "unknown_agent", 404
    UNKNOWN_WORKER = "unknown_worker", 404
    UNKNOWN_ROUTE = "unknown_route", 404
    METHOD_NOT_ALLOWED = "method_not_allowed", 405
    REQUEST_TIMEOUT = "request_timeout", 408
    BODY_TOO_LARGE = "body_too_large", 413
    HEAD_TOO_LARGE = "head_too_large", 431
    HANDLER_FAILED = "handler_failed", 500
    INTERNAL_ERROR = "internal_error", 500
    WORKER_UNAVAILABLE = "worker_unavailable", 503
    WORKER_BUSY = "worker_busy", 503
    SHUTTING_DOWN = "shutting_down", 503
    TOO_MANY_STREAMS = "too_many_streams", 503
    TOO_MANY_CONNECTIONS = "too_many_connections", 503
    TIMED_OUT = "timed_out", 504


INTERNAL_ERROR_TEXT = "the server has an internal error; its log has the reason"


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every error response."""

    error: Annotated[str, Meta(description="What is wrong and what to do, for people.")]
    code: Annotated[ErrorCode, Meta(description="What is wrong, for programs.")]
