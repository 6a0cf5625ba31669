"""Reload: read the configuration again and apply what changed. An invalid file changes nothing.

A reload is requested by SIGHUP, by a changed file with `run --reload`, and by each connection to
the reload socket, which gets the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from runner.state_dir import ReloadOutcome, ReloadResult
from runner.supervision.probes import Probes
from runner.supervision.restarts import RestartPolicy
from runner.supervision.supervisor import Changes, Supervisor
from shared.config.load import Agent, Config, WorkerSpec, worker_specs
from shared.errors import ConfigError, StartError
from shared.logs import logger as logs
from shared.logs.logger import get_logger

ReadConfig = Callable[[], Config]
"""Reads the configuration file. It may raise `ConfigError`."""

ACCEPT_RETRY_S: Final = 0.1
"""The time between two attempts to accept a client when no file descriptor is left."""

_SEND_TIMEOUT_S: Final = 5.0
"""How long a client may take to read its outcome."""

_FIXED: Final = ("http", "http_token", "state_dir", "tracing")
"""Keys that only a restart changes, because what they define is in use.

These are the sockets, the token of the HTTP server, the lock and the memories' files in the state
folder, and the workers' tracers.
"""


def workers_by_agent(specs: Sequence[WorkerSpec]) -> dict[str, tuple[str, ...]]:
    """Return each agent's workers, in the order in which they are chosen for a direct query."""
    found: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        agent = spec.agent.name
        found[agent] = (*found.get(agent, ()), spec.name)
    return found


def check_handlers(
    agents: Sequence[Agent],
    probes: Probes,
) -> dict[str, tuple[str, ...]]:
    """Load each agent's handler in a probe process.

    Returns:
        Each agent's capabilities: those of the configuration, else those of the handler.

    Raises:
        ConfigError: naming the first agent whose handler cannot be loaded, and why.
        StartError: if no process can be started.
    """
    found: dict[str, tuple[str, ...]] = {}
    for agent in agents:
        try:
            of_handler = probes.probe(agent.handler)
        except ConfigError as exc:
            raise ConfigError(f"agent {agent.name!r}: {exc}") from None
        found[agent.name] = of_handler if agent.capabilities is None else agent.capabilities
    return found


class Reloader:
    """Applies new configurations to a running runner, one at a time.

    Args:
        read: reads the configuration again; None if it has no file.
        config: the running configuration.
        reserve_descriptors: reserves file descriptors for a number of workers; raises `StartError`
            if the system does not allow that many.
        set_config: applies a new configuration to the parts other than the workers.
    """

    def __init__(
        self,
        read: ReadConfig | None,
        config: Config,
        probes: Probes,
        supervisor: Supervisor,
        reserve_descriptors: Callable[[int], None],
        set_config: Callable[[Config], None],
    ) -> None:
        self._read = read
        self._config = config
        self._probes = probes
        self._supervisor = supervisor
        self._reserve_descriptors = reserve_descriptors
        self._set_config = set_config
        self._next = _Reload()
        self._log = get_logger()

    def request(self) -> None:
        """Request a reload. All requests that arrive during a reload share the next one."""
        self._next.requested.set()

    async def serve(
        self,
        path: Path,
        *,
        task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve the clients of the reload socket, one at a time, until cancelled."""
        # The socket has the mode 600, and its folder the mode 700. HTTP has no route for a reload,
        # because without a token any user of the machine can send requests to its port.
        async with await anyio.create_unix_listener(path, mode=0o600) as listener:
            task_status.started()
            while True:
                # The next client waits in the kernel's backlog, where it needs no file descriptor.
                await self._reply(await _accept(listener))

    async def _reply(self, stream: anyio.abc.SocketStream) -> None:
        """Reload, and send the outcome as JSON. The connection itself is the request."""
        async with stream:
            # The next reload, not one that is running: that one may have read the file before the
            # user saved it.
            reload = self._next
            self.request()
            await reload.done.wait()
            # A client that does not read its outcome must not delay the next one.
            with anyio.move_on_after(_SEND_TIMEOUT_S), suppress(anyio.BrokenResourceError):
                await stream.send(msgspec.json.encode(reload.outcome))

    async def run(self) -> None:
        """Do the requested reloads until cancelled."""
        while True:
            reload = self._next
            await reload.requested.wait()
            # Before the file is read: a request that arrives from now on may be about a later
            # version of the file, so it causes another reload.
            self._next = _Reload()
            outcome = reload.outcome = await self._reload()
            if outcome.result == "done":
                self._log.info("reloaded", changes=outcome.message)
            else:
                incomplete = outcome.result == "incomplete"
                event = "reload_incomplete" if incomplete else "reload_refused"
                self._log.error(event, reason=outcome.message)
            reload.done.set()

    async def _reload(self) -> ReloadOutcome:
        if self._read is None:
            return ReloadOutcome("refused", "there is no configuration file to read again")
        if self._supervisor.stopping:
            return ReloadOutcome("refused", "nothing was changed: the runner is stopping")
        applying = False
        try:
            config = await self._read_and_check(self._read)
            applying = True
            return await self._apply(config)
        except ConfigError as exc:
            return ReloadOutcome("invalid", f"nothing was changed: {exc}")
        except StartError as exc:
            return ReloadOutcome("refused", f"nothing was changed: {exc}")
        except Exception as exc:  # noqa: BLE001 - an internal error must not stop healthy workers
            self._log.error("reload_fault", exc_info=exc)
            cause = f"an internal error, {type(exc).__name__} (see the log)"
            if not applying:
                return ReloadOutcome("refused", f"nothing was changed: {cause}")
            return ReloadOutcome("incomplete", f"it is unknown what was changed: {cause}")

    async def _read_and_check(self, read: ReadConfig) -> Config:
        config = await anyio.to_thread.run_sync(read, abandon_on_cancel=True)
        # Handlers that run already are not loaded again: they have proved that they load, and an
        # import may take long.
        known = {(agent.name, agent.handler) for agent in self._config.agents}
        new = [agent for agent in config.agents if (agent.name, agent.handler) not in known]
        await anyio.to_thread.run_sync(
            check_handlers,
            new,
            self._probes,
            abandon_on_cancel=True,
        )
        # Removed workers still drain while the added ones start, so there must be room for both.
        running = {spec.name for spec in worker_specs(self._config)}
        wanted = {spec.name for spec in worker_specs(config)}
        self._reserve_descriptors(len(running | wanted))
        return config

    async def _apply(self, config: Config) -> ReloadOutcome:
        before = self._config.runner
        kept = {name: getattr(before, name) for name in _FIXED}
        fixed = [name for name in _FIXED if getattr(config.runner, name) != kept[name]]
        runner = msgspec.structs.replace(config.runner, **kept)
        config = msgspec.structs.replace(config, runner=runner)
        if (runner.log_level, runner.log_format) != (before.log_level, before.log_format):
            logs.configure(runner.log_level, runner.log_format)
        # Before the workers change: an added agent can be queried as soon as it starts, and a
        # removed one gets no more queries while it drains.
        self._set_config(config)
        changes = await self._supervisor.change(
            worker_specs(config),
            RestartPolicy(supervision=config.supervision),
        )
        # Also if some workers were not replaced. The supervisor still knows their old specs, so the
        # next reload tries them again.
        self._config = config
        result: ReloadResult = "incomplete" if changes.failed else "done"
        return ReloadOutcome(result, _describe(changes, fixed))


async def _accept(listener: anyio.abc.SocketListener) -> anyio.abc.SocketStream:
    """Return the next client."""
    while True:
        try:
            return await listener.accept()
        except anyio.BrokenResourceError:
            # No file descriptor is left. That must not stop the runner: the client waits in the
            # backlog until another descriptor is closed.
            await anyio.sleep(ACCEPT_RETRY_S)


class _Reload:
    """One reload, which several requests may share."""

    def __init__(self) -> None:
        self.requested = anyio.Event()
        self.done = anyio.Event()
        self.outcome: ReloadOutcome | None = None


def _describe(changes: Changes, fixed: list[str]) -> str:
    """Return the message of a reload: the changed workers, and the keys that it cannot change."""
    groups = {
        "added": changes.added,
        "removed": changes.removed,
        "replaced": changes.replaced,
        "NOT replaced, see the log": changes.failed,
        "only a restart changes": [f"runner.{name}" for name in fixed],
    }
    parts = [f"{title}: {', '.join(names)}" for title, names in groups.items() if names]
    return "; ".join([*parts, f"unchanged: {changes.unchanged}"])
