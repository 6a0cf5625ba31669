"""GET /openapi.json: the HTTP interface as OpenAPI 3.1 describes it (https://spec.openapis.org/oas/v3.1.1.html).

Bodies are described by the Structs that are read and written, so that they cannot drift apart.
"""

from __future__ import annotations

from functools import cache
from http import HTTPStatus
from typing import Any, Final

import msgspec

from runner.direct import MAX_BODY_BYTES, QueryBody
from runner.metrics import version
from runner.table import Ready, Table

PATH: Final = "/openapi.json"


class Failure(msgspec.Struct):
    """What every error answers; `error` says in words what is wrong and what to do."""

    error: str


class Results(msgspec.Struct):
    """What a handler answered: any JSON, often a list of embryos."""

    results: Any


class Health(msgspec.Struct):
    """Always the same."""

    status: str


_WHY: Final = {
    400: "The body is not JSON with a `query`, or names no one of several agents, or another agent than the path.",
    401: "A token is needed, and was not given or is wrong.",
    403: "The request comes from another site's page, or its `Host` is not the runner's.",
    404: "There is no such agent or worker, or the worker is not one of that agent.",
    408: "The request was not sent in time.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    405: "The route is not asked in this way; `Allow` says how.",
    500: "The handler raised, or returned what is no JSON; the log has the traceback.",
    503: "No worker is up, or it is busy, or it died with the query; `Retry-After` says when to ask again.",
    504: "There was no answer before the deadline: `query_timeout_ms`, or the handler's own `handler_timeout_ms`.",
}
_WORKER: Final = {"X-Worker": {"description": "Who was asked.", "schema": {"type": "string"}}}
_RETRY: Final = {"Retry-After": {"description": "In seconds.", "schema": {"type": "integer"}}}
_HEADERS: Final = {500: _WORKER, 503: _WORKER | _RETRY, 504: _WORKER}
_REFUSED: Final = (401, 403)


@cache
def document(with_token: bool) -> bytes:
    """Return the document as JSON, of a runner that asks for a token or of one that does not."""
    structs = (QueryBody, Results, Failure, Health, Ready, Table)
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    whole = {
        "openapi": "3.1.0",
        "info": {
            "title": "em-runner",
            "version": version(),
            "description": (
                'Direct queries to agents, and how their workers are. Every error is `{"error": ...}`. Each GET '
                "answers HEAD too. Whatever the route: 400 for what is no HTTP request or has no Host, 404 for an "
                "unknown path, 405 for another method, 408 for what is not sent in time, 431 for too large a head."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"basic": []}] if with_token else [],
        "paths": _queries() | _looks(),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "The token of `runner.http_token_file`."},
                "basic": {"type": "http", "scheme": "basic", "description": "For browsers: the token is the password."},
            },
        },
    }
    return msgspec.json.encode(whole)


def _queries() -> dict[str, Any]:
    routes = (
        ("/agent/query", "ask", "Ask the only agent, or the agent or worker that the body names"),
        ("/agents/{agent}/query", "askAgent", "Ask an agent: its first worker that is up"),
        ("/workers/{worker}/query", "askWorker", "Ask this worker and no other"),
    )
    return {path: {"post": _query(path, name, words)} for path, name, words in routes}


def _query(path: str, name: str, words: str) -> dict[str, Any]:
    in_path = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    return {
        "operationId": name,
        "summary": words,
        "parameters": [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in in_path
        ],
        "requestBody": {"required": True, "content": _json("QueryBody")},
        "responses": {"200": {"description": "The handler's answer.", "headers": _WORKER, "content": _json("Results")}}
        | _failures(*_WHY),
    }


def _looks() -> dict[str, Any]:
    health = _get("health", "Whether the runner's process answers; asks for no token", _json("Health"), (403,))
    health["get"]["security"] = []
    ready = {"503": {"description": "At least one agent has no worker that is.", "content": _json("Ready")}}
    return {
        "/": _get("page", "The status page", _text("text/html"), _REFUSED),
        "/events": _get(
            "events",
            "What the status page shows, as it changes; programs had better ask /workers or /metrics",
            _text("text/event-stream"),
            (*_REFUSED, 503),
        ),
        "/health": health,
        "/ready": _get("ready", "Whether each agent has a worker that is ready", _json("Ready"), _REFUSED, ready),
        "/workers": _get("workers", "The table of workers", _json("Table"), _REFUSED),
        "/metrics": _get("metrics", "For Prometheus", _text("text/plain"), _REFUSED),
        PATH: _get("openapi", "This document", {"application/json": {"schema": {"type": "object"}}}, _REFUSED),
    }


def _get(
    name: str, words: str, content: dict[str, Any], failures: tuple[int, ...], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    responses = {"200": {"description": words, "content": content}} | _failures(*failures) | (more or {})
    return {"get": {"operationId": name, "summary": words, "responses": responses}}


def _failures(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {"description": _WHY.get(status, HTTPStatus(status).phrase), "content": _json("Failure")}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


def _json(struct: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{struct}"}}}


def _text(media_type: str) -> dict[str, Any]:
    return {media_type: {"schema": {"type": "string"}}}
