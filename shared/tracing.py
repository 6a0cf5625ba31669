"""Tracing with OpenTelemetry: what runner and worker share of it. Imported only where `runner.tracing` is true.

Each process has a provider of its own, made after its fork, whose thread sends spans in batches over
OTLP/HTTP. What the standard OTEL_* variables say holds. Nothing here may delay or fail a query: what
goes wrong with a trace costs that trace, and a line in the log that is folded.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)

from shared.errors import ConfigError
from shared.ipc import NO_TRACE, Trace
from shared.logs import Folded, Logger, get_logger
from shared.redaction import redact

FLUSH_S: Final = 1.0
"""How long a process that ends in good order waits at the most for its last spans to be taken."""

HURRIED_FLUSH_S: Final = 0.1
"""The same when others wait for its end, or the collector takes nothing anyway."""

MAX_HEADER: Final = 512
"""The longest `traceparent` and `tracestate` that are taken from a client: W3C asks for no more (3.3.1.5)."""

MAX_MEMBERS: Final = 32

# W3C Trace Context, 3.2.2 and 3.3.1.3.
_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[\x21-\x7e]*)?")
_KEY: Final = re.compile(r"[a-z][_0-9a-z*/-]{0,255}|[a-z0-9][_0-9a-z*/-]{0,240}@[a-z][_0-9a-z*/-]{0,13}")
_VALUE: Final = re.compile(r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")

Attributes = Mapping[str, str | int]


class Tracing:
    """One process's tracer.

    Args:
        attributes: what every span of this process is told with, of its resource.

    Raises:
        ConfigError: when an OTEL_* variable holds what cannot be.
    """

    def __init__(self, attributes: Attributes) -> None:
        self._log = get_logger("tracing")
        self._folded = Folded(what="tracing_fault")
        _listen_to_library(_Told(self._log))
        sending = sends(os.environ)
        try:
            self._exporter = _Exporter()
            self._provider = TracerProvider(resource=_resource(attributes), shutdown_on_exit=False)
            if sending:
                self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
            self._tracer = self._provider.get_tracer("em-runner")
        except Exception as exc:  # noqa: BLE001 - each part has its own way to refuse
            raise ConfigError(f"tracing cannot begin: {exc}; see the OTEL_* variables of the environment") from None

    @property
    def provider(self) -> TracerProvider:
        """What makes the tracers of this process."""
        return self._provider

    def begin(self, name: str, kind: SpanKind, attributes: Attributes, parent: SpanContext | None) -> Span:
        """Begin a span; without a parent, a trace. Never raises."""
        try:
            return self._tracer.start_span(name, context_of(parent), kind, attributes)
        except Exception as exc:  # noqa: BLE001 - samplers and processors may be anybody's
            self._tell(exc)
            return INVALID_SPAN

    def end(self, span: Span, attributes: Attributes, *, failed: bool) -> None:
        """End a span. Never raises."""
        try:
            span.set_attributes(attributes)
            if failed:
                span.set_status(StatusCode.ERROR)
            span.end()
        except Exception as exc:  # noqa: BLE001 - as above
            self._tell(exc)

    def close(self, limit_s: float = FLUSH_S) -> None:
        """Send what has not been sent, for as long as there is, and less where nothing is taken anyway.

        Args:
            limit_s: how long the process may take for it; it gets a moment also where that is nothing.
        """
        # On a thread that may be left behind: the library waits for its collector as long as that likes.
        most_s = HURRIED_FLUSH_S if self._exporter.troubled else FLUSH_S
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # no thread is to be had
            return
        closing.join(max(HURRIED_FLUSH_S, min(limit_s, most_s)))

    def _tell(self, exc: Exception) -> None:
        if self._folded.admit(type(exc).__name__) is not None:
            self._log.error("tracing_fault", exc_info=exc)


def sends(environ: Mapping[str, str]) -> bool:
    """Return whether spans are sent: the library itself looks at none of these, but in its command-line launcher.

    Raises:
        ConfigError: when the environment asks for what is not here.
    """
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER: found {exporter!r}, expected otlp or none")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise ConfigError(f"{name}: found {protocol!r}, expected http/protobuf; collectors take it at port 4318")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        endpoint = environ.get(name, "").strip()
        if endpoint and not re.match(r"https?://[^/]", endpoint):
            raise ConfigError(f"{name}: found no URL, expected one such as http://localhost:4318")
    if any(not value.isprintable() for value in _header_values(environ)):
        raise ConfigError("the OTEL_EXPORTER_OTLP_HEADERS hold a character that no header can; is there a line's end?")
    return exporter != "none"


def _header_values(environ: Mapping[str, str]) -> Iterator[str]:
    """Return what the environment has exporters send as headers: tokens, mostly."""
    for name in ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"):
        for header in environ.get(name, "").split(","):
            value = header.partition("=")[2].strip()
            yield from (value, unquote(value))


def _endpoint_secrets(environ: Mapping[str, str]) -> Iterator[str]:
    """Return what a collector's address may hold of secrets: a user with a password, and what follows its path."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        with contextlib.suppress(ValueError):
            parts = urlsplit(environ.get(name, ""))
            for secret in (parts.netloc.rpartition("@")[0], parts.password, parts.query, parts.fragment):
                if secret:
                    yield from (secret, unquote(secret))


class _Exporter(OTLPSpanExporter):
    """The library's, which also knows whether anybody takes what it sends."""

    def __init__(self) -> None:
        super().__init__()
        self._failed = False
        self._since_s: float | None = None

    @property
    def troubled(self) -> bool:
        """Whether the last spans were not taken, or those on their way have been for long."""
        since_s = self._since_s
        return self._failed or (since_s is not None and time.monotonic() - since_s > FLUSH_S)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. On the thread that does only this."""
        self._since_s = time.monotonic()
        taken = False
        try:
            result = super().export(spans)
            taken = result is SpanExportResult.SUCCESS
            return result
        finally:
            self._since_s, self._failed = None, not taken


class _Told(logging.Handler):
    """Has what OpenTelemetry says appear in the log as our own lines do, once a minute for each of its parts."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self._folded = Folded(what="tracing_trouble")

    def emit(self, record: logging.LogRecord) -> None:
        held = self._folded.admit(record.name)
        if held is None:
            return
        # That part quotes headers of the environment that it cannot read, and they hold tokens.
        words = str(record.msg) if record.name == "opentelemetry.util.re" else record.getMessage()
        words = redact(words, *_header_values(os.environ), *_endpoint_secrets(os.environ))
        more = {"like_it_before": held} if held else {}
        self._log.warning("tracing_trouble", why=" ".join(words.split())[:500], library=record.name, **more)


def _listen_to_library(handler: logging.Handler) -> None:
    library = logging.getLogger("opentelemetry")
    library.handlers[:] = [handler]
    library.propagate = False


def _resource(attributes: Attributes) -> Resource:
    named = OTELResourceDetector().detect().attributes.get("service.name") or "em-runner"
    return Resource.create(
        {"service.name": named, "service.instance.id": str(uuid4()), "process.pid": os.getpid(), **attributes}
    )


def rehearse() -> None:
    """Have the library import what it imports at its first use. Leaves no thread, no socket and no word behind."""
    _listen_to_library(logging.NullHandler())
    OTLPSpanExporter()


# --- a trace on its way ---


def context_of(parent: SpanContext | None) -> Context:
    """Return a context in which a parent is the current span, or none is."""
    return Context() if parent is None else set_span_in_context(NonRecordingSpan(parent), Context())


def written(span: Span) -> Trace:
    """Return what makes a span the parent of another process's spans."""
    context = span.get_span_context()
    if not context.is_valid:
        return NO_TRACE
    ids = f"{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}"
    return f"00-{ids}-{context.trace_flags:02x}", context.trace_state.to_header()


def read(trace: Trace) -> SpanContext | None:
    """Return the parent that a client or the runner names, or None: what cannot be read begins a new trace."""
    found = _PARENT.fullmatch(trace[0]) if len(trace[0]) <= MAX_HEADER else None
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    context = SpanContext(
        int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16) & 0x03), _read_state(trace[1])
    )
    return context if context.is_valid else None


def _read_state(header: str) -> TraceState | None:
    """Return the members of a `tracestate`; one that is wrong, or too many, and all are dropped (3.3.1)."""
    if not header or len(header) > MAX_HEADER:
        return None
    members = [member.strip(" \t") for member in header.split(",")]
    pairs = [(key, value) for key, mark, value in (member.partition("=") for member in members if member) if mark]
    if len(pairs) != len([member for member in members if member]) or len(pairs) > MAX_MEMBERS:
        return None
    if len({key for key, _ in pairs}) < len(pairs):
        return None
    if not all(_KEY.fullmatch(key) and _VALUE.fullmatch(value) for key, value in pairs):
        return None
    return TraceState(pairs)
