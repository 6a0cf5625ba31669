"""Starts the runner: what must come first, in the order in which it must.

The fork server needs as long to import what a worker needs as the runner to import its own: both do
it at once, so the runner's parts are imported here, behind the fork server's start.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import anyio

from runner import descriptors
from runner.process import ForkServer
from runner.service_manager import ServiceManager
from shared.config import Config, HttpAddress, worker_specs

if TYPE_CHECKING:
    from runner.reload import ReadConfig
    from runner.tracing import RunnerTracing

PORT_HINT: Final = "choose another address with --http or runner.http (port 0 takes any free one)"

OnStarted = Callable[[HttpAddress], None]
Surroundings = Callable[[], AbstractAsyncContextManager[None]]


def run(
    config: Config,
    *,
    read_again: ReadConfig | None = None,
    watched: Path | None = None,
    on_started: OnStarted = lambda _: None,
    around: Surroundings | None = None,
) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        config: what to run.
        read_again: reads the configuration again at SIGHUP.
        watched: the configuration's file, when it and the handlers' files are to be watched.
        on_started: called with the address that HTTP listens on, once it does.
        around: entered before the workers start and left after they have ended: the demo's nodes.

    Raises:
        ConfigError: when a handler cannot be loaded, or tracing not begin.
        StartError: when the state folder or the address is in use, or there are too few file descriptors.
    """
    descriptors.require(len(worker_specs(config)))
    signal.signal(signal.SIGTERM, _leave_early)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is just being read need not be read again
    if watched is not None:
        # Two saves within a second may leave a .pyc that looks like the later one's. For all that is forked.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    service_manager = ServiceManager()  # before the fork server: no worker inherits the way to it
    fork_server = ForkServer(tracing=config.tracing)
    fork_server.start()
    from runner.app import Runner
    from runner.memories import bring_forward
    from runner.reload import check_handlers
    from runner.state_dir import hold
    from shared.http_server import listen, resolve

    place = resolve(config.http.host, config.http.port, hint=PORT_HINT)
    with hold(config.state_dir) as state, listen(place, hint=PORT_HINT) as listener, _tracing(config) as tracing:
        check_handlers(config.agents, fork_server)
        bring_forward(worker_specs(config))
        runner = Runner(config, read_again, fork_server, state, listener, service_manager, tracing, watched)
        anyio.run(runner.run, on_started, around, backend_options={"use_uvloop": True})


@contextmanager
def _tracing(config: Config) -> Iterator[RunnerTracing | None]:
    """Trace for as long as the `with` lasts, if the configuration says so."""
    if not config.tracing:
        yield None
        return
    from runner.tracing import RunnerTracing

    tracing = RunnerTracing()
    try:
        yield tracing
    finally:
        tracing.close()


def _leave_early(number: int, frame: object) -> None:
    """End a start that a signal interrupts as any end: in order, with status 0."""
    raise SystemExit(0)
