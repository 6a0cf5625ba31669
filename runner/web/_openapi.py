"""GET /openapi.json: the HTTP interface as an OpenAPI document.

The format is OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.1.html. The schemas of bodies follow
from the Structs that the code reads and writes, so that they cannot differ. The exception is
`Results`, whose body is written as bytes.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any, Final

import msgspec

from runner import version
from runner.table import Ready, Table
from runner.web.direct import MAX_BODY_BYTES, QueryBody
from shared.http.errors import ErrorBody

PATH: Final = "/openapi.json"


class Results(msgspec.Struct):
    """The result of a handler: any JSON, often a list of embryos."""

    results: Any


class Health(msgspec.Struct):
    """The body of /health, which is always the same."""

    status: str


_DESCRIPTIONS: Final = {
    400: "The body is not JSON with a `query`. Or there are several agents and none is named, or "
    "the body names another agent than the path.",
    401: "The token is missing or wrong.",
    403: "The request comes from another site's page, or its `Host` is not the runner's.",
    404: "There is no such agent or worker, or the worker is not one of that agent.",
    408: "The request was not sent in time.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    405: "The route does not have this method. `Allow` names the methods that it has.",
    500: "The handler raised an exception, or its result is not JSON. The log has the traceback.",
    503: "No worker is up, or the worker is busy, or it died before it answered. "
    "`Retry-After` is the time after which to retry.",
    504: "There was no answer before the deadline: `query_timeout_ms`, or `handler_timeout_ms` of "
    "the handler.",
}
_WORKER: Final = {
    "X-Worker": {"description": "The worker that had the query last.", "schema": {"type": "string"}}
}
_RETRY: Final = {"Retry-After": {"description": "In seconds.", "schema": {"type": "integer"}}}
_HEADERS: Final = {500: _WORKER, 503: _WORKER | _RETRY, 504: _WORKER}
_REFUSED: Final = (401, 403)


@cache
def document(with_token: bool) -> bytes:
    """Return the document as JSON, for a runner with or without a token."""
    structs = (QueryBody, Results, ErrorBody, Health, Ready, Table)
    _, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "em-runner",
            "version": version(),
            "description": (
                "Direct queries to agents, and the status of their workers. Every error is "
                '`{"error": ..., "code": ...}`. Each GET route answers HEAD too. On every route: '
                "400 for an invalid HTTP request or one without Host, 404 for an unknown path, "
                "405 for another method, 408 for a request that is not sent in time, "
                "431 for too large a head."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"basic": []}] if with_token else [],
        "paths": _queries() | _operator_routes(),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The token of `runner.http_token_file`.",
                },
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "For browsers: the token is the password.",
                },
            },
        },
    }
    return msgspec.json.encode(whole)


def _queries() -> dict[str, Any]:
    routes = (
        ("/agent/query", "ask", "Ask the only agent, or the agent or worker that the body names"),
        ("/agents/{agent}/query", "askAgent", "Ask the first worker that is up"),
        ("/workers/{worker}/query", "askWorker", "Ask this worker and no other"),
    )
    return {path: {"post": _query(path, name, summary)} for path, name, summary in routes}


def _query(path: str, name: str, summary: str) -> dict[str, Any]:
    in_path = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    return {
        "operationId": name,
        "summary": summary,
        "parameters": [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string"}}
            for each in in_path
        ],
        "requestBody": {"required": True, "content": _json("QueryBody")},
        "responses": {
            "200": {
                "description": "The handler's answer.",
                "headers": _WORKER,
                "content": _json("Results"),
            }
        }
        | _failures(*_DESCRIPTIONS),
    }


def _operator_routes() -> dict[str, Any]:
    health = _get(
        "health",
        "Whether the runner's process answers. Needs no token",
        _json("Health"),
        (403,),
    )
    health["get"]["security"] = []
    ready = {
        "503": {
            "description": "At least one agent has no worker that is ready.",
            "content": _json("Ready"),
        }
    }
    return {
        "/": _get("page", "The status page", _text("text/html"), _REFUSED),
        "/events": _get(
            "events",
            "Updates of the status page. Programs should use /workers or /metrics",
            _text("text/event-stream"),
            (*_REFUSED, 503),
        ),
        "/health": health,
        "/ready": _get(
            "ready",
            "Whether each agent has a worker that is ready",
            _json("Ready"),
            _REFUSED,
            ready,
        ),
        "/workers": _get("workers", "The table of workers", _json("Table"), _REFUSED),
        "/metrics": _get("metrics", "For Prometheus", _text("text/plain"), _REFUSED),
        PATH: _get(
            "openapi",
            "This document",
            {"application/json": {"schema": {"type": "object"}}},
            _REFUSED,
        ),
    }


def _get(
    name: str,
    summary: str,
    content: dict[str, Any],
    failures: tuple[int, ...],
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    responses = (
        {"200": {"description": summary, "content": content}} | _failures(*failures) | (more or {})
    )
    return {"get": {"operationId": name, "summary": summary, "responses": responses}}


def _failures(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {
            "description": _DESCRIPTIONS.get(status, HTTPStatus(status).phrase),
            "content": _json("ErrorBody"),
        }
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


def _json(struct: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{struct}"}}}


def _text(media_type: str) -> dict[str, Any]:
    return {media_type: {"schema": {"type": "string"}}}
