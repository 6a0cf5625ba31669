"""GET /openapi.json describes the HTTP interface as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openapi_spec_validator import validate

from disco import Node
from runner.web.routes import Api
from shared.config.load import HttpAddress
from tests.cluster import Cluster, agent, cluster

pytestmark = pytest.mark.anyio

HANDLERS = """
def handle(body, memory):
    if body == "fail":
        raise ValueError
    return {"body": body, "memory": [1, None, 2.5]}, memory
"""


@pytest.fixture
async def running(tmp_path: Path, node: Node) -> AsyncIterator[Cluster]:
    agents = [agent("a", [node.url]), agent("b", ["127.0.0.1:9"])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS, runner="max_in_flight = 1") as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        yield running


async def test_document_is_valid_openapi_and_has_every_route(running: Cluster) -> None:
    document = (await running.http.get("/openapi.json")).json()
    validate(document)
    api = Api(None, {}, None, HttpAddress("localhost", 0))  # type: ignore[arg-type]
    served = {route.path for route in api.app._app.routes if not route.path.startswith("/assets/")}
    assert set(document["paths"]) == served


@pytest.mark.parametrize(
    ("method", "path", "template", "request_", "status"),
    [
        ("POST", "/agents/a/query", "/agents/{agent}/query", {"json": {"query": "x"}}, 200),
        (
            "POST",
            "/workers/a_server/query",
            "/workers/{worker}/query",
            {"json": {"query": "x"}},
            200,
        ),
        ("POST", "/agent/query", "/agent/query", {"json": {"query": "x", "agent": "a"}}, 200),
        ("POST", "/agent/query", "/agent/query", {"json": {"query": "x"}}, 400),
        ("POST", "/agents/a/query", "/agents/{agent}/query", {"content": b"{"}, 400),
        ("POST", "/agents/c/query", "/agents/{agent}/query", {"json": {"query": "x"}}, 404),
        ("POST", "/workers/c/query", "/workers/{worker}/query", {"json": {"query": "x"}}, 404),
        ("POST", "/agents/a/query", "/agents/{agent}/query", {"content": b" " * 70_000}, 413),
        ("POST", "/agents/a/query", "/agents/{agent}/query", {"json": {"query": "fail"}}, 500),
        (
            "POST",
            "/agents/a/query",
            "/agents/{agent}/query",
            {"headers": {"origin": "http://evil.example"}},
            403,
        ),
        ("GET", "/health", "/health", {}, 200),
        ("GET", "/health", "/health", {"headers": {"host": "evil.example"}}, 403),
        ("GET", "/ready", "/ready", {}, 503),
        ("GET", "/workers", "/workers", {}, 200),
        ("GET", "/workers", "/workers", {"headers": {"host": "evil.example"}}, 403),
        ("GET", "/metrics", "/metrics", {}, 200),
        ("GET", "/openapi.json", "/openapi.json", {}, 200),
        ("GET", "/", "/", {}, 200),
    ],
)
async def test_responses_match_the_document(
    method: str, path: str, template: str, request_: dict[str, Any], status: int, running: Cluster
) -> None:
    document = (await running.http.get("/openapi.json")).json()
    answer = await running.http.request(method, path, **request_)
    assert answer.status_code == status
    described = document["paths"][template][method.lower()]["responses"][str(status)]
    _has_headers(answer, described)
    kind = answer.headers["content-type"].partition(";")[0]
    schema = described["content"][kind]["schema"]
    if kind == "application/json":
        jsonschema.validate(answer.json(), schema | {"components": document["components"]})


def _has_headers(answer: httpx.Response, described: dict[str, Any]) -> None:
    for name in described.get("headers", {}):
        assert name.lower() in answer.headers
