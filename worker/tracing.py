"""A span for each query in its worker, from the dispatcher to the answer; the handler's own spans are below it.

A query that came by the runner continues the trace that the runner's message names; a node's begins one.
These stand in the places of `Link` and the dispatchers where `runner.tracing` is true, and are imported only
there. A span says of what kind a failure was, and never its words: they could hold the query's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Final

import msgspec
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanKind, set_span_in_context, set_tracer_provider

from shared import ipc
from shared.config import WorkerSpec
from shared.ipc import Counters, Launch, Outcome, Trace
from shared.tracing import Tracing, read
from worker.dispatch import Dispatcher, Lane
from worker.handler import Handler
from worker.jobs import Answer, Job, Source
from worker.link import Link
from worker.loop_dispatcher import LoopDispatcher, TaskLane
from worker.memory import Memory
from worker.thread_dispatcher import ThreadDispatcher

_LANE: Final[ContextVar[Lane | None]] = ContextVar("lane", default=None)
"""Where the handler runs: a task's or a thread's own."""

_NO_CONTEXT: Final = Context()


class WorkerTracing(Tracing):
    """A worker's tracer, which the handler's libraries find as the process's own.

    Raises:
        ConfigError: when an OTEL_* variable holds what cannot be.
    """

    def __init__(self, launch: Launch) -> None:
        spec = launch.spec
        super().__init__({"em_runner.worker": spec.name, "em_runner.incarnation": launch.incarnation})
        set_tracer_provider(self.provider)
        self._name = f"query {spec.agent.name}"
        self._attributes = _attributes(spec)

    def dispatcher_for(
        self, handler: Handler, memory: Memory, counters: Counters, concurrency: int, timeout_s: float | None
    ) -> Dispatcher:
        """Return the dispatcher that a handler's kind asks for; see `Dispatcher` for the arguments."""
        kind = TracedLoopDispatcher if handler.is_async else TracedThreadDispatcher
        dispatcher = kind(handler, memory, counters, concurrency, timeout_s)
        dispatcher.trace_with(self)
        return dispatcher

    def begin_job(self, job: Job) -> Span:
        """Begin the span of a query."""
        if isinstance(job, TracedJob):
            attributes = self._attributes | {"em_runner.transport": "http"}
            return self.begin(self._name, SpanKind.INTERNAL, attributes, read(job.trace))
        # Nobody's child, and no answer to a request that a tracer could have seen: work that came by a queue.
        return self.begin(self._name, SpanKind.CONSUMER, self._attributes | {"em_runner.transport": "node"}, None)

    def end_job(self, span: Span, answer: Answer) -> None:
        """End the span of a query."""
        outcome, payload = answer
        attributes = {"em_runner.outcome": outcome.name.lower()}
        failed = outcome is Outcome.HANDLER_FAILED or outcome is Outcome.TIMED_OUT
        if outcome is Outcome.HANDLER_FAILED:
            attributes["error.type"] = payload.partition(b":")[0].decode("utf-8", "replace")
        elif outcome is Outcome.TIMED_OUT:
            attributes["error.type"] = "timeout"
        self.end(span, attributes, failed=failed)


def _attributes(spec: WorkerSpec) -> dict[str, str]:
    return {"em_runner.agent": spec.agent.name, "em_runner.worker": spec.name, "em_runner.node": str(spec.node)}


class TracedJob(Job):
    """A query that came by the runner, with its trace."""

    __slots__ = ("trace",)

    def __init__(self, source: Source, ticket: Any, body: str, trace: Trace) -> None:
        super().__init__(source, ticket, body)
        self.trace = trace


class TracedLink(Link):
    """A link whose queries come with traces."""

    def _take(self, message: ipc.RunnerMessage, jobs: list[Job]) -> None:
        if not isinstance(message, ipc.TracedQueries):
            super()._take(message, jobs)
            return
        for sequence, query, *trace in message.items:
            self._jobs[sequence] = job = TracedJob(self, sequence, query, (trace[0], trace[1]))
            jobs.append(job)


class _TracedDispatcher(Dispatcher):
    """What both kinds have in common: a span for each job that is not settled yet."""

    def __init__(self, handler: Handler, *arguments: Any, **options: Any) -> None:
        super().__init__(self._within_span(handler), *arguments, **options)
        self._contexts: dict[Job, tuple[Span, Context]] = {}

    def trace_with(self, tracing: WorkerTracing) -> None:
        """Trace. Call it before anything is submitted."""
        self._tracing = tracing

    def _begun(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            span = self._tracing.begin_job(job)
            self._contexts[job] = span, set_span_in_context(span, _NO_CONTEXT)
            yield job

    def _settle(self, job: Job, answer: Answer) -> None:
        if (found := self._contexts.pop(job, None)) is not None:
            self._tracing.end_job(found[0], answer)
        super()._settle(job, answer)

    def _within_span(self, handler: Handler) -> Handler:
        handle = handler.handle

        async def handle_async(body: str, memory: dict[Any, Any]) -> Any:
            token = attach(self._current())
            try:
                return await handle(body, memory)
            finally:
                detach(token)

        def handle_plain(body: str, memory: dict[Any, Any]) -> Any:
            token = attach(self._current())
            try:
                return handle(body, memory)
            finally:
                detach(token)

        return msgspec.structs.replace(handler, handle=handle_async if handler.is_async else handle_plain)

    def _current(self) -> Context:
        """Return the context of the job in the lane that asks."""
        lane = _LANE.get()
        found = None if lane is None or lane.job is None else self._contexts.get(lane.job)
        return _NO_CONTEXT if found is None else found[1]


class TracedLoopDispatcher(_TracedDispatcher, LoopDispatcher):
    """Runs an `async def` handler, traced."""

    def submit(self, jobs: Iterable[Job]) -> None:
        """Begin the spans of jobs, and queue them."""
        super().submit(self._begun(jobs))

    async def _consume(self, lane: TaskLane) -> None:
        _LANE.set(lane)
        await super()._consume(lane)


class TracedThreadDispatcher(_TracedDispatcher, ThreadDispatcher):
    """Runs a plain function, traced."""

    def submit(self, jobs: Iterable[Job]) -> None:
        """Begin the spans of jobs, and queue them."""
        super().submit(self._begun(jobs))

    def _serve(self, lane: Lane) -> None:
        _LANE.set(lane)
        super()._serve(lane)
