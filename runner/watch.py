"""`--reload`: which files a handler is made of, which of them changed, and whose workers are replaced for it.

No handler is imported here: its file is looked for along the way on which a worker finds it, and what it
imports is read from its text. `Watched` decides, without I/O of its own; `Watcher` waits and has it done.
"""

from __future__ import annotations

import ast
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup

from runner.process import PROBE_TIMEOUT_S, SLOW_IMPORT_S, ForkServer
from runner.supervisor import Supervisor
from shared.config import Config
from shared.errors import ConfigError
from shared.handlers import HandlerRef
from shared.logs import get_logger

NOTICE_MS: Final = 20
"""How soon after a change files are looked at; what the kernel tells meanwhile is of the same look."""

STEP_MS: Final = 200
"""How long it must be quiet after a change: an editor's several writes are one."""

DEBOUNCE_MS: Final = 1600
"""How long changes may go on before they are looked at all the same."""

LOOK_MS: Final = 1000
"""Files are looked at so often even if the kernel tells of no change: of some file systems it knows nothing."""

MAX_FILES: Final = 1000
"""Of how many files one handler may be made, before the rest is not followed."""

_INSTALLED: Final = ("site-packages", "dist-packages")

Stamp = tuple[int, ...]


class Import(NamedTuple):
    """A module that a file imports: its dotted name, and how many dots stood before it."""

    level: int
    name: str


def imports(source: bytes) -> tuple[Import, ...]:
    """Return what a text imports anywhere in it.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: when it is not Python.
    """
    found: dict[Import, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(Import(0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = f"{node.module}." if node.module else ""
            # What is imported from a module may be a module itself.
            found |= dict.fromkeys(Import(node.level, f"{prefix}{alias.name}") for alias in node.names)
    return tuple(found)


def candidates(folder: Path, name: str) -> Iterator[Path]:
    """Return every file that importing `name` from `folder` may run; most are not there."""
    for part in name.split("."):
        folder = folder / part
        yield folder.with_name(f"{part}.py")
        yield folder / "__init__.py"


def stamp(file: Path) -> Stamp | None:
    """Return what tells a file from what it was before; None when it is not there."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if stat.S_ISREG(found.st_mode) else None


class Changed(NamedTuple):
    """What changed since the last look: handlers, each with the file of it that did; other files.

    `emptied` when one of these files is empty: who writes it may just have begun.
    """

    handlers: dict[HandlerRef, Path]
    others: frozenset[Path]
    emptied: bool


class Watched:
    """The files of some handlers, as they were when last looked at.

    A handler is made of its own file and of the modules that it imports, they in turn too, from the folder in
    which it was found: that is what its author edits. What is installed is left alone.

    Args:
        handlers: whose files.
        others: further files.
        path: where modules are looked for after the handler's own folder, as in `sys.path`.
        stamp: what tells a file from what it was.
        read: returns a file's text.
    """

    def __init__(
        self,
        handlers: Iterable[HandlerRef],
        others: Iterable[Path] = (),
        path: Sequence[str] = (),
        *,
        stamp: Callable[[Path], Stamp | None] = stamp,
        read: Callable[[Path], bytes] = Path.read_bytes,
    ) -> None:
        self._others = tuple(others)
        self._path = tuple(path)
        self._stamp = stamp
        self._read = read
        self._imports: dict[Path, tuple[Stamp, tuple[Import, ...]]] = {}
        self._stamps: dict[Path, Stamp | None] = {}
        self._files: dict[HandlerRef, tuple[Path, ...]] = {}
        self.follow(handlers)

    def follow(self, handlers: Iterable[HandlerRef]) -> None:
        """Watch the files of these handlers from now on. What is watched already keeps its last look."""
        self._files = {ref: self._sources(ref) for ref in handlers}
        wanted = dict.fromkeys((*self._others, *(file for files in self._files.values() for file in files)))
        self._stamps = {file: self._stamps[file] if file in self._stamps else self._stamp(file) for file in wanted}

    def changed(self) -> Changed:
        """Look again, and return what changed since the last look."""
        now = {file: self._stamp(file) for file in self._stamps}
        changed = [file for file, was in self._stamps.items() if now[file] != was]
        self._stamps = now
        touched = {ref: file for ref, files in self._files.items() for file in files if file in changed}
        if touched:
            self.follow(list(self._files))
        others = frozenset(file for file in self._others if file in changed)
        return Changed(touched, others, any(map(self._is_empty, changed)))

    def _is_empty(self, file: Path) -> bool:
        try:
            return self._stamp(file) is not None and not self._read(file)
        except OSError:
            return False

    def lost(self) -> list[HandlerRef]:
        """Return the handlers that have no file to be watched."""
        return [ref for ref, files in self._files.items() if not any(self._stamps[file] for file in files)]

    @property
    def folders(self) -> frozenset[Path]:
        """Where changes are to be waited for: editors replace files, and a link's target is elsewhere."""
        found: set[Path] = set()
        for file in self._stamps:
            for parent in (file.parent, Path(os.path.realpath(file)).parent):
                found.add(next(folder for folder in (parent, *parent.parents) if folder.is_dir()))
        return frozenset(found)

    def _sources(self, ref: HandlerRef) -> tuple[Path, ...]:
        root, first = self._where(ref)
        files = dict.fromkeys(first)
        if any(part in _INSTALLED for part in root.parts):
            return tuple(files)
        todo = list(files)
        while todo and len(files) < MAX_FILES:
            file = todo.pop()
            for level, name in self._imports_of(file):
                folder = file.parents[min(level, len(file.parents)) - 1] if level else root
                new = [each for each in candidates(folder, name) if each not in files]
                files |= dict.fromkeys(new)
                todo += new
        return tuple(files)

    def _where(self, ref: HandlerRef) -> tuple[Path, tuple[Path, ...]]:
        """Return the folder from which a worker imports a handler, and the files that this runs."""
        if ref.file is not None:
            return ref.search_dir, (ref.file,)
        assert ref.module is not None
        own = str(ref.search_dir)
        for entry in self._path if own in self._path else (own, *self._path):
            files = tuple(candidates(Path(entry).absolute(), ref.module))
            if any(self._stamp(file) for file in files[-2:]):
                return Path(entry).absolute(), files
        return ref.search_dir, tuple(candidates(ref.search_dir, ref.module))

    def _imports_of(self, file: Path) -> tuple[Import, ...]:
        at = self._stamp(file)
        known = self._imports.get(file)
        if at is None:
            return ()
        if known is None or known[0] != at:
            try:
                known = (at, imports(self._read(file)))
            except (
                OSError,
                SyntaxError,
                ValueError,
                RecursionError,
                MemoryError,
            ):  # half-written: what it was made of still holds
                known = (at, known[1] if known else ())
            self._imports[file] = known
        return known[1]


class Watcher:
    """Waits for changes, and has the workers replaced whose handler is made of what changed.

    Args:
        config: what runs now, `file` where it was read.
        reload: reads `file` again and applies it.
    """

    def __init__(
        self, config: Config, file: Path, fork_server: ForkServer, supervisor: Supervisor, reload: Callable[[], None]
    ) -> None:
        self._file = file.absolute()
        self._fork_server = fork_server
        self._supervisor = supervisor
        self._reload = reload
        self._agents = _agents_by_handler(config)
        self._watched = Watched(self._agents, [self._file], sys.path)
        self._looking = anyio.Lock()
        self._due: dict[HandlerRef, Path] = {}
        self._busy: set[HandlerRef] = set()
        self._outdated = anyio.Event()
        self._stop = anyio.Event()
        self._log = get_logger("watch")

    async def follow(self, config: Config) -> None:
        """Watch the files of another configuration's handlers from now on."""
        async with self._looking:
            self._agents = _agents_by_handler(config)
            await anyio.to_thread.run_sync(self._watched.follow, self._agents)
        self._tell_lost()
        self._stop.set()  # its folders are others

    async def run(self) -> None:
        """Watch until cancelled."""
        self._log.info("watching", handlers=[str(ref) for ref in self._agents], config=str(self._file))
        self._tell_lost()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._end)
            while True:
                try:
                    await self._wait(tasks)
                except FileNotFoundError:  # a folder has just gone; it may be on its way back
                    await anyio.sleep(LOOK_MS / 1000)
                    await self._look(tasks)
                except Exception as exc:  # noqa: BLE001 - OSError, and a RuntimeError of the library's own
                    self._log.error(
                        "watching_without_kernel",
                        why=" ".join(str(exc).split()),
                        do="files are looked at once a second; where it is a limit, raise "
                        "fs.inotify.max_user_instances or max_user_watches",
                    )
                    break
            while True:
                await anyio.sleep(LOOK_MS / 1000)
                await self._look(tasks)

    async def _end(self) -> None:
        """Have the thread that waits let go at once when all this is cancelled: it cannot be, itself."""
        try:
            await anyio.sleep_forever()
        finally:
            self._stop.set()

    async def _wait(self, tasks: TaskGroup) -> None:
        """Look whenever something happens in the folders, until they are others."""
        from watchfiles import awatch

        self._stop = anyio.Event()
        folders = await anyio.to_thread.run_sync(lambda: self._watched.folders)
        changes = awatch(
            *folders,
            watch_filter=None,
            debounce=DEBOUNCE_MS,
            step=NOTICE_MS,
            stop_event=self._stop,
            rust_timeout=LOOK_MS,
            yield_on_timeout=True,
            recursive=False,
        )
        async with aclosing(changes):
            async for _ in changes:
                await self._look(tasks)
                if await anyio.to_thread.run_sync(lambda: self._watched.folders) != folders:
                    return

    async def _settled(self) -> Changed:
        """Return what changed, once it is quiet. An empty file is waited for."""
        found = await anyio.to_thread.run_sync(self._watched.changed)
        ends_s = time.monotonic() + DEBOUNCE_MS / 1000
        quiet = False
        while (found.handlers or found.others) and not (quiet and not found.emptied) and time.monotonic() < ends_s:
            await anyio.sleep(STEP_MS / 1000)
            more = await anyio.to_thread.run_sync(self._watched.changed)
            quiet = not (more.handlers or more.others)
            found = Changed(
                found.handlers | more.handlers, found.others | more.others, found.emptied if quiet else more.emptied
            )
        return found

    async def _look(self, tasks: TaskGroup) -> None:
        async with self._looking:
            changed = await self._settled()
        if self._file in changed.others:
            self._log.info("config_changed", file=str(self._file))
            self._reload()
        for ref, file in changed.handlers.items():
            self._log.info("handler_changed", handler=str(ref), file=str(file))
            self._due[ref] = file
            self._supervisor.outdate(ref)
            self._outdated.set()
            self._outdated = anyio.Event()
            if ref not in self._busy:
                self._busy.add(ref)
                tasks.start_soon(self._renew, ref)

    async def _renew(self, ref: HandlerRef) -> None:
        """Replace a handler's workers, and again for what is saved meanwhile."""
        try:
            while ref in self._due and not self._supervisor.leaving:
                await self._renew_once(ref, self._due.pop(ref))
        finally:
            self._busy.discard(ref)

    async def _renew_once(self, ref: HandlerRef, file: Path) -> None:
        agents = self._agents.get(ref, ())
        try:
            # In a process of its own first: what is broken is said once, and costs no worker.
            await self._probe(ref)
        except ConfigError as exc:
            if ref not in self._due and not self._supervisor.leaving:
                self._tell_failed(file, agents, str(exc))
            return
        except Exception as exc:  # noqa: BLE001 - a fault of ours must not end the runner, whose workers are well
            self._log.error("handler_not_reloaded", file=str(file), agents=agents, exc_info=exc)
            return
        found = await self._supervisor.renew(ref, f"{file.name} has changed")
        if self._supervisor.leaving:
            return
        if self._supervisor.lacks(ref, agents):  # a configuration that names it could not be applied, because of it
            self._reload()
        if renewed := [worker for worker, problem in found.items() if not problem]:
            self._log.info("handler_reloaded", file=str(file), agents=agents, workers=renewed)
        failed = {worker: problem for worker, problem in found.items() if problem}
        if failed and ref not in self._due:
            self._tell_failed(file, agents, "; ".join(dict.fromkeys(failed.values())), workers=list(failed))

    async def _probe(self, ref: HandlerRef) -> None:
        """Have it loaded in a process of its own, which is ended when the handler is saved again meanwhile.

        Raises:
            ConfigError: when it cannot be loaded.
        """
        problem: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell_slow, ref)
            tasks.start_soon(self._abandon_outdated, ref)
            try:
                await anyio.to_thread.run_sync(self._fork_server.probe, ref, abandon_on_cancel=True)
            except Exception as exc:  # noqa: BLE001 - raised below: a group would wrap it
                problem = exc
            tasks.cancel_scope.cancel()
        if problem is not None:
            raise problem

    async def _tell_slow(self, ref: HandlerRef) -> None:
        await anyio.sleep(SLOW_IMPORT_S)
        self._log.warning(
            "handler_importing",
            handler=str(ref),
            since_s=SLOW_IMPORT_S,
            do=f"the old one still answers; it is given up after {PROBE_TIMEOUT_S:g} s, or when it is saved again",
        )

    async def _abandon_outdated(self, ref: HandlerRef) -> None:
        while ref not in self._due:
            await self._outdated.wait()
        while True:  # its process may have to be started yet
            self._fork_server.abandon_probes(ref)
            await anyio.sleep(STEP_MS / 1000)

    def _tell_failed(self, file: Path, agents: Sequence[str], error: str, **more: Any) -> None:
        self._log.error(
            "handler_not_reloaded", file=str(file), agents=agents, error=error, do="the old one still answers", **more
        )

    def _tell_lost(self) -> None:
        for ref in self._watched.lost():
            self._log.warning("handler_not_watched", handler=str(ref), why="no file of it is found")


def _agents_by_handler(config: Config) -> dict[HandlerRef, tuple[str, ...]]:
    found: dict[HandlerRef, tuple[str, ...]] = {}
    for agent in config.agents:
        found[agent.handler] = (*found.get(agent.handler, ()), agent.name)
    return found
