"""Tracing with OpenTelemetry: what runner and worker share.

It is imported only if `runner.tracing` is true. Each process has its own provider, made after the
fork, with a thread that sends spans in batches over OTLP/HTTP. The standard OTEL_* variables
apply. Tracing never delays or fails a query: an error costs a span and a throttled log line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.errors import ConfigError
from shared.ipc import Trace
from shared.logs.logger import Logger, LogThrottle, get_logger
from shared.logs.redaction import redact

_FLUSH_S: Final = 1.0
"""The longest time that an exiting process waits for the collector to accept its spans."""

_MIN_FLUSH_S: Final = 0.1
"""The shortest limit of this wait, even if other processes wait for the exit."""

MAX_HEADER_CHARS: Final = 512
"""Longer `traceparent` and `tracestate` headers are ignored. W3C requires no more (3.3.1.5)."""

_MAX_REASON_CHARS: Final = 500

_W3C: Final = TraceContextTextMapPropagator()

Attributes = Mapping[str, str | int]


class Tracing:
    """One process's tracer.

    Args:
        attributes: the attributes of this process's resource, which every span has.

    Attributes:
        provider: makes the tracers of this process.

    Raises:
        ConfigError: if an OTEL_* variable has an invalid value.
    """

    def __init__(self, attributes: Attributes) -> None:
        self._log = get_logger()
        self._throttle = LogThrottle("span_failed")
        # Before the exporter is made, which logs what it cannot read in the environment.
        _redirect_library_logs(_LibraryLogs(self._log))
        is_sending = _check_environ(os.environ)
        try:
            self.provider = TracerProvider(
                resource=_resource(attributes),
                shutdown_on_exit=False,
            )
            if is_sending:
                self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            self._tracer = self.provider.get_tracer("em-runner")
        except Exception as exc:  # noqa: BLE001 - each part of the library raises its own errors
            raise ConfigError(
                f"tracing cannot start: {exc}; see the OTEL_* variables of the environment"
            ) from None

    def start(
        self,
        name: str,
        kind: SpanKind,
        attributes: Attributes,
        parent: SpanContext | None,
    ) -> Span:
        """Start a span. Without a parent it starts a trace. Never raises."""
        try:
            return self._tracer.start_span(
                name,
                _context_of(parent),
                kind,
                attributes,
            )
        except Exception as exc:  # noqa: BLE001 - samplers and processors may be third-party code
            self._report(exc)
            return INVALID_SPAN

    def end(
        self,
        span: Span,
        attributes: Attributes,
        *,
        failed: bool,
    ) -> None:
        """End a span. Never raises."""
        try:
            span.set_attributes(attributes)
            if failed:
                span.set_status(StatusCode.ERROR)
            span.end()
        except Exception as exc:  # noqa: BLE001 - as above
            self._report(exc)

    def close(self, limit_s: float = _FLUSH_S) -> None:
        """Send the remaining spans. Wait for that up to `limit_s`, and from 0.1 to 1 s."""
        # The library's `shutdown` waits for a collector that hangs as long as its own timeouts
        # allow. So it runs on a daemon thread, which does not keep the process from exiting.
        closing = threading.Thread(
            target=self.provider.shutdown,
            name="tracing-end",
            daemon=True,
        )
        try:
            closing.start()
        except RuntimeError:  # no thread is available; these spans are lost
            return
        wait_s = max(limit_s, _MIN_FLUSH_S)
        closing.join(min(wait_s, _FLUSH_S))

    def _report(self, exc: Exception) -> None:
        suppressed = self._throttle.admit(type(exc).__name__)
        if suppressed is not None:
            self._log.error(
                "span_failed",
                exc_info=exc,
                **suppressed,
            )


# --- the environment ---


def _check_environ(environ: Mapping[str, str]) -> bool:
    """Check the OTEL_* variables. Return whether spans are sent to a collector.

    Raises:
        ConfigError: if the environment asks for something that is not supported.
    """
    # The library reads OTEL_TRACES_EXPORTER and the protocols only in its command-line launcher. A
    # value that has no effect would be an error that no one notices, so unsupported ones are
    # rejected here.
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER: found {exporter!r}, expected otlp or none")
    for name, protocol in _settings(environ, "PROTOCOL"):
        if protocol not in ("", "http/protobuf"):
            raise ConfigError(
                f"{name}: found {protocol!r}, expected http/protobuf, "
                "which collectors accept at port 4318"
            )
    for name, endpoint in _settings(environ, "ENDPOINT"):
        if endpoint and not re.match(r"https?://[^/]", endpoint):
            # Without the value, which may have a password in an unexpected place.
            raise ConfigError(f"{name}: found no URL, expected one such as http://localhost:4318")
    if not all(value.isprintable() for value in _header_values(environ)):
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_HEADERS: found a character that no header may have; "
            "does a value end with a newline?"
        )
    return exporter != "none"


def _settings(environ: Mapping[str, str], suffix: str) -> list[tuple[str, str]]:
    """Return the names and values of an exporter's setting, for traces and for all signals."""
    names = (
        f"OTEL_EXPORTER_OTLP_TRACES_{suffix}",
        f"OTEL_EXPORTER_OTLP_{suffix}",
    )
    return [(name, environ.get(name, "").strip()) for name in names]


def _header_values(environ: Mapping[str, str]) -> Iterator[str]:
    """Return the values of the headers that exporters send. Most of them are tokens."""
    for _, headers in _settings(environ, "HEADERS"):
        for header in headers.split(","):
            value = header.partition("=")[2].strip()
            yield from (value, unquote(value))


def _endpoint_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Return the parts of the collectors' URLs that may be secret."""
    for _, endpoint in _settings(environ, "ENDPOINT"):
        with contextlib.suppress(ValueError):
            url = urlsplit(endpoint)
            credentials = url.netloc.rpartition("@")[0]
            # The query may have an API key. The password is listed also without its user, because
            # a message may quote it alone.
            secrets = (
                credentials,
                url.password,
                url.query,
                url.fragment,
            )
            for secret in filter(None, secrets):
                yield from (secret, unquote(secret))


def _resource(attributes: Attributes) -> Resource:
    # Without a name the library would use `unknown_service`.
    service = OTELResourceDetector().detect().attributes.get("service.name") or "em-runner"
    return Resource.create(
        {
            "service.name": service,
            "service.instance.id": str(uuid4()),
            "process.pid": os.getpid(),
            **attributes,
        }
    )


# --- the library's own log ---


class _LibraryLogs(logging.Handler):
    """Logs OpenTelemetry's warnings as events, at most one a minute for each logger."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._throttle = LogThrottle("tracing_failed")

    def emit(self, record: logging.LogRecord) -> None:
        suppressed = self._throttle.admit(record.name)
        if suppressed is None:
            return
        # `opentelemetry.util.re` quotes headers of the environment that it cannot parse. They may
        # have tokens in a form that redaction does not find, so the headers are left out.
        is_quoting = record.name == "opentelemetry.util.re"
        text = str(record.msg) if is_quoting else record.getMessage()
        text = redact(
            text,
            *_header_values(os.environ),
            *_endpoint_secrets(os.environ),
        )
        reason = " ".join(text.split())[:_MAX_REASON_CHARS]
        self._log.warning(
            "tracing_failed",
            reason=reason,
            library=record.name,
            **suppressed,
        )


def _redirect_library_logs(handler: logging.Handler) -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers[:] = [handler]
    library.propagate = False


def warm_up() -> None:
    """Make the library import now what it imports at its first use. Opens no socket or thread."""
    _redirect_library_logs(logging.NullHandler())
    OTLPSpanExporter()


# --- traces across processes ---


def trace_of(span: Span) -> Trace:
    """Return the trace that makes a span the parent of another process's spans."""
    headers: dict[str, str] = {}
    _W3C.inject(headers, set_span_in_context(span, Context()))
    return headers.get("traceparent", ""), headers.get("tracestate", "")


def parent_of(trace: Trace) -> SpanContext | None:
    """Return the parent that a client or the runner names, or None if it is invalid or absent."""
    # Some versions of the library parse a `tracestate` in quadratic time. A client could hold up
    # the runner with a long one, so long headers are dropped before they are parsed.
    parent, state = (header if len(header) <= MAX_HEADER_CHARS else "" for header in trace)
    headers = {"traceparent": parent, "tracestate": state}
    span = get_current_span(_W3C.extract(headers, Context()))
    context = span.get_span_context()
    return context if context.is_valid else None


def _context_of(parent: SpanContext | None) -> Context:
    """Return a context with this parent as its current span, or without a current span."""
    # Without a context, the library would take the current span of the calling task as the parent.
    empty = Context()
    if parent is None:
        return empty
    return set_span_in_context(NonRecordingSpan(parent), empty)
