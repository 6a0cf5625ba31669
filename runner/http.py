"""The runner over HTTP: direct queries to workers, and what operators look at.

Every error is `{"error": ...}` with words that say what to do. What a handler raised goes to the
log, never to the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from runner.answers import JSON, error
from runner.guard import BearerToken, LocalOnly
from runner.lines import Ending, Reply
from runner.router import Router
from runner.supervisor import WorkerRow
from shared.config import HttpAddress
from shared.tokens import Secret

MAX_BODY_BYTES: Final = 64 * 1024
RETRY_AFTER_S: Final = 1
_DISCONNECT_CHECK_S: Final = 0.1
_BAD_BODY: Final = "body must be JSON with a 'query' field"

_STATUS: Final = {
    Ending.HANDLER_FAILED: (500, "handler_failed"),
    Ending.TIMED_OUT: (504, "no answer before the deadline"),
    Ending.WORKER_GONE: (503, "worker_unavailable"),
    Ending.REFUSED: (503, "worker_busy"),
}

Table = Callable[[], Sequence[WorkerRow]]


class QueryBody(msgspec.Struct):
    """The body of a direct query. Other fields are ignored, as the reference does."""

    query: str
    agent: str | None = None
    worker: str | None = None


_decode_body = msgspec.json.Decoder(QueryBody).decode


class Directory:
    """Which workers there are, and which of them a query goes to."""

    def __init__(self, router: Router, agents: dict[str, tuple[str, ...]]) -> None:
        """Take the router and each agent's workers, its primary first."""
        self._router = router
        self._agents = agents
        self._workers = {worker: agent for agent, workers in agents.items() for worker in workers}

    def choose(self, agent: str | None, worker: str | None) -> str | Response:
        """Return the worker to ask, or the refusal."""
        if worker is not None:
            if worker not in self._workers:
                return error(404, f"there is no worker {worker!r}; there are: {', '.join(self._workers)}")
            if agent is not None and self._workers[worker] != agent:
                return error(404, f"the worker {worker!r} is not one of the agent {agent!r}")
            return worker
        if agent is None:
            if len(self._agents) > 1:
                return error(400, f"there are several agents, name one of them as 'agent': {', '.join(self._agents)}")
            agent = next(iter(self._agents))
        workers = self._agents.get(agent)
        if workers is None:
            return error(404, f"there is no agent {agent!r}; there are: {', '.join(self._agents)}")
        return next((name for name in workers if self._router.accepts(name)), workers[0])

    def others(self, worker: str) -> tuple[str, ...]:
        """Return the other workers of a worker's agent: they may answer what was not meant for this one alone."""
        return tuple(name for name in self._agents[self._workers[worker]] if name != worker)


class Api:
    """The routes.

    Args:
        router: what carries queries to workers.
        agents: each agent's workers, its primary first.
        table: returns the table of workers.
        address: where the runner listens.
        token: what every route but /health asks for, or None: then only programs of this machine may ask.
    """

    def __init__(
        self,
        router: Router,
        agents: dict[str, tuple[str, ...]],
        table: Table,
        address: HttpAddress,
        token: Secret | None = None,
    ) -> None:
        self._router = router
        self._agents = agents
        self._directory = Directory(router, agents)
        self._table = table
        self.closing = False
        routes = [
            Route("/agent/query", self._query, methods=["POST"]),
            Route("/agents/{agent}/query", self._query, methods=["POST"]),
            Route("/workers/{worker}/query", self._query, methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/workers", self._workers),
        ]
        routed = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})
        routed.router.redirect_slashes = False
        self.app: ASGIApp = routed
        self.app = LocalOnly(self.app, address) if token is None else BearerToken(self.app, token)

    def rename(self, agents: dict[str, tuple[str, ...]]) -> None:
        """Route by these agents and workers from now on."""
        self._agents = agents
        self._directory = Directory(self._router, agents)

    async def _query(self, request: Request) -> Response:
        try:
            body = await _read(request)
        except ClientDisconnect:
            return error(400, "the request ended early")  # nobody is left to read it
        if body is None:
            return error(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            asked = _decode_body(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return error(400, _BAD_BODY)
        for named in ("agent", "worker"):
            in_path, in_body = request.path_params.get(named), getattr(asked, named)
            if in_path is not None:
                if in_body is not None and in_body != in_path:
                    return error(400, f"the path names the {named} {in_path!r}, the body {in_body!r}")
                setattr(asked, named, in_path)
        if self.closing:
            return _unavailable("the runner is shutting down")
        worker = self._directory.choose(asked.agent, asked.worker)
        if isinstance(worker, Response):
            return worker
        elsewhere = () if asked.worker is not None else self._directory.others(worker)
        reply = await self._ask(worker, asked.query, elsewhere, request)
        return _answer(reply)

    async def _ask(self, worker: str, query: str, elsewhere: tuple[str, ...], request: Request) -> Reply:
        """Return the reply; when the client goes away first, free the query's place."""
        replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def on_reply(reply: Reply) -> None:
            if not replied.done():
                replied.set_result(reply)

        sequence = self._router.submit(worker, query, on_reply, elsewhere)
        try:
            # Most answers come long before this; only for the others the connection is watched too.
            await asyncio.wait([replied], timeout=_DISCONNECT_CHECK_S)
            if not replied.done():
                await self._wait_or_hang_up(replied, request)
            return replied.result() if replied.done() else Reply(Ending.WORKER_GONE, b"the client went away", worker)
        finally:
            if sequence is not None:
                self._router.withdraw(sequence)

    async def _wait_or_hang_up(self, replied: asyncio.Future[Reply], request: Request) -> None:
        """Wait for the reply, or for the client to go: the body is read, so nothing else comes from it."""
        hung_up = asyncio.ensure_future(request.receive())
        waiting: list[asyncio.Future[Any]] = [replied, hung_up]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hung_up.cancel()

    async def _health(self, request: Request) -> Response:
        return JSON({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        rows = {row.name: row for row in self._table()}
        agents = {
            agent: {
                "ready": any(rows[name].state == "ready" for name in workers if name in rows),
                "workers": {name: _state_in_words(rows[name]) for name in workers if name in rows},
            }
            for agent, workers in self._agents.items()
        }
        ready = not self.closing and all(agent["ready"] for agent in agents.values())
        return JSON({"ready": ready, "agents": agents}, 200 if ready else 503)

    async def _workers(self, request: Request) -> Response:
        return JSON({"workers": list(self._table())})


async def _read(request: Request) -> bytes | None:
    """Return the body, or None when it is too large; what is declared too large is not read."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _answer(reply: Reply) -> Response:
    if reply.ending is Ending.OK:
        return JSON(b'{"results":%b}' % reply.payload, headers={"x-worker": reply.worker})
    status, message = _STATUS[reply.ending]
    if status == 503:
        return _unavailable(f"{message}: {reply.payload.decode('utf-8', 'replace')}", x_worker=reply.worker)
    return error(status, message, x_worker=reply.worker)


def _unavailable(message: str, **headers: str) -> Response:
    return error(503, message, retry_after=str(RETRY_AFTER_S), **headers)


def _state_in_words(row: WorkerRow) -> str:
    return f"{row.state}: {row.detail}" if row.detail else row.state


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    messages = {
        404: f"there is no route {request.url.path}",
        405: f"{request.method} is not what {request.url.path} takes",
    }
    return JSON({"error": messages.get(exc.status_code, exc.detail)}, exc.status_code, dict(exc.headers or {}))


async def _fault(request: Request, exc: Exception) -> Response:
    return error(500, "internal_error")
