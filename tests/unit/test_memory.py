"""`worker.memory`: what a query leaves for the next one, and what a failed one does not."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.memories import memory_for
from worker.memory import Memory


def keep(memory: Memory, value: dict[Any, Any]) -> None:
    memory.checkout()
    memory.commit(value)


def test_memory_is_empty_at_first() -> None:
    assert memory_for("ram", "w", Path("/nowhere")).checkout() == {}
    assert memory_for("none", "w", Path("/nowhere")).checkout() == {}


def test_committed_dict_is_the_next_one() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, {"a": 1})
    assert memory.checkout() == {"a": 1}


def test_dict_changed_in_place_and_committed_is_the_next_one() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    current = memory.checkout()
    current["a"] = [1]
    memory.commit(current)
    assert memory.checkout() == {"a": [1]}


def test_no_memory_keeps_nothing_and_shares_nothing() -> None:
    memory = memory_for("none", "w", Path("/nowhere"))
    first = memory.checkout()
    first["a"] = 1
    memory.commit(first)
    assert memory.checkout() == {}
    memory.rollback()
    assert memory.checkout() == {}


class Point:
    def __init__(self, x: int) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and other.x == self.x

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "before",
    [
        {"n": 1, "text": "a", "none": None, "flag": True, "bytes": b"x", "float": 0.5},
        {"list": [1, [2, [3]]]},
        {"dict": {"set": {1, 2}}},
        {"object": Point(1)},
        {(1, 2): [3]},
        {"default": defaultdict(list, {"a": [1]})},
        {"bytearray": bytearray(b"abc")},
    ],
)
def test_rollback_brings_back_what_was_changed_at_any_depth(before: dict[Any, Any]) -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, copy.deepcopy(before))
    for _ in range(2):
        spoil(memory.checkout())
        memory.rollback()
        assert memory.checkout() == before


def spoil(value: Any) -> None:
    """Change everything that can be changed in place."""
    match value:
        case dict():
            for inner in value.values():
                spoil(inner)
            value.clear()
            value["spoilt"] = True
        case list():
            for inner in value:
                spoil(inner)
            value.append("spoilt")
        case set():
            value.add("spoilt")
        case bytearray():
            value += b"spoilt"
        case Point():
            value.x = -1


def test_rollback_keeps_the_kind_of_dict() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, OrderedDict(a=1))
    memory.checkout()["b"] = 2
    memory.rollback()
    assert memory.checkout() == OrderedDict(a=1)
    assert type(memory.checkout()) is OrderedDict


def test_what_cannot_be_copied_is_shared_and_the_rest_is_brought_back() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    lock = threading.Lock()
    keep(memory, {"lock": lock, "list": [1], "function": lambda: 1})
    spoil(memory.checkout())
    memory.rollback()
    found = memory.checkout()
    assert found["lock"] is lock
    assert found["list"] == [1]
    assert found["function"]() == 1


class Unreadable(Exception):
    """Pickles, and fails to unpickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def test_memory_whose_pickle_cannot_be_read_back_stays_and_raises_nothing() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, {"error": Unreadable("a", "b"), "n": 1})
    memory.checkout()
    memory.rollback()
    assert memory.checkout()["n"] == 1


PEEKED: list[dict[Any, Any]] = [
    {"n": 1},
    {"list": [1, {"deep": [2]}]},
    {"object": Point(1)},
    {"function": print, "list": [1]},
    {"function": lambda: 1, "list": [1]},
]


@pytest.mark.parametrize("value", PEEKED)
def test_who_looks_on_sees_the_last_commit_and_changes_nothing(value: dict[Any, Any]) -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, value)
    seen = memory.peek()
    expected = memory.peek()
    spoil(seen)
    assert memory.peek() == expected, "a copy, all the way down"
    spoil(memory.checkout())
    assert memory.peek() == expected, "what a query makes of it is no commit yet"
    memory.rollback()
    assert memory.checkout() == expected, "it was in nobody's way"
    memory.commit({"next": 1})
    assert memory.peek() == {"next": 1}


def test_who_looks_on_at_a_disk_sees_the_last_commit_and_changes_nothing(tmp_path: Path) -> None:
    memory = memory_for("disk", "w", tmp_path)
    memory.open()
    keep(memory, {"list": [1]})
    spoil(memory.peek())
    spoil(memory.checkout())
    assert memory.peek() == {"list": [1]}
    memory.rollback()
    assert memory.checkout() == {"list": [1]}
    memory.close()
    assert memory_for("none", "w", tmp_path).peek() == {}


def test_memory_that_cannot_be_read_back_is_seen_all_the_same() -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    keep(memory, {"error": Unreadable("a", "b"), "n": 1})
    assert memory.peek()["n"] == 1
    memory.checkout()
    assert memory.peek()["n"] == 1


def test_who_looks_on_while_queries_run_sees_a_whole_commit_always() -> None:
    memory, over = memory_for("ram", "w", Path("/nowhere")), threading.Event()

    def work() -> None:
        number = 0
        while not over.is_set():
            current = memory.checkout()
            for key in ("a", "b", "c"):
                current[key] = [number]
            memory.commit(current)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(300):
            seen = memory.peek()
            assert len({tuple(value) for value in seen.values()}) <= 1
    finally:
        over.set()
        thread.join()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.tuples(st.booleans(), st.dictionaries(st.text(max_size=3), json_values, max_size=3))))
def test_memory_is_always_the_last_committed_one(steps: list[tuple[bool, dict[Any, Any]]]) -> None:
    memory = memory_for("ram", "w", Path("/nowhere"))
    expected: dict[Any, Any] = {}
    for committed, value in steps:
        found = memory.checkout()
        assert found == expected
        if committed:
            memory.commit(copy.deepcopy(value))
            expected = value
        else:
            spoil(found)
            memory.rollback()
    assert memory.checkout() == expected
