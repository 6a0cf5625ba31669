"""SIGHUP: read the configuration again, and change only what changed in it. A bad file changes nothing."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio
import anyio.to_thread
import msgspec

from runner.http import Api
from runner.process import ForkServer
from runner.restarts import RestartPolicy
from runner.router import Router
from runner.state_dir import Reloaded, StateDir
from runner.supervisor import Changes, Supervisor
from shared import logs
from shared.config import Agent, Config, WorkerSpec, worker_specs
from shared.errors import ConfigError, StartError
from shared.logs import get_logger

ReadConfig = Callable[[], Config]


def workers_by_agent(specs: tuple[WorkerSpec, ...]) -> dict[str, tuple[str, ...]]:
    """Return each agent's workers, its primary first."""
    found: dict[str, tuple[str, ...]] = {}
    for spec in specs:
        found[spec.agent.name] = (*found.get(spec.agent.name, ()), spec.name)
    return found


def policy_of(config: Config) -> RestartPolicy:
    """Return the restart policy that a configuration asks for."""
    return RestartPolicy(
        max_restarts=config.supervision.max_restarts, window_s=float(config.supervision.restart_window_s)
    )


def check_handlers(agents: tuple[Agent, ...], fork_server: ForkServer) -> dict[str, tuple[str, ...]]:
    """Load every agent's handler in a process of its own; return the capabilities each agent will tell.

    Raises:
        ConfigError: naming the first agent whose handler cannot be loaded, and why.
    """
    found: dict[str, tuple[str, ...]] = {}
    for agent in agents:
        try:
            own = fork_server.probe(agent.handler)
        except ConfigError as exc:
            raise ConfigError(f"agent {agent.name!r}: {exc}") from None
        found[agent.name] = own if agent.capabilities is None else agent.capabilities
    return found


class Reloader:
    """Brings a running runner to a new configuration, one reload at a time.

    Args:
        read: reads the configuration again; None where there is no file to read.
        config: what runs now.
        fork_server, supervisor, router, api, state: the parts that are changed, or told.
        make_room: sees to it that there can be so many workers; raises StartError when there cannot.

    Attributes:
        follow: told of a configuration before its workers are started, where anybody wants to know.
    """

    def __init__(
        self,
        read: ReadConfig | None,
        config: Config,
        fork_server: ForkServer,
        supervisor: Supervisor,
        router: Router,
        api: Api,
        state: StateDir,
        make_room: Callable[[int], None],
    ) -> None:
        self._read = read
        self._config = config
        self._fork_server = fork_server
        self._supervisor = supervisor
        self._router = router
        self._api = api
        self._state = state
        self._make_room = make_room
        self.follow: Callable[[Config], Awaitable[None]] | None = None
        self._began_s = 0.0
        self._asked = anyio.Event()
        self._log = get_logger("runner")

    def ask(self) -> None:
        """Ask for a reload; several asked for while one runs are one."""
        self._asked.set()

    async def run(self) -> None:
        """Do the reloads that are asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            self._began_s = time.monotonic()
            outcome = await self._once()
            event = "reloaded" if outcome.done else "reload_incomplete" if outcome.changed else "reload_refused"
            more = {} if outcome.done else {"do": "mend it, then save or reload the configuration again"}
            (self._log.info if outcome.done else self._log.error)(event, what=outcome.message, **more)
            try:
                self._state.tell_reload(outcome)
            except OSError as exc:
                self._log.error("reload_not_told", error=str(exc))

    def _refused(self, why: str) -> Reloaded:
        return Reloaded(self._began_s, False, why, changed=False)

    async def _once(self) -> Reloaded:
        if self._read is None:
            return self._refused("there is no configuration file to read again")
        if self._supervisor.leaving:
            return self._refused("nothing was changed: the runner is ending")
        applying = False
        try:
            config = await self._checked(self._read)
            applying = True
            return await self._apply(config)
        except (ConfigError, StartError) as exc:
            return self._refused(f"nothing was changed: {exc}")
        except Exception as exc:  # noqa: BLE001 - a fault of ours must not end the runner, whose workers are well
            self._log.error("reload_fault", exc_info=exc)
            words = "it is not known what was changed" if applying else "nothing was changed"
            why = f"{words}: a fault of em-runner's own, {type(exc).__name__} (see the log)"
            return Reloaded(self._began_s, False, why, changed=applying)

    async def _checked(self, read: ReadConfig) -> Config:
        config = await anyio.to_thread.run_sync(read, abandon_on_cancel=True)
        known = {(agent.name, agent.handler) for agent in self._config.agents}
        new = tuple(agent for agent in config.agents if (agent.name, agent.handler) not in known)
        await anyio.to_thread.run_sync(check_handlers, new, self._fork_server, abandon_on_cancel=True)
        # Those that are taken out are there while those that are new start.
        self._make_room(len({spec.name for of in (self._config, config) for spec in worker_specs(of)}))
        return config

    async def _apply(self, config: Config) -> Reloaded:
        # These hold for as long as the runner does: its lock, its socket and its memory files are where they are.
        kept = {name: getattr(self._config, name) for name in ("http", "http_token", "state_dir", "tracing")}
        fixed = [name for name, value in kept.items() if getattr(config, name) != value]
        config = msgspec.structs.replace(config, **kept)
        specs = worker_specs(config)
        if (config.log_level, config.log_format) != (self._config.log_level, self._config.log_format):
            logs.configure(config.log_level, config.log_format)
        self._router.bound(
            query_timeout_s=config.query_timeout_ms / 1000,
            max_in_flight=config.max_in_flight,
            max_in_flight_total=config.max_in_flight_total,
        )
        self._api.rename(workers_by_agent(specs))
        if self.follow is not None:
            await self.follow(config)
        changes = await self._supervisor.change(specs, policy_of(config), config.supervision.shutdown_timeout_ms / 1000)
        self._config = config
        return Reloaded(self._began_s, not changes.failed, _in_words(changes, fixed), changed=True)


def _in_words(changes: Changes, fixed: list[str]) -> str:
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("added", changes.added),
            ("removed", changes.removed),
            ("replaced", changes.replaced),
            ("NOT replaced, see the log", changes.failed),
        )
        if names
    ]
    parts.append(f"unchanged: {changes.unchanged}")
    if fixed:
        parts.append(f"only a restart changes: {', '.join('runner.' + name for name in fixed)}")
    return "; ".join(parts)
