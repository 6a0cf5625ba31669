"""GET /: the status page, its style and script, and the events that keep it up to date."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runner.supervision.supervisor import Supervisor
from runner.web.answers import unavailable
from runner.web.dashboard import ASSETS
from runner.web.dashboard._view import (
    LIST_THRESHOLD,
    SPARK_HEIGHT,
    SPARK_WIDTH,
    View,
    not_ready,
    update,
    views,
)
from shared.http.errors import ErrorCode

if TYPE_CHECKING:
    from jinja2 import Template

_TICK_S: Final = 0.5
"""How often a stream looks for changes."""

# The page's script reports that the runner is gone after 6 s without an event (`SILENCE_MS`).
_QUIET_S: Final = 2.0
"""After this time without a change, an event without changes is sent."""

# Each stream keeps a connection and a file descriptor.
MAX_STREAMS: Final = 64
"""How many pages may be kept up to date at once."""

_EVENT_STREAM: Final = "text/event-stream"

_FOLDER: Final = Path(__file__).parent
_HEADERS: Final = {
    # Only the runner's own files, and no inline script. A text of a node or a handler that contains
    # markup cannot run as a script, even if the page failed to escape it. No other page may frame
    # this one, or a user could be tricked into clicking its buttons.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


class Dashboard:
    """The page and its events.

    Args:
        supervisor: has the running workers.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._views: list[View] = []
        self._viewed_s = float("-inf")
        self._streams = 0
        self._closing = anyio.Event()
        self._template: Template | None = None
        self.routes = [
            Route("/", self._page),
            Route("/events", self._events),
            *(Route(f"/assets/{name}", self._asset) for name in ASSETS),
        ]

    def close(self) -> None:
        """End the streams of events."""
        self._closing.set()

    async def _page(self, request: Request) -> Response:
        if self._template is None:
            # Not at the start: most runners' pages are never opened. On a thread, because queries
            # must not wait for the import of Jinja.
            self._template = await anyio.to_thread.run_sync(_template)
        rows = self._current_views()
        state = update(rows, {})
        groups = groupby(rows, lambda row: row.agent)
        # Lists, because the template iterates over the groups twice.
        agents = [(agent, list(workers)) for agent, workers in groups]
        page = self._template.render(
            agents=agents,
            version=state.version,
            summary=state.summary,
            table_id=state.table_id,
            not_ready=not_ready(rows),
            list_threshold=LIST_THRESHOLD,
            spark_width=SPARK_WIDTH,
            spark_height=SPARK_HEIGHT,
        )
        return Response(page, media_type="text/html", headers=_HEADERS)

    async def _asset(self, request: Request) -> Response:
        # Only the paths in `ASSETS` are routed here, so the name cannot leave the folder.
        name = request.url.path.rpartition("/")[2]
        return FileResponse(_FOLDER / name, headers=_HEADERS)

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type=_EVENT_STREAM, headers=_HEADERS)
        if self._streams >= MAX_STREAMS:
            text = (
                f"{MAX_STREAMS} pages are kept up to date already; GET /workers has the same data"
            )
            return unavailable(ErrorCode.TOO_MANY_STREAMS, text).response()
        return _Stream(self)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield an event with all workers, and then one for each change."""
        sent: dict[str, View] = {}
        sent_s = float("-inf")
        while True:
            # Read before the workers, so that the last event has their last states.
            closing = self._closing.is_set()
            rows = self._current_views()
            event = update(rows, sent)
            removed = len(rows) != len(sent)
            quiet = time.monotonic() - sent_s >= _QUIET_S
            if event.changed or removed or quiet:
                yield b"data: %b\n\n" % msgspec.json.encode(event)
                sent_s = time.monotonic()
                sent = {row.name: row for row in rows}
            if closing:
                return
            with anyio.move_on_after(_TICK_S):
                await self._closing.wait()

    def _current_views(self) -> list[View]:
        # All streams share the views for half a tick: the cost does not grow with the open pages,
        # and no page gets views that are nearly a tick old.
        now_s = time.monotonic()
        if now_s - self._viewed_s >= _TICK_S / 2 or self._closing.is_set():
            self._views = views(self._supervisor.rows, self._supervisor.rates)
            self._viewed_s = now_s
        return self._views

    @contextmanager
    def counted_stream(self) -> Iterator[None]:
        """Count a stream while it is served."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


class _Stream(StreamingResponse):
    """The events for one page."""

    def __init__(self, dashboard: Dashboard) -> None:
        # `x-accel-buffering`: nginx would otherwise hold events back until its buffer is full.
        super().__init__(
            dashboard.stream(),
            media_type=_EVENT_STREAM,
            headers={**_HEADERS, "x-accel-buffering": "no"},
        )
        self._dashboard = dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._dashboard.counted_stream():
            await super().__call__(scope, receive, send)


def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
