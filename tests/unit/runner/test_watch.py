"""`runner.watch`: which handlers a changed file concerns. No worker runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import pytest
import watchfiles

from runner.supervision.restarts import Failure
from runner.watch import Watcher
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, Config
from shared.errors import ConfigError
from tests.cluster import until
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio

# watchfiles raises a subclass of RuntimeError that has no public name.
TOO_MANY = RuntimeError("Too many open files")


class FakeRunner:
    """What the watcher uses of a supervisor, of the probes and of a reloader."""

    stopping = False

    def __init__(self) -> None:
        self.replaced: list[HandlerRef] = []
        self.probed: list[str] = []
        self.reloads = 0

    def reload(self) -> None:
        self.reloads += 1

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        assert ref.file is not None
        self.probed.append(ref.file.read_text())
        return ()

    def kill(self, ref: HandlerRef) -> None:
        pass

    def has_other_handler(self, ref: HandlerRef, agents: tuple[str, ...]) -> bool:
        return False

    def give_up_starting(self, ref: HandlerRef) -> None:
        pass

    async def replace_for_handler(self, ref: HandlerRef, reason: str) -> dict[str, Failure | None]:
        self.replaced.append(ref)
        return {"a_server": None}


class HangingRunner(FakeRunner):
    """A runner in which the first import of a handler hangs until its process is killed."""

    def __init__(self) -> None:
        super().__init__()
        self.killed = threading.Event()
        self.importing = anyio.Event()

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        super().probe(ref)
        if len(self.probed) == 1:
            anyio.from_thread.run_sync(self.importing.set)
            self.killed.wait(30)
            raise ConfigError("killed by SIGKILL")
        return ()

    def kill(self, ref: HandlerRef) -> None:
        if self.importing.is_set():
            self.killed.set()


def handler_in(file: Path) -> HandlerRef:
    """Write a new file, and return the handler in it."""
    file.parent.mkdir(exist_ok=True)
    file.write_text("# old")
    return HandlerRef(None, file, "handle", file.parent)


def save(file: Path, text: str) -> None:
    """Replace a file in one step, so that it is one change even on a busy machine."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def config_of(*handlers: HandlerRef) -> Config:
    agents = (
        Agent(name=f"agent_{index}", handler=ref, nodes=()) for index, ref in enumerate(handlers)
    )
    return Config(agents=tuple(agents))


def kernel_watches(folder: Path) -> bool:
    """Return whether this process receives inotify events of a folder."""
    inode = f"ino:{folder.stat().st_ino:x} "
    found = False
    for info in Path("/proc/self/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found = found or inode in info.read_text()
    return found


@asynccontextmanager
async def watching(
    folder: Path, runner: FakeRunner, *handlers: HandlerRef
) -> AsyncIterator[Watcher]:
    """Watch these handlers; the configuration is in `folder`."""
    fake: Any = runner
    file = folder / "em-runner.toml"
    watcher = Watcher(config_of(*handlers), file, fake, fake, runner.reload)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watcher.run)
        yield watcher
        tasks.cancel_scope.cancel()


async def test_change_in_a_folder_replaces_the_workers_of_handlers_in_and_above_it(
    tmp_path: Path,
) -> None:
    one, two, other = (
        handler_in(tmp_path / name) for name in ("a/one.py", "a/two.py", "b/other.py")
    )
    (tmp_path / "a" / "deep").mkdir()
    runner = FakeRunner()
    async with watching(tmp_path, runner, one, two, other):
        await until(lambda: kernel_watches(tmp_path / "a" / "deep"), "it is watched")
        (tmp_path / "a" / "deep" / "module.py").write_text("")
        await until(lambda: len(runner.replaced) == 2, "both are replaced")
        (tmp_path / "b" / "module.py").write_text("")
        await until(lambda: len(runner.replaced) == 3, "the other is replaced")
    assert set(runner.replaced[:2]) == {one, two}
    assert runner.replaced[2] == other
    assert runner.reloads == 0


async def test_file_that_is_not_python_replaces_nothing(tmp_path: Path) -> None:
    ref = handler_in(tmp_path / "a.py")
    runner = FakeRunner()
    async with watching(tmp_path, runner, ref):
        await until(lambda: kernel_watches(tmp_path), "it is watched")
        for name in ("a.txt", "a.pyc", ".a.py.swp", "pyproject.toml"):
            (tmp_path / name).write_text("")
        (tmp_path / "em-runner.toml").write_text("")
        await until(lambda: runner.reloads, "the configuration is reloaded")
    assert runner.replaced == []


async def test_configuration_and_folder_behind_links_are_watched(tmp_path: Path) -> None:
    real, seen = tmp_path / "real", tmp_path / "seen"
    handler_in(real / "a.py")
    seen.symlink_to(real)
    (tmp_path / "em-runner.toml").symlink_to(tmp_path / "target.toml")
    runner = FakeRunner()
    async with watching(tmp_path, runner, HandlerRef(None, seen / "a.py", "handle", seen)):
        await until(lambda: kernel_watches(real), "it is watched")
        (real / "a.py").write_text("# new")
        (tmp_path / "target.toml").write_text("")
        await until(lambda: runner.replaced and runner.reloads, "both changes are noticed")


async def test_folders_of_a_new_configuration_are_watched_instead(tmp_path: Path) -> None:
    old, new = handler_in(tmp_path / "a" / "a.py"), handler_in(tmp_path / "b" / "b.py")
    (tmp_path / "config").mkdir()
    runner = FakeRunner()
    async with watching(tmp_path / "config", runner, old) as watcher:
        await until(lambda: kernel_watches(tmp_path / "a"), "it is watched")
        watcher.set_handlers(config_of(new))
        await until(lambda: kernel_watches(tmp_path / "b"), "the new folder is watched")
        await until(lambda: not kernel_watches(tmp_path / "a"), "the old folder no longer is")
        save(tmp_path / "b" / "b.py", "# new")
        await until(lambda: runner.replaced, "it is replaced")
    assert runner.replaced == [new]


@pytest.mark.parametrize("refusal", [OSError(28, "No space left on device"), TOO_MANY])
async def test_files_are_polled_if_the_kernel_refuses_more_watches(
    refusal: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = watchfiles.awatch

    async def refuse(
        *folders: Path, force_polling: bool | None, **options: Any
    ) -> AsyncIterator[object]:
        if not force_polling:
            raise refusal
        async for batch in real(*folders, force_polling=True, **options):
            yield batch

    monkeypatch.setattr(watchfiles, "awatch", refuse)
    monkeypatch.setattr("runner.watch._POLL_MS", 10)
    ref = handler_in(tmp_path / "a.py")
    runner = FakeRunner()
    with capture_logs() as lines:
        async with watching(tmp_path, runner, ref):

            async def replaced() -> bool:
                # Polling has no visible start, so the file is saved until that is noticed.
                (tmp_path / "a.py").write_text("# new")
                await anyio.sleep(0.5)
                return bool(runner.replaced)

            await until(replaced, "it is replaced")
    (error,) = (line for line in lines if line["log_level"] == "error")
    assert error["event"] == "watching_by_polling"
    assert str(refusal) == error["error"]
    assert "max_user_watches" in error["hint"]


async def test_hanging_import_is_killed_by_the_next_save(tmp_path: Path) -> None:
    ref = handler_in(tmp_path / "a.py")
    runner = HangingRunner()
    with capture_logs() as lines:
        async with watching(tmp_path, runner, ref):
            await until(lambda: kernel_watches(tmp_path), "it is watched")
            save(tmp_path / "a.py", "# hangs")
            await runner.importing.wait()
            assert not runner.killed.is_set(), "the import may still finish"
            save(tmp_path / "a.py", "# fixed")
            await until(lambda: runner.replaced, "it is replaced")
    assert runner.probed == ["# hangs", "# fixed"]
    assert not any(line["event"] == "handler_not_reloaded" for line in lines), "it was out of date"
