"""Direct queries over HTTP: POST /agent/query, the one route that has to be fast.

A request goes from the parser to the router, and its reply from the router to the socket, by
callbacks alone. What is looked at is in the order in which a reader meets it: who asks, whom, what.
Every error is `{"error": ...}` with words that say what to do. What a handler raised goes to the
log, never to the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import unquote

import httptools
import msgspec

from runner.answers import Refusal, result_lines, unavailable
from runner.guard import Guard, Refusals
from runner.lines import Ending, Reply
from runner.router import Router
from shared.http_connection import HttpConnection
from shared.http_direct import DirectExchange
from shared.http_head import declares_more_than
from shared.ipc import NO_TRACE, Trace

MAX_BODY_BYTES: Final = 64 * 1024
_TOO_LARGE: Final = Refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
_BAD_BODY: Final = Refusal(400, "body must be JSON with a 'query' field")
_CLOSING: Final = unavailable("the runner is shutting down")

_STATUS: Final = {
    Ending.HANDLER_FAILED: (500, "handler_failed"),
    Ending.TIMED_OUT: (504, "no answer before the deadline"),
    Ending.WORKER_GONE: (503, "worker_unavailable"),
    Ending.REFUSED: (503, "worker_busy"),
}


class QueryBody(msgspec.Struct):
    """The body of a direct query. Other fields are ignored, as the reference does."""

    query: str
    agent: str | None = None
    worker: str | None = None


_decode_body = msgspec.json.Decoder(QueryBody).decode

Named = tuple[str | None, str | None]
"""The agent and the worker that a path names."""


class Directory:
    """Which workers there are, and which of them a query goes to.

    Args:
        router: knows who is up.
        agents: each agent's workers, its primary first.
    """

    def __init__(self, router: Router, agents: Mapping[str, tuple[str, ...]]) -> None:
        self._router = router
        self._agents = agents
        self._workers = {worker: agent for agent, workers in agents.items() for worker in workers}
        self._others = {
            name: tuple(each for each in agents[agent] if each != name) for name, agent in self._workers.items()
        }
        self.paths: dict[bytes, Named] = {b"/agent/query": (None, None)}
        self.paths |= {f"/agents/{agent}/query".encode(): (agent, None) for agent in agents}
        self.paths |= {f"/workers/{worker}/query".encode(): (None, worker) for worker in self._workers}

    def choose(self, agent: str | None, worker: str | None) -> str | Refusal:
        """Return the worker to ask, or the refusal."""
        if worker is not None:
            if worker not in self._workers:
                return Refusal(404, f"there is no worker {worker!r}; there are: {', '.join(self._workers)}")
            if agent is not None and self._workers[worker] != agent:
                return Refusal(404, f"the worker {worker!r} is not one of the agent {agent!r}")
            return worker
        if agent is None:
            if len(self._agents) > 1:
                names = ", ".join(self._agents)
                return Refusal(400, f"there are several agents, name one of them as 'agent': {names}")
            agent = next(iter(self._agents))
        workers = self._agents.get(agent)
        if workers is None:
            return Refusal(404, f"there is no agent {agent!r}; there are: {', '.join(self._agents)}")
        for name in workers:
            if self._router.accepts(name):
                return name
        return workers[0]

    def others(self, worker: str) -> tuple[str, ...]:
        """Return the other workers of a worker's agent: they may answer what was not meant for this one alone."""
        return self._others[worker]

    def named_by(self, url: bytes) -> Named | None:
        """Return whom the path of a query names, or None when it is another route's."""
        named = self.paths.get(url)
        return _parse_path(url) if named is None else named


def _parse_path(url: bytes) -> Named | None:
    """Read a path that is none of the usual ones: a name that nobody has, a query string, escapes."""
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


class DirectQueries:
    """What takes direct queries from connections.

    Args:
        router: what carries them to workers.
        agents: each agent's workers, its primary first.
        guard: who may ask.
        refusals: is told of each query that no worker was asked.
    """

    def __init__(self, router: Router, agents: Mapping[str, tuple[str, ...]], guard: Guard, refusals: Refusals) -> None:
        self.router = router
        self.directory = Directory(router, agents)
        self.guard = guard
        self.refusals = refusals
        self.exchange: Callable[[DirectQueries, HttpConnection, Named], QueryExchange] = QueryExchange
        self.closing = False

    def rename(self, agents: Mapping[str, tuple[str, ...]]) -> None:
        """Route by these agents and workers from now on."""
        self.directory = Directory(self.router, agents)

    def take(self, connection: HttpConnection) -> QueryExchange | None:
        """Return what answers a request whose head is whole, or None when it is no query."""
        parser = connection.parser
        if parser.get_method() != b"POST" or (named := self.directory.named_by(connection.url)) is None:
            return None
        return self.exchange(self, connection, named)


class QueryExchange(DirectExchange):
    """One direct query."""

    __slots__ = ("_named", "_queries", "_refusal", "_sequence")

    trace: Trace = NO_TRACE

    def __init__(self, queries: DirectQueries, connection: HttpConnection, named: Named) -> None:
        parser = connection.parser
        super().__init__(
            connection,
            keep_alive=parser.get_http_version() != "1.0" and parser.should_keep_alive(),
            expects_continue=connection.expect_100_continue and parser.get_http_version() == "1.1",
        )
        self._queries = queries
        self._named = named
        self._sequence: int | None = None
        # Judged now, though it may have to wait for its turn: by then the parser has other requests' headers,
        # or this one's trailers, which must count for nothing here (RFC 9110, 6.5.1).
        self._refusal = queries.guard.objection(connection.headers)
        if self._refusal is None and _declared_too_large(connection.headers):
            self._refusal = _TOO_LARGE

    def start(self) -> None:
        """Answer who must not ask before the body is read."""
        if self._refusal is not None:
            self._object(self._refusal)
        else:
            super().start()

    def take_body(self, piece: bytes) -> None:
        """Take a piece of the body, and no more than there may be."""
        super().take_body(piece)
        if len(self.body) > MAX_BODY_BYTES:
            self.set()

    def proceed(self) -> None:
        """Ask once the body is there; when the client has gone, free the query's place."""
        if self.disconnected:
            if self._sequence is not None:
                self._queries.router.withdraw(self._sequence)
        elif len(self.body) > MAX_BODY_BYTES:
            self._object(_TOO_LARGE)
        elif self.more_body:
            self.ask_for_body()
        elif self._sequence is None and (refusal := self._ask()) is not None:
            self._object(refusal)

    def _ask(self) -> Refusal | None:
        """Hand the query to the router, or return why not."""
        try:
            asked = _decode_body(self.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _BAD_BODY
        self.body.clear()  # the connection may be kept for long after it
        agent, worker = asked.agent, asked.worker
        if self._named != (None, None):
            for what, in_path, in_body in zip(("agent", "worker"), self._named, (agent, worker), strict=True):
                if in_path is not None and in_body is not None and in_body != in_path:
                    return Refusal(400, f"the path names the {what} {in_path!r}, the body {in_body!r}")
            agent, worker = self._named[0] or agent, self._named[1] or worker
        if self._queries.closing:
            return _CLOSING
        directory = self._queries.directory
        chosen = directory.choose(agent, worker)
        if isinstance(chosen, Refusal):
            return chosen
        elsewhere = directory.others(chosen) if worker is None else ()
        self._sequence = self._queries.router.submit(chosen, asked.query, self._on_reply, elsewhere, self.trace)
        return None

    def _on_reply(self, reply: Reply) -> None:
        if reply.ending is Ending.OK:
            self.answer(200, result_lines(reply.worker), b'{"results":', reply.payload, b"}")
            return
        status, message = _STATUS[reply.ending]
        if status == 503:
            why = reply.payload.decode("utf-8", "replace")
            self._refuse(unavailable(f"{message}: {why}", ("x-worker", reply.worker)))
        else:
            self._refuse(Refusal(status, message, (("x-worker", reply.worker),)))

    def _object(self, refusal: Refusal) -> None:
        """Refuse before any worker was asked."""
        self._queries.refusals.note(refusal, self.connection.client)
        self._refuse(refusal)

    def _refuse(self, refusal: Refusal) -> None:
        self.answer(refusal.status, refusal.header_lines, refusal.body)


def _declared_too_large(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether a client says that it will send too much: that is not read."""
    for name, value in headers:
        if name == b"content-length":
            return declares_more_than(MAX_BODY_BYTES, value)
    return False
