"""The HTTP routes of a node. Every response is JSON, except for the event stream."""

from __future__ import annotations

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from disco._hub import Hub
from shared.http.head import declares_more_than

_JSON = "application/json"

# Codes for programs. They never change.
_ERRORS = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    426: "upgrade_required",
    429: "rate_limited",
    500: "internal_error",
}


class _QueryRequest(msgspec.Struct, frozen=True):
    """The body of POST /query. The text is in `query` or in `value`."""

    query: str | None = None
    value: str | None = None
    capabilities: tuple[str, ...] | None = None


_decode_request = msgspec.json.Decoder(_QueryRequest).decode


class _Routes:
    """The handlers of one node's routes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def query(self, request: Request) -> Response:
        """Send a query to the agents, and respond with the embryos that they found."""
        # Before the body is read, so that a client over the rate cannot make the node read bodies.
        if not self._hub.admits_query():
            raise HTTPException(429)
        try:
            body = await _read_body(request, self._hub.settings.max_body_bytes)
            query = _decode_request(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ClientDisconnect):
            raise HTTPException(400) from None
        text = query.query or query.value
        if not text:
            raise HTTPException(400)
        found = await self._hub.queries.ask(text, query.capabilities or ())
        return Response(msgspec.json.encode({"embryo_list": found}), media_type=_JSON)

    async def registry(self, request: Request) -> Response:
        """Respond with the registered agents."""
        return Response(self._hub.registry.listing(), media_type=_JSON)

    async def registry_events(self, request: Request) -> Response:
        """Respond with the registered agents now and after each change."""
        if request.method == "HEAD":
            # RFC 9110, 9.3.2: the headers of GET without a body. The stream itself would not end.
            return Response(media_type=_RegistryEvents.media_type)
        return _RegistryEvents(self._hub)

    async def upgrade_required(self, request: Request) -> Response:
        """Reject a request to the WebSocket's path that is not an upgrade."""
        # RFC 9110, 15.5.22: a 426 response names the protocol in an Upgrade header.
        raise HTTPException(426, headers={"Upgrade": "websocket"})


class _RegistryEvents(StreamingResponse):
    """Server-sent events of the registry. A slow reader skips states: the node queues none."""

    media_type = "text/event-stream"

    def __init__(self, hub: Hub) -> None:
        super().__init__((), headers={"Cache-Control": "no-cache"})
        self._hub = hub

    async def stream_response(self, send: Send) -> None:
        """Send states and pings until the node stops.

        Starlette cancels this coroutine when the reader disconnects.
        """
        # This method is overridden, instead of passing a generator to Starlette. A cancelled
        # generator ends when the garbage collector finalizes it. The subscription must end with the
        # request, or hostile clients could pile up subscriptions.
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        with self._hub.changes() as changes:
            chunk = self._state()
            while not self._hub.stopping:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # A comment (HTML Standard, 9.2.7). It keeps proxies from closing a quiet stream.
                chunk = b": ping\n\n"
                with anyio.move_on_after(self._hub.settings.sse_ping_interval_ms / 1000):
                    await changes.wait()
                    chunk = self._state()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _state(self) -> bytes:
        return b"data: %b\n\n" % self._hub.registry.listing()


def application(hub: Hub) -> Starlette:
    """Return the ASGI application of one node."""
    routes = _Routes(hub)
    app = Starlette(
        routes=[
            Route("/query", routes.query, methods=["POST"]),
            Route("/registry", routes.registry),
            Route("/registry/events", routes.registry_events),
            Route("/ws", routes.upgrade_required),
        ],
        exception_handlers={HTTPException: _error, Exception: _error},
    )
    # As in the reference node, `/registry/` is unknown: it is not the path `/registry`.
    app.router.redirect_slashes = False
    return app


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body.

    Raises:
        HTTPException: 413, as soon as the body is known to be longer than `limit_bytes`.
    """
    # The declared length is checked first: a client with `Expect: 100-continue` then sends no body.
    if declares_more_than(limit_bytes, request.headers.get("content-length", "").encode()):
        raise HTTPException(413)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise HTTPException(413)
    return bytes(body)


async def _error(request: Request, exc: Exception) -> Response:
    status = 500
    headers = {}
    if isinstance(exc, HTTPException):
        status = exc.status_code
        headers = dict(exc.headers or {})  # Starlette's 405 has an Allow header here
    body = msgspec.json.encode({"error": _ERRORS.get(status, "invalid_request")})
    return Response(
        body,
        status,
        headers,
        _JSON,
    )
