"""The running runner: it connects the parts, runs them in one task group, and handles signals."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import zmq

from runner import descriptors
from runner.reload import ReadConfig, Reloader, workers_by_agent
from runner.routing.router import Router
from runner.service_manager import ServiceManager
from runner.state_dir import StateDir
from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from runner.supervision.restarts import RestartPolicy
from runner.supervision.supervisor import Supervisor
from runner.watch import Watcher
from runner.web.direct import ExchangeFactory
from runner.web.routes import Api
from shared.config.load import Config, HttpAddress, worker_specs
from shared.errors import StartError
from shared.http.server import HttpServer
from shared.logs.logger import get_logger, report_suppressed
from shared.signals import handle_signals

_REPLY_GRACE_S: Final = 0.5
"""How long clients may take to read the last answers when the runner stops."""

_ACCEPT_GRACE_S: Final = 0.02
"""How long after a signal new requests are still accepted (see `_drain`)."""

_SAME_SIGNAL_S: Final = 0.3
"""Signals that follow each other faster count as one (see `_on_signal`)."""

_REPORT_INTERVAL_S: Final = 1.0
"""How often the log reports the number of events that it suppressed."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

OnStarted = Callable[[HttpAddress], None]
"""Called with the address of the HTTP server once it accepts connections."""

Lifespan = Callable[[], AbstractAsyncContextManager[None]]
"""Makes a context that is entered before the workers start, and exited after they have ended."""


class Runner:
    """One run of the runner.

    Args:
        config: what to run.
        read_config: reads the configuration again; None if it has no file.
        watched_file: the configuration file, to watch it and the handlers' folders; None to watch
            nothing.
        listener: the socket that HTTP clients connect to.
        make_exchange: makes the responder of a traced direct query; None without tracing.
    """

    def __init__(
        self,
        config: Config,
        read_config: ReadConfig | None,
        watched_file: Path | None,
        fork_server: ForkServer,
        state: StateDir,
        listener: socket.socket,
        service_manager: ServiceManager,
        make_exchange: ExchangeFactory | None,
    ) -> None:
        specs = worker_specs(config)
        self._state = state
        self._service_manager = service_manager
        self._probes = Probes(fork_server)
        self._router = Router(
            state.router_path,
            config.runner,
            traced=make_exchange is not None,
        )
        self._supervisor = Supervisor(
            specs,
            RestartPolicy(supervision=config.supervision),
            fork_server,
            self._router,
        )
        self._api = Api(
            self._router,
            workers_by_agent(specs),
            self._supervisor,
            config.http,
            config.runner.http_token,
            make_exchange,
        )
        self._reloader = Reloader(
            read_config,
            config,
            self._probes,
            self._supervisor,
            self._reserve_descriptors,
            self._set_config,
        )
        self._watcher: Watcher | None = None
        if watched_file is not None:
            self._watcher = Watcher(
                config,
                watched_file,
                self._probes,
                self._supervisor,
                self._reloader.request,
            )
        self._server = HttpServer(
            self._api.app,
            listener,
            respond_first=self._api.queries.take,
        )
        self._server.reserve(descriptors.needed(len(specs)))
        # With port 0 the kernel chose the port, so the configuration does not have it.
        self._address = HttpAddress(config.http.host, listener.getsockname()[1])
        self._started = anyio.Event()
        self._stopping_since_s: float | None = None
        self._log = get_logger()

    async def run(
        self,
        on_started: OnStarted,
        lifespan: Lifespan | None,
    ) -> None:
        """Run until a signal requests the end, then drain.

        Raises:
            StartError: if the socket for the workers or the state folder cannot be used.
        """
        try:
            self._router.open()
        except zmq.ZMQError as exc:
            raise StartError(f"cannot listen on {self._router.endpoint}: {exc}") from None
        try:
            # Before the task group, so that an error is not wrapped in a group. Clients can use the
            # address already: their requests wait in the listener's backlog.
            self._state.announce(f"http://{self._address}")
            async with (lifespan or nullcontext)(), anyio.create_task_group() as tasks:
                # Before any worker starts, because from then on a signal has to drain the workers.
                # Until here it ends the process at once (see `start.run`).
                with handle_signals(lambda number: self._on_signal(number, tasks), *_SIGNALS):
                    await self._serve(tasks, on_started)
                    tasks.cancel_scope.cancel()
        finally:
            self._router.close()
        self._log.info("stopped")

    async def _serve(
        self,
        tasks: anyio.abc.TaskGroup,
        on_started: OnStarted,
    ) -> None:
        """Start all parts, and return when all workers have ended and their answers are sent."""
        tasks.start_soon(self._reloader.run)
        await tasks.start(self._reloader.serve, self._state.reload_path)
        if self._watcher is not None:
            tasks.start_soon(self._watcher.run)
        tasks.start_soon(self._supervisor.record_counts)
        tasks.start_soon(_report_suppressed)
        tasks.start_soon(self._service_manager.report, lambda: self._supervisor.rows)
        await self._server.start()
        self._started.set()
        http = f"http://{self._address}"
        self._log.info(
            "started",
            http=http,
            workers=len(self._supervisor.rows),
        )
        on_started(self._address)
        # Objects of the start live until the end. Frozen, they are not traversed by any garbage
        # collection, which would delay the queries that arrive during it.
        gc.freeze()
        await self._supervisor.run()
        # Every query that a worker had is answered by now. One that a worker gave back may
        # still be held for a worker that had ended before. It is refused before the server stops,
        # or its client would get a closed connection.
        self._router.refuse_all()
        self._api.end_streams()
        await self._server.stop(_REPLY_GRACE_S)

    def _reserve_descriptors(self, workers: int) -> None:
        """Reserve file descriptors for a number of workers.

        Raises:
            StartError: if the system does not allow that many.
        """
        descriptors.raise_limit(workers)
        self._server.reserve(descriptors.needed(workers))

    def _set_config(self, config: Config) -> None:
        """Apply a new configuration to all parts but the workers."""
        self._router.set_limits(config.runner)
        self._api.set_agents(workers_by_agent(worker_specs(config)))
        if self._watcher is not None:
            self._watcher.set_handlers(config)

    def _on_signal(
        self,
        number: signal.Signals,
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        if number == signal.SIGHUP:
            self._reloader.request()
        elif self._stopping_since_s is None:
            self._stopping_since_s = time.monotonic()
            self._supervisor.stop_restarting()
            self._service_manager.report_stopping()
            self._log.info("draining", signal=number.name)
            tasks.start_soon(self._drain)
        elif time.monotonic() - self._stopping_since_s > _SAME_SIGNAL_S:
            # A second signal within `_SAME_SIGNAL_S` is ignored: some senders signal both the
            # process and its group. This one is another request.
            self._log.warning("killing", reason="a second signal")
            self._supervisor.kill()

    async def _drain(self) -> None:
        # A signal may arrive during the start. The server cannot start once it is closed.
        await self._started.wait()
        # Requests that were sent before the signal may not be read from their sockets yet. They
        # are read and answered first.
        await anyio.sleep(_ACCEPT_GRACE_S)
        # From here on, new queries and connections are refused.
        self._api.refuse_queries()
        self._server.close()
        # A reload may wait for a probe on a thread, which cannot be cancelled. The thread returns
        # when the probe's process is killed.
        self._probes.kill()
        await self._supervisor.drain()


async def _report_suppressed() -> None:
    """Log how many events were suppressed, until cancelled."""
    while True:
        await anyio.sleep(_REPORT_INTERVAL_S)
        report_suppressed()
