"""Starts the runner: the steps before the event loop runs, whose order matters."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from runner import descriptors
from runner.service_manager import ServiceManager
from runner.supervision.fork_server import ForkServer
from shared.config.load import Config, worker_specs

if TYPE_CHECKING:
    from runner.app import Lifespan, OnStarted
    from runner.reload import ReadConfig
    from runner.web.direct import ExchangeFactory

_PORT_HINT: Final = "choose another address with --http or runner.http (port 0 takes any free one)"


def run(
    config: Config,
    *,
    read_config: ReadConfig | None = None,
    watched_file: Path | None = None,
    on_started: OnStarted = lambda _: None,
    lifespan: Lifespan | None = None,
) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        config: what to run.
        read_config: reads the configuration again for a reload; None if it has no file.
        watched_file: the configuration file, to watch it and the handlers' folders; None to watch
            nothing.
        on_started: called with the address of the HTTP server once it accepts connections.
        lifespan: makes a context that is entered before the workers start, and exited after they
            have ended.

    Raises:
        ConfigError: if a handler cannot be loaded, or a variable for tracing is invalid.
        StartError: if the state folder or the address is in use, no process can be started, or
            there are too few file descriptors.
    """
    # Before the fork server, because that inherits the raised limit, and the workers from it. It
    # needs a descriptor for each worker that runs.
    descriptors.raise_limit(len(worker_specs(config)))
    signal.signal(signal.SIGTERM, _exit_early)
    # The configuration was read a moment ago, so it need not be read again.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if watched_file is not None:
        # Python compares a module and its .pyc by their size and their time in whole seconds. After
        # two saves within a second, the first one's .pyc could be used. All workers inherit this.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # Before the fork server, which would inherit the service manager's variables.
    service_manager = ServiceManager()
    fork_server = ForkServer(tracing=config.runner.tracing)
    fork_server.start()
    # The fork server now imports what a worker needs, which takes as long as the imports below.
    # They are not at the top of the module, so that both run at the same time.
    from runner.app import Runner
    from runner.reload import check_handlers
    from runner.state_dir import locked_state_dir
    from runner.supervision.memories import report_unused_memories
    from runner.supervision.probes import Probes
    from shared.http.server import Address

    address = Address.resolve(config.http.host, config.http.port, hint=_PORT_HINT)
    # The folder and the address come before the handlers: importing a handler may take long, and
    # a second runner in the same folder should fail at once.
    with (
        locked_state_dir(config.runner.state_dir) as state,
        address.listen() as listener,
        _tracing(config) as make_exchange,
    ):
        check_handlers(config.agents, Probes(fork_server))
        report_unused_memories(worker_specs(config))
        runner = Runner(
            config,
            read_config,
            watched_file,
            fork_server,
            state,
            listener,
            service_manager,
            make_exchange,
        )
        anyio.run(runner.run, on_started, lifespan, backend_options={"use_uvloop": True})


@contextmanager
def _tracing(config: Config) -> Iterator[ExchangeFactory | None]:
    """Return the factory of traced responders, or None without tracing."""
    if not config.runner.tracing:
        yield None
        return
    # OpenTelemetry takes long to import, and runners without tracing do not need it.
    from runner.tracing import TracedExchange
    from shared.tracing import Tracing

    tracing = Tracing({})
    try:
        yield partial(TracedExchange, tracing)
    finally:
        tracing.close()


def _exit_early(number: int, frame: object) -> None:
    """Exit with status 0 on a signal during the start. The contexts clean up as they always do."""
    raise SystemExit(0)
