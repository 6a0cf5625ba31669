"""A span for each query, from the dispatcher to the answer. The handler's own spans are below it.

A query from the runner continues the trace that its message names. A query from a node starts one.
This module observes the dispatcher if `runner.tracing` is true, and is imported only then. A span
contains the type of a failure but not its message, which could quote the query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, set_span_in_context, set_tracer_provider

from shared.ipc import Launch, Outcome
from shared.tracing import Tracing, parent_of
from worker.dispatching.dispatch import CURRENT_SLOT
from worker.dispatching.handler import Handler
from worker.dispatching.jobs import Answer, Job, TracedJob

_NO_CONTEXT: Final = Context()


class WorkerTracing(Tracing):
    """A worker's tracer. It is also the tracer of this process that the handler's libraries use.

    Raises:
        ConfigError: if an OTEL_* variable has an invalid value.
    """

    def __init__(self, launch: Launch) -> None:
        spec = launch.spec
        super().__init__(
            {"em_runner.worker": spec.name, "em_runner.incarnation": launch.incarnation}
        )
        set_tracer_provider(self.provider)
        self._name = f"query {spec.agent.name}"
        self._attributes = {
            "em_runner.agent": spec.agent.name,
            "em_runner.worker": spec.name,
            "em_runner.node": str(spec.node),
        }
        self._open_spans: dict[Job, _OpenSpan] = {}

    def within_span(self, handler: Handler) -> Handler:
        """Return a handler whose own spans are children of its query's span."""
        handle = handler.handle

        async def handle_async(
            body: str,
            memory: dict[Any, Any],
        ) -> Any:
            with self._query_context():
                return await handle(body, memory)

        def handle_plain(
            body: str,
            memory: dict[Any, Any],
        ) -> Any:
            with self._query_context():
                return handle(body, memory)

        wrapper = handle_async if handler.is_async else handle_plain
        return msgspec.structs.replace(handler, handle=wrapper)

    @contextmanager
    def _query_context(self) -> Iterator[None]:
        """Make the span of this slot's query the current span."""
        slot = CURRENT_SLOT.get(None)
        job = None if slot is None else slot.job
        open_span = None if job is None else self._open_spans.get(job)
        # The span of a query that was settled before its handler is called has already ended.
        context = _NO_CONTEXT if open_span is None else open_span.context
        token = attach(context)
        try:
            yield
        finally:
            detach(token)

    def submitted(self, job: Job) -> None:
        """Start the span of a query."""
        if isinstance(job, TracedJob):
            source = "direct"
            kind = SpanKind.INTERNAL
            parent = parent_of(job.trace)
        else:
            # A SERVER span is expected to have the client's span as its parent. A node sends none,
            # so the kind is CONSUMER.
            source = "node"
            kind = SpanKind.CONSUMER
            parent = None
        attributes = self._attributes | {"em_runner.source": source}
        span = self.start(
            self._name,
            kind,
            attributes,
            parent,
        )
        self._open_spans[job] = _OpenSpan(span)

    def failed(self, job: Job, exc: BaseException) -> None:
        """Keep the type of what the handler raised."""
        open_span = self._open_spans.get(job)
        if open_span is not None:
            open_span.error_type = type(exc).__name__

    def settled(self, job: Job, answer: Answer) -> None:
        """End the span of a query."""
        open_span = self._open_spans.pop(job, None)
        if open_span is None:
            return
        outcome = answer[0]
        attributes = {"em_runner.outcome": outcome.label}
        failed = outcome in (Outcome.HANDLER_FAILED, Outcome.TIMED_OUT)
        if failed:
            error_type = outcome.label
            # A handler's thread may raise just before the timeout settles the job. Then the error
            # is the timeout.
            if outcome is Outcome.HANDLER_FAILED and open_span.error_type is not None:
                error_type = open_span.error_type
            attributes["error.type"] = error_type
        self.end(open_span.span, attributes, failed=failed)


class _OpenSpan:
    """The span of a query that is not settled, and the type of the exception of its handler."""

    __slots__ = ("context", "error_type", "span")

    def __init__(self, span: Span) -> None:
        self.span = span
        self.context = set_span_in_context(span, _NO_CONTEXT)
        self.error_type: str | None = None
