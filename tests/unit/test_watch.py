"""`runner.watch`: of which files a handler is made, and which handlers a change concerns, without a file."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.from_thread
import pytest
import watchfiles

from runner.watch import Changed, Import, Watched, Watcher, imports
from shared.config import Agent, Config
from shared.errors import ConfigError
from shared.handlers import HandlerRef
from tests.cluster import until
from tests.logs import capture_logs

HOME = Path("/home")


class Disk:
    """Files that are none."""

    def __init__(self, **files: str) -> None:
        self.saves = 0
        self.files: dict[Path, tuple[int, str]] = {}
        for name, text in files.items():
            self.save(f"{name.replace('__', '/')}.py", text)

    def save(self, name: str, text: str | None = None) -> None:
        self.saves += 1
        before = self.files.get(HOME / name, (0, ""))[1]
        self.files[HOME / name] = (self.saves, before if text is None else text)

    def stamp(self, file: Path) -> tuple[int, ...] | None:
        found = self.files.get(file)
        return None if found is None else (found[0],)

    def read(self, file: Path) -> bytes:
        return self.files[file][1].encode()

    def watched(self, *handlers: HandlerRef, path: tuple[str, ...] = ()) -> Watched:
        return Watched(handlers, [HOME / "em-runner.toml"], path, stamp=self.stamp, read=self.read)


def at(file: str) -> HandlerRef:
    return HandlerRef(None, HOME / file, "handle", (HOME / file).parent)


def named(module: str) -> HandlerRef:
    return HandlerRef(module, None, "handle", HOME)


def test_handler_whose_file_is_saved_has_changed_and_no_other() -> None:
    disk = Disk(a="", b="")
    watched = disk.watched(at("a.py"), at("b.py"))
    assert watched.changed().handlers == {}
    disk.save("a.py")
    assert watched.changed().handlers == {at("a.py"): HOME / "a.py"}
    assert watched.changed().handlers == {}, "it is told once"


def test_module_beside_it_that_a_handler_imports_is_a_part_of_it_and_so_is_what_that_imports() -> None:
    disk = Disk(a="import os, b", b="def f():\n    from c import x", c="", d="")
    watched = disk.watched(at("a.py"), at("d.py"))
    for name in ("b.py", "c.py"):
        disk.save(name)
        assert watched.changed().handlers == {at("a.py"): HOME / name}
    disk.save("e.py")
    assert watched.changed().handlers == {}, "nobody imports it"


def test_module_that_was_missing_is_waited_for() -> None:
    disk = Disk(a="import b.c")
    watched = disk.watched(at("a.py"))
    disk.save("b/c.py", "import d")
    assert watched.changed().handlers == {at("a.py"): HOME / "b/c.py"}
    disk.save("d.py")
    assert watched.changed().handlers == {at("a.py"): HOME / "d.py"}


def test_handler_that_is_gone_has_changed_and_again_when_it_is_back() -> None:
    disk = Disk(a="")
    watched = disk.watched(at("a.py"))
    del disk.files[HOME / "a.py"]
    assert watched.changed().handlers == {at("a.py"): HOME / "a.py"}
    assert watched.lost() == [at("a.py")]
    disk.save("a.py")
    assert watched.changed().handlers == {at("a.py"): HOME / "a.py"}


def test_what_a_broken_file_imported_when_it_was_whole_is_still_watched() -> None:
    disk = Disk(a="import b", b="")
    watched = disk.watched(at("a.py"))
    disk.save("a.py", "import b\ndef (")
    assert watched.changed().handlers
    disk.save("b.py")
    assert watched.changed().handlers == {at("a.py"): HOME / "b.py"}


def test_relative_imports_are_followed_in_a_package() -> None:
    disk = Disk(
        p____init__="", p__a="from . import b\nfrom .s import t\nfrom ..q import r", p__b="", p__s__t="", q="", p__q=""
    )
    watched = disk.watched(named("p.a"))
    for name in ("p/__init__.py", "p/b.py", "p/s/t.py", "q.py"):
        disk.save(name)
        assert watched.changed().handlers == {named("p.a"): HOME / name}
    disk.save("p/q.py")
    assert watched.changed().handlers == {}


def test_modules_that_import_each_other_are_followed_once() -> None:
    disk = Disk(a="import b", b="import a, b")
    watched = disk.watched(at("a.py"))
    disk.save("b.py")
    assert watched.changed().handlers == {at("a.py"): HOME / "b.py"}


@pytest.mark.parametrize(
    ("files", "path", "used"),
    [
        (("m.py", "lib/m.py"), ("/home/lib",), "m.py"),
        (("lib/m.py",), ("/nowhere", "/home/lib"), "lib/m.py"),
        (("m.py", "lib/m.py"), ("/home/lib", "/home"), "lib/m.py"),
        (("lib/m/__init__.py",), ("/home/lib",), "lib/m/__init__.py"),
    ],
)
def test_module_is_found_where_a_worker_finds_it(files: tuple[str, ...], path: tuple[str, ...], used: str) -> None:
    disk = Disk()
    for name in files:
        disk.save(name)
    watched = disk.watched(named("m"), path=path)
    assert watched.lost() == []
    for name in files:
        disk.save(name)
        assert (watched.changed().handlers != {}) == (name == used)


def test_installed_handler_is_watched_without_what_it_imports() -> None:
    disk = Disk()
    disk.save("site-packages/m.py", "import n")
    disk.save("site-packages/n.py")
    watched = disk.watched(named("m"), path=("/home/site-packages",))
    disk.save("site-packages/n.py")
    assert watched.changed().handlers == {}
    disk.save("site-packages/m.py")
    assert watched.changed().handlers


def test_configuration_is_told_apart_from_handlers() -> None:
    disk = Disk(a="")
    watched = disk.watched(at("a.py"))
    disk.save("em-runner.toml")
    assert watched.changed() == ({}, {HOME / "em-runner.toml"}, True)
    disk.save("em-runner.toml", "[[agent]]")
    assert watched.changed() == ({}, {HOME / "em-runner.toml"}, False)


def test_what_is_followed_anew_is_watched_from_then_on_and_the_rest_no_more() -> None:
    disk = Disk(a="", b="", c="")
    watched = disk.watched(at("a.py"), at("b.py"))
    disk.save("b.py")
    watched.follow([at("b.py"), at("c.py")])
    assert watched.changed().handlers == {at("b.py"): HOME / "b.py"}, "what was not told yet is not forgotten"
    disk.save("a.py")
    disk.save("c.py")
    assert watched.changed().handlers == {at("c.py"): HOME / "c.py"}


def test_all_imports_of_a_text_are_found() -> None:
    text = b"import a.b as c, d\ntry:\n    from e import f, g\nexcept ImportError:\n    from ..h import i\n"
    assert set(imports(text)) == {
        Import(0, "a.b"),
        Import(0, "d"),
        Import(0, "e.f"),
        Import(0, "e.g"),
        Import(2, "h.i"),
    }


def test_folders_are_those_of_links_and_of_their_targets(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "seen").mkdir()
    (tmp_path / "real" / "a.py").write_text("import p.q")
    (tmp_path / "seen" / "a.py").symlink_to(tmp_path / "real" / "a.py")
    watched = Watched([HandlerRef(None, tmp_path / "seen" / "a.py", "handle", tmp_path / "seen")])
    assert watched.folders == {tmp_path / "seen", tmp_path / "real"}


# --- Watcher ---


class Supervised:
    """What the watcher asks of a supervisor and a fork server."""

    leaving = False

    def __init__(self) -> None:
        self.renewed: list[HandlerRef] = []
        self.probed: list[str] = []
        self.changed = anyio.Event()

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        assert ref.file is not None
        self.probed.append(ref.file.read_text())
        return ()

    def lacks(self, ref: HandlerRef, agents: tuple[str, ...]) -> bool:
        return False

    def outdate(self, ref: HandlerRef) -> None:
        pass

    async def renew(self, ref: HandlerRef, why: str) -> dict[str, str]:
        self.renewed.append(ref)
        self.changed.set()
        return {"a_server": ""}


@pytest.mark.anyio
@pytest.mark.parametrize(
    "refusal",
    [
        OSError(28, "No space left on device"),
        watchfiles._rust_notify.WatchfilesRustInternalError("Error creating recommended watcher: Too many open files"),
    ],
)
async def test_kernel_that_takes_no_more_watches_is_one_error_and_files_are_looked_at_all_the_same(
    refusal: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*folders: object, **options: object) -> object:
        raise refusal

    monkeypatch.setattr(watchfiles, "awatch", refuse)
    monkeypatch.setattr("runner.watch.LOOK_MS", 1)
    file = tmp_path / "a.py"
    file.write_text("")
    ref = HandlerRef(None, file, "handle", tmp_path)
    parts = Supervised()
    with capture_logs() as lines:
        config = Config(agents=(Agent(name="a", handler=ref, nodes=()),))
        watcher = Watcher(config, tmp_path / "em-runner.toml", parts, parts, lambda: None)  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            file.write_text("# changed")
            with anyio.fail_after(30):
                await parts.changed.wait()
            tasks.cancel_scope.cancel()
    assert parts.renewed == [ref]
    (error,) = (line for line in lines if line["log_level"] == "error")
    assert error["event"] == "watching_without_kernel"
    assert str(refusal) == error["why"]
    assert "max_user_watches" in error["do"]


@pytest.mark.anyio
async def test_file_that_is_just_being_written_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look falls between the truncation and the write."""

    async def tick(*folders: object, **options: object) -> AsyncIterator[set[object]]:
        while True:
            await anyio.sleep(0.001)
            yield set()

    monkeypatch.setattr(watchfiles, "awatch", tick)
    monkeypatch.setattr("runner.watch.STEP_MS", 1)
    monkeypatch.setattr("runner.watch.DEBOUNCE_MS", 30_000)
    file = tmp_path / "a.py"
    file.write_text("# old")
    ref = HandlerRef(None, file, "handle", tmp_path)
    parts = Supervised()
    watcher = Watcher(
        Config(agents=(Agent(name="a", handler=ref, nodes=()),)),
        tmp_path / "em-runner.toml",
        parts,  # type: ignore[arg-type]
        parts,  # type: ignore[arg-type]
        lambda: None,
    )
    looks = 0
    look = watcher._watched.changed

    def changed() -> Changed:
        nonlocal looks
        looks += 1
        found = look()
        if looks == 20:
            file.write_text("# new")
        return found

    monkeypatch.setattr(watcher._watched, "changed", changed)
    async with anyio.create_task_group() as tasks:
        file.write_text("")
        tasks.start_soon(watcher.run)
        with anyio.fail_after(30):
            await parts.changed.wait()
        tasks.cancel_scope.cancel()
    assert parts.probed == ["# new"]


class Hanging(Supervised):
    """The first handler hangs while it is imported, until its process is ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()
        self.hangs = anyio.Event()

    def probe(self, ref: HandlerRef) -> tuple[str, ...]:
        super().probe(ref)
        if len(self.probed) == 1:
            anyio.from_thread.run_sync(self.hangs.set)
            if not self.ended.wait(30):
                return ()
            raise ConfigError("killed by SIGKILL")
        return ()

    def abandon_probes(self, ref: HandlerRef) -> None:
        assert self.hangs.is_set()
        self.ended.set()


@pytest.mark.anyio
async def test_import_that_hangs_is_told_and_given_up_when_the_file_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.watch.SLOW_IMPORT_S", 0.01)
    file = tmp_path / "a.py"
    file.write_text("# old")
    ref = HandlerRef(None, file, "handle", tmp_path)
    parts = Hanging()
    with capture_logs() as lines:
        config = Config(agents=(Agent(name="a", handler=ref, nodes=()),))
        watcher = Watcher(config, tmp_path / "em-runner.toml", parts, parts, lambda: None)  # type: ignore[arg-type]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            with anyio.fail_after(30):
                file.write_text("# hangs")
                await parts.hangs.wait()
                await until(lambda: any(line["event"] == "handler_importing" for line in lines), "it is told")
                assert not parts.ended.is_set(), "it may still come to an end"
                file.write_text("# mended")
                await parts.changed.wait()
            tasks.cancel_scope.cancel()
    assert parts.probed == ["# hangs", "# mended"]
    (told,) = (line for line in lines if line["event"] == "handler_importing")
    assert told["handler"] == str(ref)
    assert "the old one still answers" in told["do"]
    assert not any(line["event"] == "handler_not_reloaded" for line in lines), "it was out of date"
