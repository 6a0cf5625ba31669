"""The node's HTTP routes (PROTOCOL.md, 9). Every answer is JSON, but for the event stream."""

from __future__ import annotations

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from disco.hub import Hub
from shared.http_head import declares_more_than

_ERRORS = {404: "not_found", 405: "method_not_allowed"}


class Asked(msgspec.Struct, frozen=True):
    """The body of POST /query; either of `query` and `value` is the text."""

    query: str | None = None
    value: str | None = None
    capabilities: tuple[str, ...] | None = None

    @property
    def text(self) -> str:
        """The query's text, empty when there is none."""
        return self.query or self.value or ""


_decode_asked = msgspec.json.Decoder(Asked).decode


class Routes:
    """The handlers of one node's routes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def query(self, request: Request) -> Response:
        """Ask the agents, and answer with what they found."""
        if not self._hub.admits_query():
            return _error(429, "rate_limited")
        try:
            body = await _read(request, self._hub.settings.max_body_bytes)
            asked = None if body is None else _decode_asked(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ClientDisconnect):
            return _error(400, "invalid_request")
        if asked is None:
            return _error(413, "body_too_large")
        if not asked.text:
            return _error(400, "invalid_request")
        found = await self._hub.queries.ask(asked.text, asked.capabilities or ())
        return _json(200, msgspec.json.encode({"embryo_list": found}))

    async def registry(self, request: Request) -> Response:
        """Answer with the listed agents."""
        return _json(200, self._hub.registry.listing())

    async def registry_events(self, request: Request) -> Response:
        """Answer with the listed agents, now and at each change."""
        if request.method == "HEAD":
            return Response(media_type=RegistryEvents.media_type)
        return RegistryEvents(self._hub)

    async def upgrade_required(self, request: Request) -> Response:
        """Answer a plain request to the WebSocket's path."""
        return _error(426, "upgrade_required", {"Upgrade": "websocket"})


class RegistryEvents(StreamingResponse):
    """Server-sent events of the registry; a slow reader skips states, and never makes the node keep them."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub) -> None:
        super().__init__((), headers={"Cache-Control": "no-cache"})
        self._hub = hub

    async def stream_response(self, send: Send) -> None:
        """Send states and pings until the node stops; cancelled when the reader leaves.

        An override and not a generator, so that the subscription ends with the request and not
        when a collector comes by.
        """
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with self._hub.changes() as changes:
            chunk = self._state()
            while not self._hub.stopping:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = b": ping\n\n"
                with anyio.move_on_after(self._hub.settings.sse_ping_interval_ms / 1000):
                    await changes.wait()
                    chunk = self._state()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _state(self) -> bytes:
        return b"data: %b\n\n" % self._hub.registry.listing()


def application(hub: Hub) -> Starlette:
    """Return the ASGI application of one node."""
    routes = Routes(hub)
    app = Starlette(
        routes=[
            Route("/query", routes.query, methods=["POST"]),
            Route("/registry", routes.registry),
            Route("/registry/events", routes.registry_events),
            Route("/ws", routes.upgrade_required),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )
    app.router.redirect_slashes = False
    return app


async def _read(request: Request, limit_bytes: int) -> bytes | None:
    """Return the body, or None as soon as it is known to be longer than `limit_bytes`."""
    if declares_more_than(limit_bytes, request.headers.get("content-length", "").encode()):
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            return None
    return bytes(body)


def _json(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")


def _error(status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    return _json(status, msgspec.json.encode({"error": error}), headers)


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    return _error(exc.status_code, _ERRORS.get(exc.status_code, "invalid_request"), dict(exc.headers or {}))


async def _internal_error(request: Request, exc: Exception) -> Response:
    return _error(500, "internal_error")
