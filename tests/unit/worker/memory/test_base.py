"""`worker.memory.base`: commits reach the next query, and a rollback restores the last commit."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.memory.base import Memory, MemoryFault
from worker.memory.choose import create_memory


def commit(memory: Memory, value: dict[Any, Any]) -> None:
    memory.checkout()
    memory.commit(value)


def test_new_memory_is_empty() -> None:
    assert create_memory("ram", "w", Path("/nowhere")).checkout() == {}
    assert create_memory("none", "w", Path("/nowhere")).checkout() == {}


def test_next_query_gets_the_committed_dict() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    commit(memory, {"a": 1})
    assert memory.checkout() == {"a": 1}


def test_next_query_gets_a_dict_changed_in_place_and_committed() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    current = memory.checkout()
    current["a"] = [1]
    memory.commit(current)
    assert memory.checkout() == {"a": [1]}


def test_memory_of_kind_none_keeps_nothing() -> None:
    memory = create_memory("none", "w", Path("/nowhere"))
    first = memory.checkout()
    first["a"] = 1
    memory.commit(first)
    assert memory.checkout() == {}
    memory.rollback()
    assert memory.checkout() == {}


class Unpicklable:
    """Raises an exception whose text raises, too."""

    class Error(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def __reduce__(self) -> str:
        raise self.Error


def test_memory_that_cannot_be_pickled_is_not_handed_over() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    commit(memory, {"a": Unpicklable()})
    with pytest.raises(MemoryFault):
        memory.handover()


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
def test_rollback_restores_changes_at_any_depth(before: dict[Any, Any]) -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    commit(memory, copy.deepcopy(before))
    for _ in range(2):
        change_all(memory.checkout())
        memory.rollback()
        assert memory.checkout() == before


def change_all(value: Any) -> None:
    """Change every mutable value in place."""
    match value:
        case dict():
            for inner in value.values():
                change_all(inner)
            value.clear()
            value["changed"] = True
        case list():
            for inner in value:
                change_all(inner)
            value.append("changed")
        case set():
            value.add("changed")
        case bytearray():
            value += b"changed"
        case Point():
            value.x = -1


def test_rollback_keeps_the_type_of_the_dict() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    commit(memory, OrderedDict(a=1))
    memory.checkout()["b"] = 2
    memory.rollback()
    assert memory.checkout() == OrderedDict(a=1)
    assert type(memory.checkout()) is OrderedDict


def test_rollback_restores_all_but_values_that_cannot_be_copied() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    lock = threading.Lock()
    commit(memory, {"lock": lock, "list": [1], "function": lambda: 1})
    change_all(memory.checkout())
    memory.rollback()
    found = memory.checkout()
    assert found["lock"] is lock
    assert found["list"] == [1]
    assert found["function"]() == 1


class Unreadable(Exception):
    """An exception that can be pickled but not unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def test_rollback_keeps_a_memory_that_cannot_be_unpickled() -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    commit(memory, {"error": Unreadable("a", "b"), "n": 1})
    memory.checkout()
    memory.rollback()
    assert memory.checkout()["n"] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(st.booleans(), st.dictionaries(st.text(max_size=3), json_values, max_size=3))
    )
)
def test_memory_is_always_the_last_commit(steps: list[tuple[bool, dict[Any, Any]]]) -> None:
    memory = create_memory("ram", "w", Path("/nowhere"))
    expected: dict[Any, Any] = {}
    for committed, value in steps:
        found = memory.checkout()
        assert found == expected
        if committed:
            memory.commit(copy.deepcopy(value))
            expected = value
        else:
            change_all(found)
            memory.rollback()
    assert memory.checkout() == expected
