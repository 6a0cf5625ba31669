"""The example that queries a service over HTTP."""

from __future__ import annotations

import json

import pytest

from examples.http_api import HttpApi
from tests.examples.harness import Page

pytestmark = pytest.mark.anyio

HANDLER = "examples.http_api:HttpApi"


@pytest.fixture
def service(site, monkeypatch):
    monkeypatch.setenv("SEARCH_API_URL", f"{site.url}/search")
    monkeypatch.delenv("SEARCH_API_TIMEOUT_S", raising=False)
    return site


def json_page(value: object, status: int = 200) -> Page:
    return Page(status, json.dumps(value).encode(), "application/json")


async def test_http_api_returns_the_services_items_as_embryos(ask, service):
    service.pages["/search"] = json_page(
        [{"url": "http://a.test/", "title": "A", "summary": "about a", "rank": 1}]
    )
    [answer] = await ask(HANDLER, "what & why?")
    assert answer == [
        {"type": "url", "properties": {"url": "http://a.test/", "title": "A", "resume": "about a"}}
    ]
    assert service.requested == ["/search?q=what+%26+why%3F"]


@pytest.mark.parametrize(
    "page",
    [
        Page(500, b"broken"),
        Page(404, b""),
        Page(200, b"<html>", "application/json"),
        Page(200, b'"\xff"', "application/json"),
        json_page({"error": "no"}),
        json_page(["a", "b"]),
    ],
    ids=["error", "not found", "not JSON", "not UTF-8", "not a list", "not objects"],
)
async def test_http_api_returns_nothing_when_the_service_fails(ask, service, page, caplog):
    service.pages["/search"] = page
    assert await ask(HANDLER, "secret question") == [[]]
    assert "no results from the search service" in caplog.text
    assert "secret question" not in caplog.text


async def test_http_api_returns_nothing_when_the_service_times_out(
    ask, service, monkeypatch, caplog
):
    monkeypatch.setenv("SEARCH_API_TIMEOUT_S", "0.05")
    service.pages["/search"] = Page(hangs=True)
    assert await ask(HANDLER, "hello") == [[]]
    assert "TimeoutError" in caplog.text


async def test_http_api_returns_nothing_when_the_service_is_down(
    ask, monkeypatch, unused_address, caplog
):
    monkeypatch.setenv("SEARCH_API_URL", f"http://{unused_address}/search")
    assert await ask(HANDLER, "hello") == [[]]
    assert "ConnectError" in caplog.text


async def test_http_api_returns_results_again_when_the_service_recovers(ask, service):
    service.pages["/search"] = Page(500)
    assert await ask(HANDLER, "hello") == [[]]
    service.pages["/search"] = json_page([{"url": "http://a.test/"}])
    [answer] = await ask(HANDLER, "hello")
    assert len(answer) == 1


async def test_http_api_requires_an_address(monkeypatch):
    monkeypatch.delenv("SEARCH_API_URL", raising=False)
    with pytest.raises(RuntimeError, match="SEARCH_API_URL is not set"):
        await HttpApi().setup()
