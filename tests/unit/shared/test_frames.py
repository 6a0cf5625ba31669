"""`shared.frames`: the exact bytes that a client sends, and both forms of a node's answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import frames


def test_query_is_encoded_as_the_protocol_requires() -> None:
    expected = '{"action":"query","id":"YQ==","body":"é"}'.encode()
    assert frames.encode(frames.Query("YQ==", "é")) == expected


@pytest.mark.parametrize("query_id", [b'"YQ=="', b"17", b'{"a" : 1.50}', b"null"])
def test_result_contains_id_and_data_unchanged(query_id: bytes) -> None:
    expected = b'{"action":"result","id":' + query_id + b',"data":[1.10, 2]}'
    assert frames.result(query_id, b"[1.10, 2]") == expected
    assert frames.result(msgspec.Raw(query_id), b"[1.10, 2]") == expected


def test_result_may_contain_percent_signs() -> None:
    assert frames.result(b'"%s"', b'"%d %%"') == b'{"action":"result","id":"%s","data":"%d %%"}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"status":"ok","action":"registered"}', {"status": "ok", "action": "registered"}),
        ('{"status":"error","reason":"name_taken"}', {"status": "error", "reason": "name_taken"}),
        ('{"error":"unknown_action"}', {"error": "unknown_action"}),
        ('{"action":["x"],"status":{},"error":0}', {"action": ["x"], "status": {}, "error": 0}),
        ('{"unknown":1,"body":null}', {"body": None}),
        ("{}", {}),
    ],
)
def test_node_frame_is_decoded_with_fields_of_any_type(text: str, expected: dict[str, Any]) -> None:
    frame = frames.decode_node_frame(text.encode())
    nothing = {"action": None, "body": msgspec.UNSET, "status": None, "reason": None, "error": None}
    assert {name: getattr(frame, name) for name in nothing} == nothing | expected
    assert bytes(frame.id) == b""


@pytest.mark.parametrize("raw", ['"\\u00e9\\/"', "1.50", '{"a" :  [1]}', "null"])
def test_id_and_raw_body_keep_their_bytes(raw: str) -> None:
    text = f'{{"action":"query", "id" : {raw} , "body":{raw}}}'.encode()
    assert bytes(frames.decode_node_frame(text).id) == raw.encode()
    assert bytes(frames.decode_raw_query(text).body) == raw.encode()


def test_client_frame_keeps_its_data_raw() -> None:
    frame = frames.decode_client_frame(b'{"action":"result","id":"x","data": [1.10]}')
    assert (frame.action, bytes(frame.id), bytes(frame.data)) == ("result", b'"x"', b"[1.10]")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
fields = st.sampled_from(
    ["action", "id", "body", "status", "reason", "error", "name", "capabilities", "data", "more"]
)


@given(st.text() | st.builds(json.dumps, json_values | st.dictionaries(fields, json_values)))
@example("[" * 100_000)
@example('{"body":' + "[" * 100_000)
@example('{"body":1e999}')
def test_any_text_is_a_frame_or_a_decoding_error(text: str) -> None:
    for decode in (frames.decode_node_frame, frames.decode_raw_query, frames.decode_client_frame):
        try:
            decode(text.encode("utf-8", "replace"))
        except (msgspec.DecodeError, RecursionError):
            continue
        assert isinstance(json.loads(text), dict)


@given(st.dictionaries(fields, json_values))
def test_any_json_object_is_a_frame_with_its_fields(value: dict[str, Any]) -> None:
    frame = frames.decode_node_frame(json.dumps(value).encode())
    for name in ("action", "status", "reason", "error"):
        assert getattr(frame, name) == value.get(name)
    assert bytes(frame.id) == (json.dumps(value["id"]).encode() if "id" in value else b"")
