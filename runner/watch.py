"""`--reload`: watches the handlers' folders, and replaces the workers of each handler that changed.

No handler is imported here. A probe process imports the new code first. If that fails, nothing
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from runner.supervision.probes import Probes
from runner.supervision.supervisor import Supervisor
from shared.config.handlers import HandlerRef
from shared.config.load import Config
from shared.errors import ConfigError
from shared.logs.logger import get_logger

_QUIET_MS: Final = 200
"""Changes that follow each other faster are one batch, because editors save in several steps."""

_POLL_MS: Final = 1000
"""How often files are checked if the kernel cannot report changes."""

_Agents = dict[HandlerRef, list[str]]


class Watcher:
    """Replaces a handler's workers when a Python file in or below the handler's folder changes.

    Args:
        config: the running configuration.
        file: the configuration file.
        reload: requests that `file` is re-read and applied.
    """

    def __init__(
        self,
        config: Config,
        file: Path,
        probes: Probes,
        supervisor: Supervisor,
        reload: Callable[[], None],
    ) -> None:
        self._file = file.absolute()
        self._probes = probes
        self._supervisor = supervisor
        self._reload = reload
        self._agents_by_handler = _agents_by_handler(config)
        self._due: dict[HandlerRef, Path] = {}
        self._busy: set[HandlerRef] = set()
        self._stop_watch = anyio.Event()
        self._log = get_logger()

    def set_handlers(self, config: Config) -> None:
        """Watch the folders of this configuration's handlers from now on."""
        before = self._folders
        self._agents_by_handler = _agents_by_handler(config)
        if self._folders != before:
            self._stop_watch.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        handlers = [str(ref) for ref in self._agents_by_handler]
        self._log.info(
            "watching",
            handlers=handlers,
            config=str(self._file),
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, tasks)
            try:
                await anyio.sleep_forever()
            finally:
                # watchfiles waits on a thread, which a cancellation does not stop.
                self._stop_watch.set()

    @property
    def _folders(self) -> set[Path]:
        """The folders to watch. Folders below these are watched with them."""
        found = {ref.search_dir.resolve() for ref in self._agents_by_handler}
        # The folder, not the file: many editors save by replacing the file, and the kernel would
        # continue to watch the old one.
        found.add(self._file.resolve().parent)
        return {folder for folder in found if found.isdisjoint(folder.parents)}

    async def _watch(self, tasks: TaskGroup) -> None:
        from watchfiles import PythonFilter, awatch

        polls: bool | None = None  # watchfiles decides
        while True:
            # `set_handlers` sets this event, and the next turn watches the other folders.
            self._stop_watch = anyio.Event()
            changes = awatch(
                *filter(Path.is_dir, self._folders),  # a missing one would be an error
                watch_filter=PythonFilter(extra_extensions=[self._file.suffix]),
                step=_QUIET_MS,
                stop_event=self._stop_watch,
                force_polling=polls,
                poll_delay_ms=_POLL_MS,
                ignore_permission_denied=True,
            )
            try:
                async with aclosing(changes):
                    async for batch in changes:
                        files = sorted(_resolved(path) for _, path in batch)
                        self._on_changes(files, tasks)
            except (OSError, RuntimeError) as exc:
                # The kernel's limits of watches are shared by all programs of the user. Polling
                # needs no watches.
                if not polls:
                    self._log.error(
                        "watching_by_polling",
                        error=" ".join(str(exc).split()),
                        hint="files are checked once a second; if a limit is reached, raise "
                        "fs.inotify.max_user_instances or max_user_watches",
                    )
                polls = True
                await anyio.sleep(_POLL_MS / 1000)

    def _on_changes(
        self,
        files: Sequence[Path],
        tasks: TaskGroup,
    ) -> None:
        if self._file.resolve() in files:
            self._log.info("config_changed", file=str(self._file))
            self._reload()
        modules = [file for file in files if file.suffix == ".py"]
        for ref in self._agents_by_handler:
            folder = ref.search_dir.resolve()
            changed = next((file for file in modules if file.is_relative_to(folder)), None)
            if changed is None:
                continue
            self._log.info(
                "handler_changed",
                handler=str(ref),
                file=str(changed),
            )
            self._due[ref] = changed
            # Processes that still load the previous code must not delay the new code.
            self._supervisor.give_up_starting(ref)
            self._probes.kill(ref)
            # One task per handler: two at once could leave workers with the older code.
            if ref not in self._busy:
                self._busy.add(ref)
                tasks.start_soon(self._replace_workers, ref)

    async def _replace_workers(self, ref: HandlerRef) -> None:
        """Replace a handler's workers. Repeat that if the handler changed in the meantime."""
        try:
            while ref in self._due and not self._supervisor.stopping:
                await self._replace_workers_once(ref, self._due.pop(ref))
        finally:
            self._busy.discard(ref)

    async def _replace_workers_once(
        self,
        ref: HandlerRef,
        file: Path,
    ) -> None:
        agents = self._agents_by_handler.get(ref, [])
        try:
            await anyio.to_thread.run_sync(self._probes.probe, ref, abandon_on_cancel=True)
        except Exception as exc:  # noqa: BLE001 - an internal error must not stop healthy workers
            # Nothing has changed yet: the old workers answer until the user fixes the code.
            internal = None if isinstance(exc, ConfigError) else exc
            self._report_failure(
                ref,
                file,
                reason=str(exc),
                exc_info=internal,
            )
            return
        failures = await self._supervisor.replace_for_handler(ref, f"{file.name} has changed")
        if self._supervisor.stopping:
            return
        if self._supervisor.has_other_handler(ref, agents):
            # A worker of these agents still has its former handler, because this handler failed to
            # load at an earlier reload of the configuration. Now it may load.
            self._reload()
        replaced = [worker for worker, failure in failures.items() if failure is None]
        if replaced:
            self._log.info(
                "handler_reloaded",
                file=str(file),
                agents=agents,
                workers=replaced,
            )
        failed = {worker: failure.reason for worker, failure in failures.items() if failure}
        if failed:
            # Workers of one handler usually fail for the same reason, which is reported once.
            reasons = "; ".join(dict.fromkeys(failed.values()))
            self._report_failure(
                ref,
                file,
                reason=reasons,
                workers=list(failed),
            )

    def _report_failure(self, ref: HandlerRef, file: Path, **fields: Any) -> None:
        if ref in self._due or self._supervisor.stopping:
            # A probe that was abandoned for newer code did not fail because of the code.
            return
        self._log.error(
            "handler_not_reloaded",
            file=str(file),
            agents=self._agents_by_handler.get(ref, []),
            hint="the old code still answers",
            **fields,
        )


def _resolved(path: str) -> Path:
    # If symbolic links give a folder several names, the kernel reports only one of them.
    file = Path(path)
    return file.parent.resolve() / file.name


def _agents_by_handler(config: Config) -> _Agents:
    found: _Agents = {}
    for agent in config.agents:
        found.setdefault(agent.handler, []).append(agent.name)
    return found
