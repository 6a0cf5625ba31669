"""The runner as a whole: builds the parts from a Config, runs them in one task group, owns the signals."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio
import anyio.abc
import zmq

from runner import descriptors
from runner.http import Api
from runner.process import ForkServer
from runner.reload import ReadConfig, Reloader, policy_of, workers_by_agent
from runner.router import Router
from runner.service_manager import ServiceManager
from runner.start import OnStarted, Surroundings
from runner.state_dir import StateDir
from runner.supervisor import Supervisor
from runner.watch import Watcher
from shared.config import Config, HttpAddress, worker_specs
from shared.errors import StartError
from shared.http_server import HttpServer
from shared.logs import get_logger, tell_held_back
from shared.signals import obeyed

if TYPE_CHECKING:
    from runner.tracing import RunnerTracing

REPLY_GRACE_S: Final = 0.5
"""How long clients may take to read the last answers when the runner ends."""

SETTLE_S: Final = 0.02
"""How long requests that have arrived may take to be read before the door is closed."""

SAME_SIGNAL_S: Final = 0.3
"""Signals that follow each other faster than a person's are one."""

HELD_BACK_LOOK_S: Final = 1.0
"""How often the log is looked at for events that were held back."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Runner:
    """One running runner."""

    def __init__(
        self,
        config: Config,
        read_again: ReadConfig | None,
        fork_server: ForkServer,
        state: StateDir,
        listener: socket.socket,
        service_manager: ServiceManager,
        tracing: RunnerTracing | None = None,
        watched: Path | None = None,
    ) -> None:
        self._config = config
        self._fork_server = fork_server
        self._state = state
        self._listener = listener
        self._router = (Router if tracing is None else tracing.router)(
            state.socket_path,
            query_timeout_s=config.query_timeout_ms / 1000,
            max_in_flight=config.max_in_flight,
            max_in_flight_total=config.max_in_flight_total,
        )
        specs = worker_specs(config)
        self._supervisor = Supervisor(
            specs, policy_of(config), fork_server, self._router, config.supervision.shutdown_timeout_ms / 1000
        )
        self._api = Api(
            self._router,
            workers_by_agent(specs),
            lambda: self._supervisor.rows,
            lambda: self._supervisor.samples,
            lambda: self._supervisor.rates,
            config.http,
            config.http_token,
        )
        if tracing is not None:
            self._api.queries.exchange = tracing.exchange
        self._reloader = Reloader(
            read_again, config, fork_server, self._supervisor, self._router, self._api, state, self._make_room
        )
        self._watcher: Watcher | None = None
        if watched is not None:
            self._watcher = Watcher(config, watched, fork_server, self._supervisor, self._reloader.ask)
            self._reloader.follow = self._watcher.follow
        self._server = HttpServer(self._api.app, listener, direct=self._api.queries.take)
        self._server.reserve(descriptors.needed(len(specs)))
        self._service_manager = service_manager
        self._leaving_since_s: float | None = None
        self._log = get_logger("runner")

    async def run(self, on_started: OnStarted, around: Surroundings | None) -> None:
        """Run until a signal says otherwise, then drain."""
        try:
            self._router.open()
        except zmq.ZMQError as exc:
            raise StartError(f"cannot listen on {self._router.endpoint}: {exc}") from None
        try:
            async with (around or _nothing_around)(), anyio.create_task_group() as tasks:
                await tasks.start(self._obey_signals)
                tasks.start_soon(self._reloader.run)
                if self._watcher is not None:
                    tasks.start_soon(self._watcher.run)
                tasks.start_soon(self._supervisor.observe)
                tasks.start_soon(_keep_log)
                tasks.start_soon(self._service_manager.report, lambda: self._supervisor.rows)
                await self._server.start()
                self._announce(on_started)
                gc.freeze()  # what is there by now stays: no collection has to look at it while queries wait
                await self._supervisor.run()
                # What was in flight is answered by now, by its worker or in its stead; what was held is not.
                self._router.refuse_all()
                self._api.end_streams()
                await self._server.stop(REPLY_GRACE_S)
                tasks.cancel_scope.cancel()
        finally:
            self._router.close()
        self._log.info("stopped")

    def _make_room(self, workers: int) -> None:
        """Have file descriptors for so many workers.

        Raises:
            StartError: when the system does not allow it.
        """
        descriptors.require(workers)
        self._server.reserve(descriptors.needed(workers))

    def _announce(self, on_started: OnStarted) -> None:
        address = HttpAddress(self._config.http.host, self._listener.getsockname()[1])
        self._state.announce(f"http://{address}")
        self._log.info("started", http=f"http://{address}", workers=len(self._supervisor))
        on_started(address)

    async def _obey_signals(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async with anyio.create_task_group() as tasks:
            with obeyed(*_SIGNALS, by=lambda number: self._obey(number, tasks)):
                task_status.started()
                await anyio.sleep_forever()

    def _obey(self, number: signal.Signals, tasks: anyio.abc.TaskGroup) -> None:
        if number == signal.SIGHUP:
            self._reloader.ask()
        elif self._leaving_since_s is None:
            self._leaving_since_s = time.monotonic()
            self._supervisor.retire()
            self._service_manager.leave()
            self._log.info("draining", why=number.name)
            tasks.start_soon(self._drain)
        elif time.monotonic() - self._leaving_since_s > SAME_SIGNAL_S:
            # Sooner, it is the same request twice: some senders signal the process and its group.
            self._log.warning("killing", why="a second signal")
            self._supervisor.kill()

    async def _drain(self) -> None:
        # Requests that were sent before the signal may still lie unread in their sockets.
        await anyio.sleep(SETTLE_S)
        self._api.close()
        self._server.close()
        self._fork_server.abandon_probes()
        await self._supervisor.drain()


async def _keep_log() -> None:
    """Tell of what was held back in the log, until cancelled."""
    while True:
        await anyio.sleep(HELD_BACK_LOOK_S)
        tell_held_back()


@asynccontextmanager
async def _nothing_around() -> AsyncIterator[None]:
    yield
