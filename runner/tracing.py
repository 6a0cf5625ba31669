"""A span for each direct query. The worker gets its trace context.

`TracedExchange` replaces `QueryExchange` if `runner.tracing` is true. This module is imported only
then. No span contains the text of a query.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.trace import INVALID_SPAN, Span, SpanKind

from runner.routing.peers import Reply
from runner.web.direct import DirectQueries, PathNames, QueryExchange
from shared.http.exchange import Channel
from shared.http.head import Headers, RequestHead
from shared.ipc import NO_TRACE, Outcome, Trace
from shared.tracing import Tracing, parent_of, trace_of

_MAX_PATH: Final = 256
"""Spans have only this many bytes of a path: a client may send one as long as a whole head."""


class TracedExchange(QueryExchange):
    """One direct query with a span.

    The span starts when all earlier requests of the connection are answered, and ends with the
    query's own answer.
    """

    __slots__ = ("_end_attributes", "_span", "_tracing", "trace")

    def __init__(
        self,
        tracing: Tracing,
        queries: DirectQueries,
        head: RequestHead,
        channel: Channel,
        names: PathNames,
    ) -> None:
        super().__init__(
            queries,
            head,
            channel,
            names,
        )
        self._tracing = tracing
        self._span: Span = INVALID_SPAN
        self._end_attributes: dict[str, str | int] = {}
        self.trace: Trace = NO_TRACE

    def start(self) -> None:
        """Start the span, and the answer."""
        route = _route(self.names)
        path = self.head.url.partition(b"?")[0]
        attributes = {
            "http.request.method": "POST",
            "http.route": route,
            "url.path": path[:_MAX_PATH].decode("latin-1"),
            "url.scheme": "http",
            "em_runner.source": "direct",
        }
        parent = parent_of(_trace_in(self.head.headers))
        self._span = self._tracing.start(
            f"POST {route}",
            SpanKind.SERVER,
            attributes,
            parent,
        )
        self.trace = trace_of(self._span)
        super().start()

    def proceed(self) -> None:
        """Continue. If the client has disconnected, end the span without an answer."""
        super().proceed()
        if self.disconnected and not self.response_complete:
            self._end_attributes["em_runner.outcome"] = Outcome.CANCELLED.label
            self._end(failed=False)

    def answer(self, status: int, headers: bytes, *body: bytes) -> None:
        """Answer, and end the span. A status of 500 or more is an error of the span."""
        self._end_attributes["http.response.status_code"] = status
        # OpenTelemetry's conventions for HTTP servers: 4xx is the client's error, not the span's.
        failed = status >= 500
        if failed:
            # `on_reply` may have set the more specific outcome already.
            self._end_attributes.setdefault("error.type", str(status))
        self._end(failed=failed)
        super().answer(status, headers, *body)

    def on_reply(self, reply: Reply) -> None:
        """Record how the query ended, and answer."""
        self._end_attributes["em_runner.worker"] = reply.worker
        self._end_attributes["em_runner.outcome"] = reply.outcome.label
        if reply.outcome is not Outcome.OK:
            self._end_attributes["error.type"] = reply.outcome.label
        super().on_reply(reply)

    def _end(self, *, failed: bool) -> None:
        # A query may be answered before its client disconnects: only the first of both ends the
        # span.
        span, self._span = self._span, INVALID_SPAN
        if span is not INVALID_SPAN:
            self._tracing.end(span, self._end_attributes, failed=failed)


def _trace_in(headers: Headers) -> Trace:
    """Return the trace context in a request's headers."""
    # `traceparent` cannot be combined, so several are invalid (W3C Trace Context, 3.2). Several
    # `tracestate` headers are one list (3.3, with RFC 9110, 5.2).
    parents = [value for name, value in headers if name == b"traceparent"]
    if len(parents) != 1:
        return NO_TRACE
    states = b",".join(value for name, value in headers if name == b"tracestate")
    return parents[0].decode("latin-1"), states.decode("latin-1")


def _route(names: PathNames) -> str:
    # A template, not the path: `http.route` has few values, so that collectors can group by it.
    agent, worker = names
    if worker is not None:
        return "/workers/{worker}/query"
    if agent is not None:
        return "/agents/{agent}/query"
    return "/agent/query"
