"""Bare uvicorn with a minimal ASGI application that answers direct queries without a worker.

python -m benchmarks.baselines.uvicorn_app PORT_FILE
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import uvicorn


class Query(msgspec.Struct):
    """The body of a direct query."""

    query: str


decode = msgspec.json.Decoder(Query).decode
encode = msgspec.json.Encoder().encode


async def app(
    scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
) -> None:
    """Answer one query."""
    message = await receive()
    body = encode({"results": decode(message["body"]).query})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    Path(sys.argv[1]).write_text(str(listener.getsockname()[1]))
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", ws="none", lifespan="off", access_log=False
    )
    uvicorn.Server(config).run([listener])
