"""The HTTP routes for operators. `runner.web.direct` answers direct queries, on the same socket."""

from __future__ import annotations

from collections.abc import Mapping

import anyio.to_thread
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from runner.routing.router import Router
from runner.supervision.supervisor import Supervisor
from runner.table import Ready, Table, readiness
from runner.web import _openapi
from runner.web._guard import Guard, LocalGuard, Refusals, TokenGuard
from runner.web.answers import JSON, ErrorResponse
from runner.web.dashboard.routes import Dashboard
from runner.web.direct import DirectQueries, ExchangeFactory
from runner.web.metrics import CONTENT_TYPE, RunnerSample, exposition
from shared.config.load import HttpAddress
from shared.config.tokens import Secret
from shared.http.errors import INTERNAL_ERROR_TEXT, ErrorCode


class Api:
    """The routes.

    Args:
        router: carries queries to workers.
        agents: each agent's workers, in the order in which they are chosen.
        supervisor: has the running workers.
        address: where the runner listens.
        token: every route except /health requires it. If None, only programs of this machine are
            answered.
        make_exchange: makes the responder for a direct query, by default a `QueryExchange`.
    """

    def __init__(
        self,
        router: Router,
        agents: Mapping[str, tuple[str, ...]],
        supervisor: Supervisor,
        address: HttpAddress,
        token: Secret | None = None,
        make_exchange: ExchangeFactory | None = None,
    ) -> None:
        self._agents = agents
        self._supervisor = supervisor
        self._with_token = token is not None
        guard: Guard = LocalGuard(address) if token is None else TokenGuard(token)
        self._router = router
        self._refusals = Refusals()
        self.queries = DirectQueries(
            router,
            agents,
            guard,
            self._refusals,
            make_exchange,
        )
        self._dashboard = Dashboard(supervisor)
        routes = [
            # `DirectQueries` takes POST requests before they get here. These routes answer the
            # other methods with 405 instead of 404.
            Route("/agent/query", _OnlyPost()),
            Route("/agents/{agent}/query", _OnlyPost()),
            Route("/workers/{worker}/query", _OnlyPost()),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/workers", self._table),
            Route("/metrics", self._metrics),
            Route(_openapi.PATH, self._openapi),
            *self._dashboard.routes,
        ]
        routed = Starlette(
            routes=routes,
            exception_handlers={
                404: _no_route,
                405: _wrong_method,
                Exception: _internal_error,
            },
        )
        # Starlette would redirect `/workers/` to the address in `Host`, which a client chooses.
        routed.router.redirect_slashes = False
        self.app: ASGIApp = _Guarded(routed, guard, self._refusals)

    def set_agents(self, agents: Mapping[str, tuple[str, ...]]) -> None:
        """Route by these agents and workers from now on."""
        self._agents = agents
        self.queries.set_agents(agents)

    def refuse_queries(self) -> None:
        """Refuse new queries from now on: the runner is shutting down."""
        self.queries.closing = True

    def end_streams(self) -> None:
        """End the responses that have no other end: the events of the status page."""
        self._dashboard.close()

    async def _health(self, request: Request) -> Response:
        return JSON(_openapi.Health("ok"))

    async def _ready(self, request: Request) -> Response:
        agents = readiness(self._supervisor.rows, self._agents)
        # A load balancer must send no more queries once they are refused.
        closing = self.queries.closing
        ready = not closing and all(agent.ready for agent in agents.values())
        return JSON(Ready(ready, agents), 200 if ready else 503)

    async def _table(self, request: Request) -> Response:
        return JSON(Table(list(self._supervisor.rows)))

    async def _metrics(self, request: Request) -> Response:
        # On a thread: for a hundred workers it takes a tenth of a second, and queries must not
        # wait for it. The thread gets copies, because the event loop changes the originals.
        runner_sample = RunnerSample(
            dict(self._refusals.by_status),
            self._router.max_in_flight,
        )
        text = await anyio.to_thread.run_sync(
            exposition,
            self._supervisor.samples,
            runner_sample,
        )
        return Response(text, media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSON(_openapi.document(self._with_token))


class _Guarded:
    """An ASGI application behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard, refusals: Refusals) -> None:
        self._app = app
        self._guard = guard
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        app = self._app
        # In front of all routes, so that a new route cannot be left unguarded. The other type,
        # `lifespan`, has no headers.
        if scope["type"] == "http":
            refusal = self._guard.check(scope["headers"], scope["path"])
            if refusal is not None:
                self._refusals.record(refusal, scope.get("client"))
                app = refusal.response()
        await app(scope, receive, send)


class _OnlyPost:
    """Answers 405 to every request."""

    # An object, not a function: Starlette restricts a function to GET, and would name GET in
    # `Allow`.
    async def __call__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        raise HTTPException(405, headers={"allow": "POST"})


async def _no_route(request: Request, exc: Exception) -> Response:
    text = f"there is no route {request.url.path}"
    return ErrorResponse(ErrorCode.UNKNOWN_ROUTE, text).response()


async def _wrong_method(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    # Starlette's own 405 writes the name `Allow` in another case than `_OnlyPost`.
    headers = Headers(exc.headers)
    text = (
        f"method {request.method} is not allowed for {request.url.path}; "
        f"use {headers.get('allow', '')}"
    )
    error = ErrorResponse(
        ErrorCode.METHOD_NOT_ALLOWED,
        text,
        tuple(headers.items()),
    )
    return error.response()


async def _internal_error(request: Request, exc: Exception) -> Response:
    # Without the exception's message: it may contain what clients must not see. It is logged.
    return ErrorResponse(ErrorCode.INTERNAL_ERROR, INTERNAL_ERROR_TEXT).response()
