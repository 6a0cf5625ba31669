"""The runner as a whole: builds the parts from a Config, runs them in one task group, owns the signals."""

from __future__ import annotations

import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

import anyio
import anyio.abc
import structlog
import zmq

from runner.http import Api
from runner.process import ForkServer
from runner.reload import ReadConfig, Reloader, check_handlers, policy_of, workers_by_agent
from runner.router import Router
from runner.state_dir import StateDir, hold
from runner.supervisor import Supervisor
from shared.config import Config, HttpAddress, worker_specs
from shared.errors import StartError
from shared.http_server import HttpServer, listen, resolve

REPLY_GRACE_S: Final = 0.5
"""How long clients may take to read the last answers when the runner ends."""

SETTLE_S: Final = 0.02
"""How long requests that have arrived may take to be read before the door is closed."""

SAME_SIGNAL_S: Final = 0.3
"""Signals that follow each other faster than a person's are one."""

OWN_DESCRIPTORS: Final = 64
"""What the runner needs without a worker or a client: sockets, ZeroMQ, the fork server, some to spare."""

WORKER_DESCRIPTORS: Final = 4
"""What it keeps open for one worker: its pidfd, the two pipes of its fork, its ZeroMQ connection."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PORT_HINT: Final = "choose another address with --http or runner.http (port 0 takes any free one)"

OnStarted = Callable[[HttpAddress], None]
Surroundings = Callable[[], AbstractAsyncContextManager[None]]


def run(
    config: Config,
    *,
    read_again: ReadConfig | None = None,
    on_started: OnStarted = lambda _: None,
    around: Surroundings | None = None,
) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        config: what to run.
        read_again: reads the configuration again at SIGHUP.
        on_started: called with the address that HTTP listens on, once it does.
        around: entered before the workers start and left after they have ended: the demo's nodes.

    Raises:
        ConfigError: when a handler cannot be loaded.
        StartError: when the state folder or the address is in use, or there are too few file descriptors.
    """
    _require_descriptors(len(worker_specs(config)))
    signal.signal(signal.SIGTERM, _leave_early)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is just being read need not be read again
    fork_server = ForkServer()
    fork_server.start()
    place = resolve(config.http.host, config.http.port, hint=_PORT_HINT)
    with hold(config.state_dir) as state, listen(place, hint=_PORT_HINT) as listener:
        check_handlers(config.agents, fork_server)
        runner = Runner(config, read_again, fork_server, state, listener)
        anyio.run(runner.run, on_started, around, backend_options={"use_uvloop": True})


def _require_descriptors(workers: int) -> None:
    """Raise the limit on open files to what these workers need, if it is lower; ZeroMQ would abort without."""
    needed = OWN_DESCRIPTORS + WORKER_DESCRIPTORS * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise StartError(
            f"only {hard} files may be open at once, and {workers} workers need {needed}; "
            "raise the limit with ulimit -n, or LimitNOFILE in a systemd unit"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _leave_early(number: int, frame: object) -> None:
    """End a start that a signal interrupts as any end: in order, with status 0."""
    raise SystemExit(0)


class Runner:
    """One running runner."""

    def __init__(
        self,
        config: Config,
        read_again: ReadConfig | None,
        fork_server: ForkServer,
        state: StateDir,
        listener: socket.socket,
    ) -> None:
        self._config = config
        self._fork_server = fork_server
        self._state = state
        self._listener = listener
        self._router = Router(
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
            self._router, workers_by_agent(specs), lambda: self._supervisor.rows, config.http, config.http_token
        )
        self._reloader = Reloader(read_again, config, fork_server, self._supervisor, self._router, self._api, state)
        self._server = HttpServer(self._api.app, listener, direct=self._api.queries.take)
        self._leaving_since_s: float | None = None
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
                tasks.start_soon(self._reloader.run)
                await self._server.start()
                self._announce(on_started)
                await self._supervisor.run()
                # What was in flight is answered by now, by its worker or in its stead; what was held is not.
                self._router.refuse_all()
                await self._server.stop(REPLY_GRACE_S)
                tasks.cancel_scope.cancel()
        finally:
            self._router.close()
        self._log.info("stopped")

    def _announce(self, on_started: OnStarted) -> None:
        address = HttpAddress(self._config.http.host, self._listener.getsockname()[1])
        self._state.announce(f"http://{address}")
        self._log.info("started", http=f"http://{address}", workers=len(self._supervisor))
        on_started(address)

    async def _obey_signals(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        try:
            with anyio.open_signal_receiver(*_SIGNALS) as signals:
                task_status.started()
                async with anyio.create_task_group() as tasks:
                    async for number in signals:
                        self._obey(number, tasks)
        finally:
            # The end is under way: an impatient Ctrl-C must not turn it into a traceback.
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _obey(self, number: signal.Signals, tasks: anyio.abc.TaskGroup) -> None:
        if number == signal.SIGHUP:
            self._reloader.ask()
        elif self._leaving_since_s is None:
            self._leaving_since_s = time.monotonic()
            self._supervisor.retire()
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


@asynccontextmanager
async def _nothing_around() -> AsyncIterator[None]:
    yield
