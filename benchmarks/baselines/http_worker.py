"""The smallest worker that answers a query over HTTP with its pid. The supervisors restart it.

It is a WSGI application for gunicorn, an ASGI application for uvicorn, and a program for
supervisors of arbitrary programs:

    python -m benchmarks.baselines.http_worker PORT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any


def answer(body: bytes) -> bytes:
    """Return the answer to a query: its text and the pid of this process."""
    return json.dumps(
        {"results": {"query": json.loads(body)["query"], "pid": os.getpid()}}
    ).encode()


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one query."""
    body = answer(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    start_response(
        "200 OK", [("content-type", "application/json"), ("content-length", str(len(body)))]
    )
    return [body]


async def asgi(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Answer one query."""
    body = answer((await receive())["body"])
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    # Imported here, so that gunicorn's and uvicorn's workers do not import them.
    import socketserver
    from http.server import BaseHTTPRequestHandler

    class Direct(BaseHTTPRequestHandler):
        """Answers POST requests to any path."""

        def do_POST(self) -> None:
            """Answer one query."""
            body = answer(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Log nothing."""

    class Server(socketserver.TCPServer):
        """Omits HTTPServer's reverse look-up of its host name, which may take seconds."""

        allow_reuse_address = True

    Server(("127.0.0.1", int(sys.argv[1])), Direct).serve_forever()
