"""Direct queries over HTTP: the three POST routes, which have to be fast.

A request goes from the parser to the router, and its reply from the router to the socket, by
callbacks alone. Every error is `{"error": ..., "code": ...}`. The message of an exception in a
handler goes to the log, never to the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote

import httptools
import msgspec

from runner.routing.peers import Reply
from runner.routing.router import Router
from runner.web._guard import Guard, Refusals
from runner.web.answers import CONTENT_TYPE_LINE, ErrorResponse, unavailable
from shared.http.errors import ErrorCode
from shared.http.exchange import Channel, Responder
from shared.http.head import RequestHead, declares_more_than
from shared.ipc import NO_TRACE, Outcome, Trace

MAX_BODY_BYTES: Final = 64 * 1024
_TOO_LARGE: Final = ErrorResponse(
    ErrorCode.BODY_TOO_LARGE,
    f"the body is larger than {MAX_BODY_BYTES} bytes",
)
_BAD_BODY: Final = ErrorResponse(
    ErrorCode.INVALID_BODY,
    "body must be JSON with a 'query' field",
)
_CLOSING: Final = unavailable(
    ErrorCode.SHUTTING_DOWN,
    "the runner is shutting down",
)

_CODES: Final = {
    Outcome.HANDLER_FAILED: ErrorCode.HANDLER_FAILED,
    Outcome.TIMED_OUT: ErrorCode.TIMED_OUT,
    Outcome.WORKER_UNAVAILABLE: ErrorCode.WORKER_UNAVAILABLE,
    Outcome.WORKER_BUSY: ErrorCode.WORKER_BUSY,
}


class QueryBody(msgspec.Struct):
    """The body of a direct query. Other fields are ignored."""

    query: str
    agent: str | None = None
    worker: str | None = None


_decode_body = msgspec.json.Decoder(QueryBody).decode

PathNames = tuple[str | None, str | None]
"""The agent and the worker that a path names. It names at most one of them."""


class _Directory:
    """The agents and their workers, and which worker gets a query.

    Args:
        router: knows which workers are up.
        agents: each agent's workers, in the order in which they are chosen.
    """

    def __init__(
        self,
        router: Router,
        agents: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._router = router
        self._agents = agents
        self._agent_of: dict[str, str] = {}
        # Every path that a usual request has, so that a query costs one look-up.
        self._paths: dict[bytes, PathNames] = {b"/agent/query": (None, None)}
        for agent, workers in agents.items():
            self._paths[f"/agents/{agent}/query".encode()] = (agent, None)
            for worker in workers:
                self._agent_of[worker] = agent
                self._paths[f"/workers/{worker}/query".encode()] = (None, worker)

    def choose(
        self,
        agent: str | None,
        worker: str | None,
    ) -> str | ErrorResponse:
        """Return the worker to ask, or why the query is refused."""
        if worker is not None:
            return self._check_worker(agent, worker)
        if agent is None:
            if len(self._agents) > 1:
                names = ", ".join(self._agents)
                text = f"there are several agents, name one of them as 'agent': {names}"
                return ErrorResponse(ErrorCode.AGENT_REQUIRED, text)
            agent = next(iter(self._agents))
        workers = self._agents.get(agent)
        if workers is None:
            names = ", ".join(self._agents)
            text = f"there is no agent {agent!r}; there are: {names}"
            return ErrorResponse(ErrorCode.UNKNOWN_AGENT, text)
        # The first one that is up, so that an agent with memory answers from the same memory if
        # possible. If no worker is up, the router refuses the query.
        return next(filter(self._router.accepts, workers), workers[0])

    def _check_worker(self, agent: str | None, worker: str) -> str | ErrorResponse:
        if worker not in self._agent_of:
            names = ", ".join(self._agent_of)
            text = f"there is no worker {worker!r}; there are: {names}"
            return ErrorResponse(ErrorCode.UNKNOWN_WORKER, text)
        if agent not in (None, self._agent_of[worker]):
            text = f"the worker {worker!r} is not one of the agent {agent!r}"
            return ErrorResponse(ErrorCode.UNKNOWN_WORKER, text)
        return worker

    def workers_of_same_agent(self, worker: str) -> tuple[str, ...]:
        """Return all workers of a worker's agent."""
        return self._agents[self._agent_of[worker]]

    def names_in(self, url: bytes) -> PathNames | None:
        """Return the names in the path of a query, or None for another route."""
        return self._paths.get(url) or _parse_path(url)


def _parse_path(url: bytes) -> PathNames | None:
    """Parse an unusual path: one with an unknown name, a query string or escapes."""
    try:
        path = unquote(httptools.parse_url(url).path.decode("ascii"))
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        return None
    match path.split("/"):
        case ["", "agent", "query"]:
            return None, None
        case ["", "agents", agent, "query"] if agent:
            return agent, None
        case ["", "workers", worker, "query"] if worker:
            return None, worker
    return None


ExchangeFactory = Callable[
    ["DirectQueries", RequestHead, Channel, PathNames],
    "QueryExchange",
]


class DirectQueries:
    """Takes direct queries from connections.

    Args:
        router: carries them to workers.
        agents: each agent's workers, in the order in which they are chosen.
        guard: decides which clients may send queries.
        refusals: counts the queries that are refused before a worker is chosen.
        make_exchange: makes the responder for a query, by default a `QueryExchange`.

    Attributes:
        directory: the current agents and workers.
        closing: whether new queries are refused, because the runner shuts down.
    """

    def __init__(
        self,
        router: Router,
        agents: Mapping[str, tuple[str, ...]],
        guard: Guard,
        refusals: Refusals,
        make_exchange: ExchangeFactory | None = None,
    ) -> None:
        self.router = router
        self.directory = _Directory(router, agents)
        self.guard = guard
        self.refusals = refusals
        self._make_exchange = make_exchange or QueryExchange
        self.closing = False

    def set_agents(self, agents: Mapping[str, tuple[str, ...]]) -> None:
        """Route by these agents and workers from now on."""
        self.directory = _Directory(self.router, agents)

    def take(self, head: RequestHead, channel: Channel) -> QueryExchange | None:
        """Return the responder for a request, or None if it is not a direct query."""
        if head.method != b"POST":
            return None
        names = self.directory.names_in(head.url)
        if names is None:
            return None
        return self._make_exchange(self, head, channel, names)


class QueryExchange(Responder):
    """One direct query.

    Attributes:
        names: the agent and the worker that its path names.
        trace: the trace context that its worker gets.
    """

    __slots__ = ("_queries", "_refusal", "_sequence", "names")

    trace: Trace = NO_TRACE

    def __init__(
        self,
        queries: DirectQueries,
        head: RequestHead,
        channel: Channel,
        names: PathNames,
    ) -> None:
        super().__init__(head, channel)
        self._queries = queries
        self.names = names
        self._sequence: int | None = None
        # Checked when the head is complete, although earlier requests may still wait for their
        # answers. The result stays valid: a reload changes neither the guard nor the limit.
        self._refusal = queries.guard.check(head.headers)
        if self._refusal is None:
            length = dict(head.headers).get(b"content-length", b"0")
            if declares_more_than(MAX_BODY_BYTES, length):
                self._refusal = _TOO_LARGE

    def start(self) -> None:
        """Reject an unauthorized or too large request before reading its body."""
        if self._refusal is not None:
            self._refuse_unsent(self._refusal)
        else:
            super().start()

    def take_body(self, piece: bytes) -> None:
        """Take a piece of the body, and refuse it once it is too large."""
        super().take_body(piece)
        # A chunked body declares no length, and must not fill the memory.
        if len(self.body) > MAX_BODY_BYTES:
            self.notify()

    def proceed(self) -> None:
        """Send the query once the body is complete, or cancel it if the client disconnected."""
        if self.disconnected:
            # Otherwise, clients that give up and retry would fill the worker's queue.
            if self._sequence is not None:
                self._queries.router.cancel(self._sequence)
        elif len(self.body) > MAX_BODY_BYTES:
            self._refuse_unsent(_TOO_LARGE)
        elif self.more_body:
            self.ask_for_body()
        elif self._sequence is None:
            refusal = self._submit()
            if refusal is not None:
                self._refuse_unsent(refusal)

    def _submit(self) -> ErrorResponse | None:
        """Give the query to the router, or return why not."""
        try:
            asked = _decode_body(self.body)
        # A str with invalid UTF-8 and deeply nested JSON raise the other two.
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _BAD_BODY
        # The exchange may live as long as its connection. It needs the body no more.
        self.body.clear()
        agent = self.names[0] or asked.agent
        worker = self.names[1] or asked.worker
        for kind, name, in_body in (
            ("agent", agent, asked.agent),
            ("worker", worker, asked.worker),
        ):
            if in_body not in (None, name):
                text = f"the path names the {kind} {name!r}, the body {in_body!r}"
                return ErrorResponse(ErrorCode.NAME_CONFLICT, text)
        if self._queries.closing:
            return _CLOSING
        directory = self._queries.directory
        chosen = directory.choose(agent, worker)
        if isinstance(chosen, ErrorResponse):
            return chosen
        # A client that names a worker wants this one, and no other may answer.
        alternatives = directory.workers_of_same_agent(chosen) if worker is None else ()
        self._sequence = self._queries.router.submit(
            chosen,
            asked.query,
            self.on_reply,
            alternatives,
            self.trace,
        )
        return None

    def on_reply(self, reply: Reply) -> None:
        """Answer with how the query ended. The router calls it once, unless it was cancelled."""
        if reply.outcome is Outcome.OK:
            headers = CONTENT_TYPE_LINE + b"x-worker: %b\r\n" % reply.worker.encode()
            # The handler's result is JSON already. It is neither decoded nor copied here.
            self.answer(200, headers, b'{"results":', reply.payload, b"}")
            return
        code = _CODES[reply.outcome]
        worker = ("x-worker", reply.worker)
        if code.status == 503:
            reason = reply.payload.decode("utf-8", "replace")
            response = unavailable(code, f"{code}: {reason}", worker)
        elif code is ErrorCode.TIMED_OUT:
            response = ErrorResponse(code, "no answer before the deadline", (worker,))
        else:
            # Without the payload: it is an exception's message, which may contain secrets.
            response = ErrorResponse(code, str(code), (worker,))
        self._send_error(response)

    def _refuse_unsent(self, refusal: ErrorResponse) -> None:
        """Refuse a query that was given to no worker."""
        self._queries.refusals.record(refusal, self.head.client)
        self._send_error(refusal)

    def _send_error(self, response: ErrorResponse) -> None:
        self.answer(response.status, response.header_lines, response.body)
