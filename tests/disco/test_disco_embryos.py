"""The items of answers: flattening, grouping and decoding."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from disco._embryos import decode, flatten, group_by_type


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
def test_lists_are_flattened_objects_kept_and_other_values_dropped(
    answer: str, items: list[Any]
) -> None:
    assert decode(flatten(msgspec.Raw(answer.encode()))) == items


def test_list_surrounded_by_white_space_is_flattened() -> None:
    class Frame(msgspec.Struct):
        data: msgspec.Raw

    assert decode(flatten(msgspec.json.decode(b'{"data": \n [1] }', type=Frame).data)) == [1]


def test_items_are_grouped_by_type_with_the_most_frequent_first() -> None:
    items = [
        {"type": "a", "n": 1},
        {"type": "b", "n": 2},
        {"type": "b", "n": 3},
        {"type": "a", "n": 4},
        {"type": "b", "n": 5},
    ]
    assert [item["n"] for item in decode(group_by_type(raws(*items)))] == [2, 3, 5, 1, 4]


def test_equally_frequent_types_keep_their_order() -> None:
    items = [{"type": "z"}, {"type": "a"}, {"type": "z"}, {"type": "a"}]
    assert [item["type"] for item in decode(group_by_type(raws(*items)))] == ["z", "z", "a", "a"]


def test_items_without_a_type_are_kept_together() -> None:
    items = [{"n": 1}, {"type": "a"}, "text", {"type": ["odd"]}]
    assert decode(group_by_type(raws(*items))) == [
        {"n": 1},
        "text",
        {"type": ["odd"]},
        {"type": "a"},
    ]


def test_number_out_of_range_is_passed_on_but_not_decoded() -> None:
    out_of_range = msgspec.Raw(b'{"type":"a","n":1e999}')
    assert group_by_type([out_of_range]) == [out_of_range]
    assert decode([out_of_range, msgspec.Raw(b"1")]) == [1]
