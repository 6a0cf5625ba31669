from __future__ import annotations

from typing import Any

import msgspec
import pytest

from disco.embryos import decode, flatten, group_by_type


def raws(*values: Any) -> list[msgspec.Raw]:
    return [msgspec.Raw(msgspec.json.encode(value)) for value in values]


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        ('[{"a":1},2,[3]]', [{"a": 1}, 2, [3]]),
        ('{"a":1}', [{"a": 1}]),
        ("[]", []),
        ("null", []),
        ('"text"', []),
        ("7", []),
        ("", []),
    ],
)
def test_lists_are_spliced_objects_added_and_the_rest_dropped(answer: str, items: list[Any]) -> None:
    assert decode(flatten(msgspec.Raw(answer.encode()))) == items


def test_answer_is_spliced_though_white_space_surrounds_it() -> None:
    class Frame(msgspec.Struct):
        data: msgspec.Raw

    assert decode(flatten(msgspec.json.decode(b'{"data": \n [1] }', type=Frame).data)) == [1]


def test_most_frequent_type_comes_first_and_each_keeps_its_order() -> None:
    items = [
        {"type": "a", "n": 1},
        {"type": "b", "n": 2},
        {"type": "b", "n": 3},
        {"type": "a", "n": 4},
        {"type": "b", "n": 5},
    ]
    assert [item["n"] for item in decode(group_by_type(raws(*items)))] == [2, 3, 5, 1, 4]


def test_types_as_frequent_keep_the_order_in_which_they_came() -> None:
    items = [{"type": "z"}, {"type": "a"}, {"type": "z"}, {"type": "a"}]
    assert [item["type"] for item in decode(group_by_type(raws(*items)))] == ["z", "z", "a", "a"]


def test_items_without_a_type_are_kept_together() -> None:
    items = [{"n": 1}, {"type": "a"}, "text", {"type": ["odd"]}]
    assert decode(group_by_type(raws(*items))) == [{"n": 1}, "text", {"type": ["odd"]}, {"type": "a"}]


def test_number_that_python_cannot_hold_passes_and_is_left_out_when_decoded() -> None:
    odd = msgspec.Raw(b'{"type":"a","n":1e999}')
    assert group_by_type([odd]) == [odd]
    assert decode([odd, msgspec.Raw(b"1")]) == [1]
