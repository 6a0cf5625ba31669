"""`worker.disk_memory`: what was flushed survives, what was not is taken back, what is not ours is left alone."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.logs import capture_logs
from worker.disk_memory import APPLICATION_ID, DiskMemory
from worker.memory import MemoryFault


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "w.sqlite"


@pytest.fixture
def memory(path: Path) -> Iterator[DiskMemory]:
    memory = DiskMemory(path)
    memory.open()
    yield memory
    memory.close()


def keep(memory: DiskMemory, value: dict[Any, Any]) -> int:
    memory.checkout()
    return memory.commit(value)


def found_in(path: Path) -> dict[Any, Any]:
    """What a worker that starts now would find."""
    memory = DiskMemory(path)
    memory.open()
    try:
        return memory.checkout()
    finally:
        memory.close()


def test_memory_is_empty_at_first_and_its_folder_is_private(memory: DiskMemory, path: Path) -> None:
    assert memory.checkout() == {}
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_flushed_memory_is_found_again_also_while_the_one_before_was_never_closed(
    memory: DiskMemory, path: Path
) -> None:
    keep(memory, {"n": 1, "list": [1, {"b": b"x"}], 7: None})
    memory.flush()
    assert found_in(path) == {"n": 1, "list": [1, {"b": b"x"}], 7: None}


def test_commit_that_was_not_flushed_is_not_in_the_file(memory: DiskMemory, path: Path) -> None:
    keep(memory, {"n": 1})
    memory.flush()
    keep(memory, {"n": 2})
    assert memory.checkout() == {"n": 2}
    assert found_in(path) == {"n": 1}


def test_one_flush_serves_all_commits_before_it(memory: DiskMemory, path: Path) -> None:
    for number in range(10):
        keep(memory, {"n": number})
    memory.flush()
    assert found_in(path) == {"n": 9}


def test_rollback_brings_back_the_last_commit_at_any_depth(memory: DiskMemory) -> None:
    keep(memory, {"list": [1, [2]]})
    memory.checkout()["list"][1].append("spoilt")
    memory.rollback()
    assert memory.checkout() == {"list": [1, [2]]}


def test_what_msgpack_cannot_hold_is_refused_and_the_memory_stays(memory: DiskMemory) -> None:
    keep(memory, {"n": 1})
    current = memory.checkout()
    current["n"] = object()
    with pytest.raises(MemoryFault, match="what msgpack cannot"):
        memory.commit(current)
    memory.rollback()
    assert memory.checkout() == {"n": 1}


def let_it_hold(memory: DiskMemory, pages: int) -> None:
    """Have SQLite say that the disk is full past so many pages."""
    assert memory._database is not None
    memory._database.execute(f"PRAGMA max_page_count = {pages}")


def test_flush_that_fails_takes_back_what_was_not_flushed_and_the_memory_goes_on(
    memory: DiskMemory, path: Path
) -> None:
    first = keep(memory, {"n": 1})
    assert not memory.kept(first)
    memory.flush()
    assert memory.kept(first)
    let_it_hold(memory, 4)
    before = [keep(memory, {"n": 2, "big": "x" * 100_000}), keep(memory, {"n": 3, "big": "x" * 100_000})]
    with pytest.raises(MemoryFault, match=f"the memory {path} cannot be written"):
        memory.flush()
    assert not any(map(memory.kept, before)), "their answers must not leave"
    assert memory.checkout() == {"n": 1}
    memory.rollback()
    after = keep(memory, {"n": 2})
    memory.flush()
    assert found_in(path) == {"n": 2}
    assert [memory.kept(number) for number in (first, *before, after)] == [True, False, False, True]


def test_fate_of_a_commit_is_known_however_many_flushes_failed_after_it(memory: DiskMemory) -> None:
    kept, lost = [], []
    for number in range(20):
        kept += [keep(memory, {"n": number}), keep(memory, {"n": number})]
        memory.flush()
        let_it_hold(memory, 4)
        lost.append(keep(memory, {"n": number, "big": "x" * 100_000}))
        with pytest.raises(MemoryFault):
            memory.flush()
    assert all(map(memory.kept, kept))
    assert not any(map(memory.kept, lost))


def test_query_that_began_with_what_a_failed_flush_took_back_cannot_be_kept(memory: DiskMemory) -> None:
    let_it_hold(memory, 4)
    keep(memory, {"n": 1, "big": "x" * 100_000})
    current = memory.checkout()
    with pytest.raises(MemoryFault):
        memory.flush()
    with pytest.raises(MemoryFault, match="began with"):
        memory.commit(current | {"n": 2})
    memory.rollback()
    assert memory.checkout() == {}


def test_file_that_cannot_be_opened_is_named(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(MemoryFault, match=f"the memory {path} cannot be opened"):
        DiskMemory(path).open()
    assert path.is_dir()


def no_database(path: Path) -> None:
    path.write_bytes(b"my shopping list\n" * 100)


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE memory (data BLOB)")


def foreign_and_empty(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA application_id = 7")


def ours_without_a_dict(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("CREATE TABLE memory (data BLOB)")
        database.execute("INSERT INTO memory VALUES (?)", (b"\x93\x01\x02\x03",))


def damaged(path: Path) -> None:
    memory = DiskMemory(path)
    memory.open()
    keep(memory, {"more": "x" * 20_000})
    memory.flush()
    memory.close()
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [no_database, foreign, foreign_and_empty, ours_without_a_dict, damaged])
def test_file_that_is_not_this_memory_is_moved_aside_unchanged(spoil: Callable[[Path], None], path: Path) -> None:
    path.parent.mkdir()
    spoil(path)
    before = path.read_bytes()
    with capture_logs() as logs:
        assert found_in(path) == {}
    (said,) = logs
    assert (said["event"], said["log_level"], said["file"]) == ("memory_moved_aside", "error", str(path))
    assert said["why"]
    assert Path(said["to"]).read_bytes() == before
    with capture_logs() as logs:
        assert found_in(path) == {}
    assert not logs, "once"


def test_log_of_a_file_that_is_moved_aside_goes_with_it(path: Path) -> None:
    path.parent.mkdir()
    no_database(path)
    log = path.with_name(path.name + "-wal")
    log.write_bytes(b"what was not folded in yet")
    with capture_logs() as logs:
        assert found_in(path) == {}
    assert Path(logs[0]["to"] + "-wal").read_bytes() == b"what was not folded in yet"


def named_and_no_more(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def in_wal_mode_and_no_more(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("half", [Path.touch, in_wal_mode_and_no_more, named_and_no_more])
def test_file_whose_maker_was_killed_is_made_whole(half: Callable[[Path], None], path: Path) -> None:
    path.parent.mkdir()
    half(path)
    with capture_logs() as logs:
        memory = DiskMemory(path)
        memory.open()
        keep(memory, {"n": 1})
        memory.flush()
        memory.close()
        assert found_in(path) == {"n": 1}
    assert not logs, "it is nobody else's, and not corrupt"


@given(st.lists(st.tuples(st.sampled_from(["commit", "rollback", "flush", "restart"]), st.integers()), max_size=20))
def test_memory_is_the_last_commit_and_after_a_crash_the_last_flush(steps: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "w.sqlite"
        memories = [DiskMemory(path)]
        memories[-1].open()
        committed: dict[Any, Any] = {}
        flushed: dict[Any, Any] = {}
        for step, value in steps:
            memory = memories[-1]
            current = memory.checkout()
            assert current == committed
            current["n"] = value % 2**63
            if step == "commit":
                memory.commit(current)
                committed = dict(current)
                continue
            memory.rollback()
            if step == "flush":
                memory.flush()
                flushed = committed
            elif step == "restart":  # as after a kill: the one before closes nothing
                memories.append(DiskMemory(path))
                memories[-1].open()
                committed = flushed
        for memory in memories:
            memory.close()
