"""A site on this machine that answers as each test wants, and the examples run as a worker runs them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.examples.harness import Page, Site, ask_example


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def ask() -> Callable[..., Awaitable[list[Any]]]:
    return ask_example


@pytest.fixture
def site() -> Iterator[Site]:
    """A web site on a free port; it is there until the test ends."""
    with _served() as site:
        yield site


@contextmanager
def _served() -> Iterator[Site]:
    release = threading.Event()

    class Request(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            page = site.pages.get(self.path.partition("?")[0], Page(404, b""))
            if page.hangs:
                release.wait(timeout=60)
                return
            self.send_response(page.status)
            self.send_header("content-type", page.content_type)
            self.send_header("content-length", str(len(page.body)))
            if page.location:
                self.send_header("location", page.location)
            self.end_headers()
            self.wfile.write(page.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server:
        site = Site(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            release.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def unused_address() -> Iterator[str]:
    """An address that is taken, and on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"
