"""`worker.memory._disk`: flushed memory survives, and a foreign file is moved aside unchanged."""

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
from worker.memory._disk import APPLICATION_ID, DiskMemory
from worker.memory.base import MemoryFault


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "w.sqlite"


@pytest.fixture
def memory(path: Path) -> Iterator[DiskMemory]:
    memory = DiskMemory(path)
    memory.open()
    yield memory
    memory.close()


def commit(memory: DiskMemory, value: dict[Any, Any]) -> int:
    memory.checkout()
    return memory.commit(value)


def memory_in(path: Path) -> dict[Any, Any]:
    """Return the memory that a worker would load from this file now."""
    memory = DiskMemory(path)
    memory.open()
    try:
        return memory.checkout()
    finally:
        memory.close()


def test_new_memory_is_empty(memory: DiskMemory) -> None:
    assert memory.checkout() == {}


@pytest.mark.usefixtures("memory")
def test_only_this_user_can_enter_the_folder_of_a_memory(path: Path) -> None:
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_flushed_memory_is_loaded_without_a_close(memory: DiskMemory, path: Path) -> None:
    commit(memory, {"n": 1, "list": [1, {"b": b"x"}], 7: None})
    memory.flush()
    assert memory_in(path) == {"n": 1, "list": [1, {"b": b"x"}], 7: None}


def test_commit_is_not_in_the_file_before_a_flush(memory: DiskMemory, path: Path) -> None:
    commit(memory, {"n": 1})
    memory.flush()
    commit(memory, {"n": 2})
    assert memory.checkout() == {"n": 2}
    assert memory_in(path) == {"n": 1}


def test_one_flush_writes_all_commits_before_it(memory: DiskMemory, path: Path) -> None:
    for number in range(10):
        commit(memory, {"n": number})
    memory.flush()
    assert memory_in(path) == {"n": 9}


def test_rollback_restores_the_last_commit_at_any_depth(memory: DiskMemory) -> None:
    commit(memory, {"list": [1, [2]]})
    memory.checkout()["list"][1].append("changed")
    memory.rollback()
    assert memory.checkout() == {"list": [1, [2]]}


def test_value_that_msgpack_cannot_encode_is_refused(memory: DiskMemory) -> None:
    commit(memory, {"n": 1})
    current = memory.checkout()
    current["n"] = object()
    with pytest.raises(MemoryFault):
        memory.commit(current)
    memory.rollback()
    assert memory.checkout() == {"n": 1}


def limit_pages(memory: DiskMemory, pages: int) -> None:
    """Make SQLite report a full disk beyond this number of pages."""
    assert memory._database is not None
    memory._database.execute(f"PRAGMA max_page_count = {pages}")


BIG = "x" * 100_000
"""It needs more than the four pages to which the tests limit a file."""


def test_failed_flush_rolls_back_to_the_last_flush(memory: DiskMemory, path: Path) -> None:
    commit(memory, {"n": 1})
    memory.flush()
    limit_pages(memory, 4)
    commit(memory, {"n": 2, "big": BIG})
    commit(memory, {"n": 3, "big": BIG})
    with pytest.raises(MemoryFault):
        memory.flush()
    assert memory.checkout() == {"n": 1}
    memory.rollback()
    commit(memory, {"n": 2})
    memory.flush()
    assert memory_in(path) == {"n": 2}


def test_only_a_flushed_commit_is_durable(memory: DiskMemory) -> None:
    first = commit(memory, {"n": 1})
    assert not memory.is_durable(first)
    memory.flush()
    assert memory.is_durable(first)
    limit_pages(memory, 4)
    lost = [commit(memory, {"n": number, "big": BIG}) for number in (2, 3)]
    with pytest.raises(MemoryFault):
        memory.flush()
    # The answers that belong to these commits must not be sent.
    assert not any(map(memory.is_durable, lost))
    memory.rollback()
    kept = commit(memory, {"n": 2})
    memory.flush()
    assert memory.is_durable(first)
    assert not any(map(memory.is_durable, lost))
    assert memory.is_durable(kept)


def test_durability_of_each_commit_is_known_after_many_failed_flushes(memory: DiskMemory) -> None:
    kept, lost = [], []
    for number in range(20):
        kept += [commit(memory, {"n": number}), commit(memory, {"n": number})]
        memory.flush()
        limit_pages(memory, 4)
        lost.append(commit(memory, {"n": number, "big": BIG}))
        with pytest.raises(MemoryFault):
            memory.flush()
    assert all(map(memory.is_durable, kept))
    assert not any(map(memory.is_durable, lost))


def lose_checked_out_memory(memory: DiskMemory) -> dict[Any, Any]:
    """Check out a memory whose flush then fails, and return it."""
    limit_pages(memory, 4)
    commit(memory, {"n": 1, "big": BIG})
    current = memory.checkout()
    with pytest.raises(MemoryFault):
        memory.flush()
    return current


def test_commit_based_on_a_rolled_back_memory_is_refused(memory: DiskMemory) -> None:
    current = lose_checked_out_memory(memory)
    with pytest.raises(MemoryFault):
        memory.commit(current | {"n": 2})
    memory.rollback()
    assert memory.checkout() == {}


def test_folder_in_place_of_the_file_is_refused_unchanged(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(MemoryFault):
        DiskMemory(path).open()
    assert path.is_dir()


@pytest.mark.message_text
def test_message_for_a_value_that_cannot_be_encoded_names_msgpack(memory: DiskMemory) -> None:
    memory.checkout()
    with pytest.raises(MemoryFault, match="what msgpack cannot"):
        memory.commit({"n": object()})


@pytest.mark.message_text
def test_message_for_a_failed_flush_names_the_file(memory: DiskMemory, path: Path) -> None:
    limit_pages(memory, 4)
    commit(memory, {"big": BIG})
    with pytest.raises(MemoryFault, match=f"the memory {path} cannot be written"):
        memory.flush()


@pytest.mark.message_text
def test_message_for_a_rolled_back_memory_names_it(memory: DiskMemory) -> None:
    current = lose_checked_out_memory(memory)
    with pytest.raises(MemoryFault, match="the memory that this query started with"):
        memory.commit(current)


@pytest.mark.message_text
def test_message_for_a_file_that_cannot_be_opened_names_it(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(MemoryFault, match=f"the memory {path} cannot be opened"):
        DiskMemory(path).open()


def not_a_database(path: Path) -> None:
    path.write_bytes(b"my shopping list\n" * 100)


def foreign_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE memory (data BLOB)")


def foreign_without_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA application_id = 7")


def not_a_dict(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("CREATE TABLE memory (data BLOB)")
        database.execute("INSERT INTO memory VALUES (?)", (b"\x93\x01\x02\x03",))


def damaged(path: Path) -> None:
    memory = DiskMemory(path)
    memory.open()
    commit(memory, {"more": "x" * 20_000})
    memory.flush()
    memory.close()
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)


@pytest.mark.parametrize(
    "write_file", [not_a_database, foreign_table, foreign_without_tables, not_a_dict, damaged]
)
def test_file_that_is_not_a_memory_is_moved_aside_unchanged(
    write_file: Callable[[Path], None], path: Path
) -> None:
    path.parent.mkdir()
    write_file(path)
    before = path.read_bytes()
    with capture_logs() as logs:
        assert memory_in(path) == {}
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("memory_moved_aside", "error")
    assert line["file"] == str(path)
    assert line["reason"]
    assert Path(line["to"]).read_bytes() == before
    with capture_logs() as logs:
        assert memory_in(path) == {}
    assert not logs, "the new file was moved aside too"


def test_write_ahead_log_is_moved_aside_with_its_file(path: Path) -> None:
    path.parent.mkdir()
    not_a_database(path)
    log = path.with_name(path.name + "-wal")
    log.write_bytes(b"not checkpointed yet")
    with capture_logs() as logs:
        assert memory_in(path) == {}
    assert Path(logs[0]["to"] + "-wal").read_bytes() == b"not checkpointed yet"


def only_application_id(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def only_wal_mode(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")


@pytest.mark.parametrize("write_part", [Path.touch, only_wal_mode, only_application_id])
def test_unfinished_file_of_a_killed_worker_is_completed(
    write_part: Callable[[Path], None], path: Path
) -> None:
    path.parent.mkdir()
    write_part(path)
    with capture_logs() as logs:
        memory = DiskMemory(path)
        memory.open()
        commit(memory, {"n": 1})
        memory.flush()
        memory.close()
        assert memory_in(path) == {"n": 1}
    assert not logs, "the file was moved aside"


@given(
    st.lists(
        st.tuples(st.sampled_from(["commit", "rollback", "flush", "restart"]), st.integers()),
        max_size=20,
    )
)
def test_memory_after_a_crash_is_the_last_flush(steps: list[tuple[str, int]]) -> None:
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
            elif step == "restart":
                # As after a kill: the previous memory is not closed.
                memories.append(DiskMemory(path))
                memories[-1].open()
                committed = flushed
        for memory in memories:
            memory.close()
