"""A span for each direct query, from its head to its answer, and its trace handed on to the worker.

These stand in the places of `Router` and `QueryExchange` where `runner.tracing` is true, and are
imported only there. The text of a query is no part of a span.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from runner.direct import DirectQueries, Named, QueryExchange
from runner.lines import Ending, Pending, Reply
from runner.router import Router
from shared import ipc
from shared.http_connection import HttpConnection
from shared.http_head import Headers
from shared.ipc import NO_TRACE, Trace
from shared.tracing import Tracing, read, written

_MAX_PATH: Final = 256
"""Names in a path may be as long as a head; of one that leads nowhere the begin says enough."""


class RunnerTracing(Tracing):
    """The runner's tracer.

    Raises:
        ConfigError: when an OTEL_* variable holds what cannot be.
    """

    def __init__(self) -> None:
        super().__init__({})

    @property
    def router(self) -> type[Router]:
        """What carries queries to workers."""
        return TracedRouter

    def exchange(self, queries: DirectQueries, connection: HttpConnection, named: Named) -> QueryExchange:
        """Return what answers one query."""
        return TracedExchange(queries, connection, named, self)


class TracedRouter(Router):
    """A router whose queries take their traces with them."""

    def _message(self, queries: list[Pending]) -> ipc.RunnerMessage:
        return ipc.TracedQueries([(each.sequence, each.query, *each.trace) for each in queries])


class TracedExchange(QueryExchange):
    """One direct query, with a span from its turn on the connection to its answer."""

    __slots__ = ("_details", "_parent", "_path", "_span", "_tracing", "trace")

    def __init__(
        self, queries: DirectQueries, connection: HttpConnection, named: Named, tracing: RunnerTracing
    ) -> None:
        super().__init__(queries, connection, named)
        self._tracing = tracing
        self._span: Span = INVALID_SPAN
        self._details: dict[str, str | int] = {}
        self.trace: Trace = NO_TRACE
        # Now, while the parser has this request's headers and no trailers; see `QueryExchange`.
        self._parent = read(_trace_in(connection.headers))
        self._path = connection.url.partition(b"?")[0][:_MAX_PATH].decode("latin-1")

    def start(self) -> None:
        """Begin the span, and the answer."""
        route = _route(self._named)
        attributes = {
            "http.request.method": "POST",
            "http.route": route,
            "url.path": self._path,
            "url.scheme": "http",
            "em_runner.transport": "http",
        }
        self._span = self._tracing.begin(f"POST {route}", SpanKind.SERVER, attributes, self._parent)
        self.trace = written(self._span)
        super().start()

    def proceed(self) -> None:
        """Go on; when the client has gone, the span ends without an answer."""
        super().proceed()
        if self.disconnected and not self.response_complete:
            self._end({"em_runner.outcome": "withdrawn"}, failed=False)

    def answer(self, status: int, headers: bytes, *body: bytes) -> None:
        """Answer, and end the span."""
        self._details["http.response.status_code"] = status
        failed = status >= 500
        if failed:
            self._details.setdefault("error.type", str(status))
        self._end(self._details, failed=failed)
        super().answer(status, headers, *body)

    def _on_reply(self, reply: Reply) -> None:
        self._details["em_runner.worker"] = reply.worker
        self._details["em_runner.outcome"] = reply.ending.value
        if reply.ending is not Ending.OK:
            self._details["error.type"] = reply.ending.value
        super()._on_reply(reply)

    def _end(self, attributes: dict[str, str | int], *, failed: bool) -> None:
        span, self._span = self._span, INVALID_SPAN
        if span is not INVALID_SPAN:
            self._tracing.end(span, attributes, failed=failed)


def _trace_in(headers: Headers) -> Trace:
    """Return the trace that a request's headers name. Several parents are none; states add up (RFC 9110, 5.2)."""
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return NO_TRACE
    states = b",".join(value for name, value in headers if name == b"tracestate")
    return parents[0].decode("latin-1"), states.decode("latin-1")


def _route(named: Named) -> str:
    if named[1] is not None:
        return "/workers/{worker}/query"
    return "/agent/query" if named[0] is None else "/agents/{agent}/query"
