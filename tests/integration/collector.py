"""A collector of traces (OTLP over HTTP) on a thread. It accepts spans, or hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Wire
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.cluster import until

ROOT = ""
"""The parent id of a span without a parent."""


class Span(NamedTuple):
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Collector:
    """The spans that have arrived."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.bodies: list[bytes] = []
        self.asked = threading.Event()
        self.open = threading.Event()
        self.open.set()

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a runner that sends its spans here immediately."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url,
            "OTEL_BSP_SCHEDULE_DELAY": "20",
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def spans(self) -> list[Span]:
        found = []
        for body in list(self.bodies):
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _values(of_resource.resource.attributes)
                for scope in of_resource.scope_spans:
                    found += [_span(wire, resource) for wire in scope.spans]
        return found

    async def have(self, *names: str) -> list[Span]:
        """Wait until each of these spans has arrived as often as named. Return them in order."""

        def came() -> list[Span] | None:
            left, found = self.spans, []
            for name in names:
                span = next((span for span in left if span.name == name), None)
                if span is None:
                    return None
                left.remove(span)
                found.append(span)
            return found

        return await until(came, f"these spans have arrived: {names}")


def _span(wire: Wire, resource: dict[str, Any]) -> Span:
    return Span(
        wire.name,
        Wire.SpanKind.Name(wire.kind).removeprefix("SPAN_KIND_"),
        wire.trace_id.hex(),
        wire.span_id.hex(),
        wire.parent_span_id.hex(),
        wire.trace_state,
        wire.status.code == Status.STATUS_CODE_ERROR,
        _values(wire.attributes),
        resource,
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            collector.asked.set()
            collector.open.wait()
            collector.bodies.append(body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # the client has disconnected
                return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        collector = Collector(server)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield collector
        finally:
            collector.open.set()
            server.shutdown()
            thread.join()
