"""GET / and what belongs to it: the page, its style and script, and the events that keep it up to date."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
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

from runner.answers import unavailable
from runner.dashboard import ASSETS
from runner.dashboard.view import (
    GLANCE,
    SPARK_HEIGHT,
    SPARK_WIDTH,
    Update,
    View,
    changes,
    layout,
    summary,
    troubled,
    views,
)
from runner.metrics import version
from runner.table import WorkerRow

if TYPE_CHECKING:
    from jinja2 import Template

TICK_S: Final = 0.5
"""How long a change may take to be told."""

QUIET_S: Final = 2.0
"""After so long without a change it is told that nothing has: a page that hears nothing for longer calls us gone."""

MAX_STREAMS: Final = 64
"""How many pages may be kept up to date at once."""

EVENT_STREAM: Final = "text/event-stream"

_FOLDER: Final = Path(__file__).parent
_HEADERS: Final = {
    # Nothing but our own files, and nothing in the page itself: what a node or a handler says stays text.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
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
        rows: returns the table of workers.
        rates: returns each worker's queries a second in the steps of the last five minutes.
    """

    def __init__(
        self, rows: Callable[[], Sequence[WorkerRow]], rates: Callable[[], Mapping[str, Sequence[float]]]
    ) -> None:
        self._rows = rows
        self._rates = rates
        self._views: list[View] = []
        self._viewed_s = float("-inf")
        self._streams = 0
        self._over = anyio.Event()
        self._template: Template | None = None
        self.routes = [
            Route("/", self._page),
            Route("/events", self._events),
            *(Route(f"/assets/{name}", self._asset) for name in ASSETS),
        ]

    def close(self) -> None:
        """End the streams of events."""
        self._over.set()

    async def _page(self, request: Request) -> Response:
        if self._template is None:
            # Not at the start, and not on the loop: most runners are never looked at, and queries must not wait.
            self._template = await anyio.to_thread.run_sync(_template)
        rows = self._now()
        agents = [(agent, list(workers)) for agent, workers in groupby(rows, lambda row: row.agent)]
        page = self._template.render(
            agents=agents,
            version=version(),
            summary=summary(rows),
            layout=layout(rows),
            troubled=troubled(rows),
            glance=GLANCE,
            spark_width=SPARK_WIDTH,
            spark_height=SPARK_HEIGHT,
        )
        return Response(page, media_type="text/html", headers=_HEADERS)

    async def _asset(self, request: Request) -> Response:
        return FileResponse(_FOLDER / request.url.path.rpartition("/")[2], headers=_HEADERS)

    async def _events(self, request: Request) -> Response:
        if request.method == "HEAD":
            return Response(media_type=EVENT_STREAM, headers=_HEADERS)
        if self._streams >= MAX_STREAMS:
            return unavailable(f"{MAX_STREAMS} pages are kept up to date already; GET /workers has the same").response()
        return _Stream(self)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the table, and then what changes in it."""
        sent: dict[str, View] = {}
        told_s = float("-inf")
        while True:
            over = self._over.is_set()  # what is told after that is the last there is to tell
            rows = self._now()
            changed = [cells for row in rows if (cells := changes(sent.get(row.name), row))]
            if changed or len(rows) != len(sent) or time.monotonic() - told_s >= QUIET_S:
                update = Update(version=version(), summary=summary(rows), layout=layout(rows), changed=changed)
                yield b"data: %b\n\n" % msgspec.json.encode(update)
                told_s = time.monotonic()
                sent = {row.name: row for row in rows}
            if over:
                return
            with anyio.move_on_after(TICK_S):
                await self._over.wait()

    def _now(self) -> list[View]:
        """Return what there is to see: made once for all who look at the same time."""
        now_s = time.monotonic()
        if now_s - self._viewed_s >= TICK_S / 2 or self._over.is_set():
            self._views = views(self._rows(), self._rates())
            self._viewed_s = now_s
        return self._views

    @contextmanager
    def one_more_stream(self) -> Iterator[None]:
        """Count a stream for as long as it is served."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1


class _Stream(StreamingResponse):
    """The events for one page."""

    def __init__(self, dashboard: Dashboard) -> None:
        # `x-accel-buffering`: nginx would keep events until it has some kilobytes of them.
        super().__init__(dashboard.stream(), media_type=EVENT_STREAM, headers={**_HEADERS, "x-accel-buffering": "no"})
        self._dashboard = dashboard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._dashboard.one_more_stream():
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
