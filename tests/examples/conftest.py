"""Fixtures for the examples: a web site with pages from the test, and the query function."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.examples.harness import Page, Site, ask_example
from tests.ports import HOST, reserved_port


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables with which httpx would send requests to a proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def ask() -> Callable[..., Awaitable[list[Any]]]:
    return ask_example


@pytest.fixture
def site() -> Iterator[Site]:
    """A web site on a free port. It runs until the test ends."""
    with _serve() as site:
        yield site


@contextmanager
def _serve() -> Iterator[Site]:
    test_ends = threading.Event()

    class Request(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.requested.append(self.path)
            page = site.pages.get(self.path.partition("?")[0], Page(404, b""))
            if page.hangs:
                test_ends.wait(timeout=60)
                return
            self.send_response(page.status)
            self.send_header("content-type", page.content_type)
            self.send_header("content-length", str(len(page.body)))
            if page.location:
                self.send_header("location", page.location)
            self.end_headers()
            self.wfile.write(page.body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server:
        site = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            test_ends.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def unused_address() -> Iterator[str]:
    """An address on which no server listens. No other process gets it during the test."""
    with reserved_port() as port:
        yield f"{HOST}:{port}"
