"""The runner over HTTP: what operators look at. Direct queries are `runner.direct`'s, on the same socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from runner import openapi
from runner.answers import JSON, Refusal
from runner.dashboard.routes import Dashboard
from runner.direct import DirectQueries
from runner.guard import BearerToken, Guard, Guarded, LocalOnly, Refusals
from runner.metrics import CONTENT_TYPE, Own, Sample, exposition
from runner.router import Router
from runner.table import Ready, Table, WorkerRow, readiness
from shared.config import HttpAddress
from shared.tokens import Secret


class Api:
    """The routes.

    Args:
        router: what carries queries to workers.
        agents: each agent's workers, its primary first.
        rows: returns the table of workers.
        samples: returns what they counted.
        rates: returns their queries a second in the last five minutes, by name.
        address: where the runner listens.
        token: what every route but /health asks for, or None: then only programs of this machine may ask.
    """

    def __init__(
        self,
        router: Router,
        agents: Mapping[str, tuple[str, ...]],
        rows: Callable[[], Sequence[WorkerRow]],
        samples: Callable[[], Sequence[Sample]],
        rates: Callable[[], Mapping[str, Sequence[float]]],
        address: HttpAddress,
        token: Secret | None = None,
    ) -> None:
        self._agents = agents
        self._rows = rows
        self._samples = samples
        self._asks_for_token = token is not None
        guard: Guard = LocalOnly(address) if token is None else BearerToken(token)
        self._router = router
        self._refusals = Refusals()
        self.queries = DirectQueries(router, agents, guard, self._refusals)
        self._dashboard = Dashboard(rows, rates)
        routes = [
            # Here are those that ask in another way than by POST.
            Route("/agent/query", _OnlyByPost()),
            Route("/agents/{agent}/query", _OnlyByPost()),
            Route("/workers/{worker}/query", _OnlyByPost()),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/workers", self._workers),
            Route("/metrics", self._metrics),
            Route(openapi.PATH, self._openapi),
            *self._dashboard.routes,
        ]
        routed = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})
        routed.router.redirect_slashes = False
        self.app: ASGIApp = Guarded(routed, guard, self._refusals)

    def rename(self, agents: Mapping[str, tuple[str, ...]]) -> None:
        """Route by these agents and workers from now on."""
        self._agents = agents
        self.queries.rename(agents)

    def close(self) -> None:
        """Refuse whatever is asked from now on: the runner is shutting down."""
        self.queries.closing = True

    def end_streams(self) -> None:
        """End the answers that would go on for as long as the runner does."""
        self._dashboard.close()

    async def _health(self, request: Request) -> Response:
        return JSON(openapi.Health("ok"))

    async def _ready(self, request: Request) -> Response:
        agents = readiness(self._rows(), self._agents)
        ready = not self.queries.closing and all(agent.ready for agent in agents.values())
        return JSON(Ready(ready, agents), 200 if ready else 503)

    async def _workers(self, request: Request) -> Response:
        return JSON(Table(list(self._rows())))

    async def _metrics(self, request: Request) -> Response:
        own = Own(dict(self._refusals.by_status), self._router.max_in_flight)
        # Of a hundred workers it takes a tenth of a second, in which queries go on.
        text = await anyio.to_thread.run_sync(exposition, self._samples(), own)
        return Response(text, media_type=CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return JSON(openapi.document(self._asks_for_token))


class _OnlyByPost:
    """Refuses every method. An application and no function: Starlette would take a function for GET alone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPException(405, headers={"allow": "POST"})


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    messages = {
        404: f"there is no route {request.url.path}",
        405: f"{request.method} is not what {request.url.path} takes",
    }
    words = messages.get(exc.status_code, exc.detail)
    return Refusal(exc.status_code, words, tuple((exc.headers or {}).items())).response()


async def _fault(request: Request, exc: Exception) -> Response:
    return Refusal(500, "internal_error").response()
