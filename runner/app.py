"""The runner as a whole: builds the parts from a Config, runs them in one task group, owns the signals."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import anyio
import anyio.abc
import structlog
import zmq

from runner.http import Api
from runner.process import ForkServer
from runner.restarts import RestartPolicy
from runner.router import Router
from runner.state_dir import StateDir, hold
from runner.supervisor import Supervisor
from shared.config import Config, HttpAddress, WorkerSpec, worker_specs
from shared.errors import ConfigError, StartError
from shared.http_server import HttpServer, listen, resolve

REPLY_GRACE_S: Final = 0.5
"""How long clients may take to read the last answers when the runner ends."""

SETTLE_S: Final = 0.02
"""How long requests that have arrived may take to be read before the door is closed."""

_PORT_HINT: Final = "choose another address with --http or runner.http (port 0 takes any free one)"

OnStarted = Callable[[HttpAddress], None]
Surroundings = Callable[[], AbstractAsyncContextManager[None]]


def run(config: Config, *, on_started: OnStarted = lambda _: None, around: Surroundings | None = None) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        config: what to run.
        on_started: called with the address that HTTP listens on, once it does.
        around: entered before the workers start and left after they have ended: the demo's nodes.

    Raises:
        ConfigError: when a handler cannot be loaded.
        StartError: when the state folder or the address is in use.
    """
    fork_server = ForkServer()
    fork_server.start()
    place = resolve(config.http.host, config.http.port, hint=_PORT_HINT)
    with hold(config.state_dir) as state, listen(place, hint=_PORT_HINT) as listener:
        check_handlers(config, fork_server)
        runner = Runner(config, fork_server, state, listener)
        anyio.run(runner.run, on_started, around, backend_options={"use_uvloop": True})


def check_handlers(config: Config, fork_server: ForkServer) -> dict[str, tuple[str, ...]]:
    """Load every agent's handler in a process of its own; return the capabilities each agent will tell.

    Raises:
        ConfigError: naming the first agent whose handler cannot be loaded, and why.
    """
    found: dict[str, tuple[str, ...]] = {}
    for agent in config.agents:
        try:
            own = fork_server.probe(agent.handler)
        except ConfigError as exc:
            raise ConfigError(f"agent {agent.name!r}: {exc}") from None
        found[agent.name] = own if agent.capabilities is None else agent.capabilities
    return found


class Runner:
    """One running runner."""

    def __init__(self, config: Config, fork_server: ForkServer, state: StateDir, listener: socket.socket) -> None:
        self._config = config
        self._state = state
        self._listener = listener
        self._router = Router(
            state.socket_path,
            query_timeout_s=config.query_timeout_ms / 1000,
            max_in_flight=config.max_in_flight,
            max_in_flight_total=config.max_in_flight_total,
        )
        specs = worker_specs(config)
        supervision = config.supervision
        self._supervisor = Supervisor(
            specs,
            RestartPolicy(max_restarts=supervision.max_restarts, window_s=supervision.restart_window_s),
            fork_server,
            self._router,
            supervision.shutdown_timeout_ms / 1000,
        )
        self._api = Api(self._router, _by_agent(specs), lambda: self._supervisor.rows, config.http_token)
        self._server = HttpServer(self._api.app, listener)
        self._leaving = False
        self._log = structlog.get_logger("runner")

    async def run(self, on_started: OnStarted, around: Surroundings | None) -> None:
        """Run until a signal says otherwise, then drain."""
        try:
            self._router.open()
        except zmq.ZMQError as exc:
            raise StartError(f"cannot listen on {self._router.endpoint}: {exc}") from None
        try:
            async with (around or _nothing_around)(), anyio.create_task_group() as tasks:
                await tasks.start(self._obey_signals)
                await self._server.start()
                self._announce(on_started)
                await self._supervisor.run()
                # Every query that was in flight is answered by now, by its worker or in its stead.
                await self._server.stop(REPLY_GRACE_S)
                tasks.cancel_scope.cancel()
        finally:
            self._router.close()
        self._log.info("stopped")

    def _announce(self, on_started: OnStarted) -> None:
        address = HttpAddress(self._config.http.host, self._listener.getsockname()[1])
        self._state.announce(f"http://{address}")
        self._log.info("started", http=f"http://{address}", workers=len(self._supervisor.children))
        on_started(address)

    async def _obey_signals(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async with anyio.create_task_group() as tasks:
                async for number in signals:
                    if self._leaving:
                        self._log.warning("killing", why="a second signal")
                        self._supervisor.kill()
                        continue
                    self._leaving = True
                    self._supervisor.retire()
                    self._log.info("draining", why=signal.Signals(number).name)
                    tasks.start_soon(self._drain)

    async def _drain(self) -> None:
        # Requests that were sent before the signal may still lie unread in their sockets.
        await anyio.sleep(SETTLE_S)
        self._api.closing = True
        self._server.close()
        await self._supervisor.drain()


def _by_agent(specs: tuple[WorkerSpec, ...]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        found[spec.agent.name] = (*found.get(spec.agent.name, ()), spec.name)
    return found


@asynccontextmanager
async def _nothing_around() -> AsyncIterator[None]:
    yield
