from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disco.registry import Registry
from disco.session import MAX_CAPABILITIES, MAX_NAME_CHARS, Answer, Close, Decision, Listed, Refuse, Reply, Session
from tests.disco.harness import Line


def session(registry: Registry | None = None, subject: str | None = None) -> Session:
    return Session(registry if registry is not None else Registry(), Line(), subject)


def tell(session: Session, **frame: Any) -> Decision:
    return session.receive(msgspec.json.encode(frame).decode())


def said(decision: Decision) -> Any:
    assert isinstance(decision, Reply | Refuse | Listed)
    return msgspec.json.decode(decision.frame)


def test_register_then_agent_hello_lists_the_agent() -> None:
    registry = Registry()
    one = session(registry, subject="a")
    assert said(tell(one, action="register", name="a")) == {"status": "ok", "action": "registered"}
    assert "a" not in registry
    decision = tell(one, action="agent_hello", capabilities=["x", "y"])
    assert said(decision) == {"status": "ok", "action": "agent_registered", "capabilities": ["x", "y"]}
    assert registry.agents()[0].capabilities == ("x", "y")


def test_name_other_than_the_token_s_subject_is_a_mismatch() -> None:
    registry = Registry()
    one = session(registry, subject="a")
    assert said(tell(one, action="register", name="b")) == {"status": "error", "reason": "name_mismatch"}
    assert said(tell(one, action="agent_hello", capabilities=[])) == {"error": "must register before agent_hello"}
    assert len(registry) == 0


def test_taken_name_is_told_to_agent_hello_and_can_be_had_once_free() -> None:
    registry = Registry()
    first, second = session(registry), session(registry)
    for one in (first, second):
        assert said(tell(one, action="register", name="a"))["action"] == "registered"
    tell(first, action="agent_hello", capabilities=[])
    refused = tell(second, action="agent_hello", capabilities=[])
    assert said(refused) == {"status": "error", "reason": "name_taken"}
    assert isinstance(refused, Refuse)
    first.leave()
    assert isinstance(tell(second, action="agent_hello", capabilities=[]), Listed)


def test_listed_agent_may_say_hello_again_but_not_take_another_name() -> None:
    registry = Registry()
    one = session(registry)
    tell(one, action="register", name="a")
    assert tell(one, action="agent_hello", capabilities=["x"]).first is True  # type: ignore[union-attr]
    assert tell(one, action="agent_hello", capabilities=["y"]).first is False  # type: ignore[union-attr]
    assert said(tell(one, action="register", name="b"))["reason"] == "name_mismatch"
    assert [(agent.name, agent.capabilities) for agent in registry.agents()] == [("a", ("y",))]


@pytest.mark.parametrize("name", [None, 7, "", "a\nb", "a" * (MAX_NAME_CHARS + 1), ["a"]])
def test_name_that_cannot_be_shown_is_refused(name: Any) -> None:
    assert said(tell(session(), action="register", name=name)) == {"status": "error", "reason": "invalid_name"}


@pytest.mark.parametrize("capabilities", ["x", [1], {"x": 1}, ["x"] * (MAX_CAPABILITIES + 1)])
def test_capabilities_that_are_not_words_are_refused(capabilities: Any) -> None:
    one = session()
    tell(one, action="register", name="a")
    assert said(tell(one, action="agent_hello", capabilities=capabilities))["reason"] == "invalid_capabilities"


@pytest.mark.parametrize(
    "text", ["{}", "[1]", "5", "null", '{"action":["query"]}', '{"action":"dance"}', '{"name":1e999}']
)
def test_json_that_is_no_known_action_is_told_so(text: str) -> None:
    assert said(session().receive(text)) == {"error": "unknown_action"}


@pytest.mark.parametrize("text", ["", "hello", "{", '{"action":"result"', "[1, x", "[" * 30_000 + "]" * 30_000])
def test_text_that_is_not_json_closes_as_the_reference_does(text: str) -> None:
    decision = session().receive(text)
    assert isinstance(decision, Close)
    assert decision.code == 1011


def test_result_keeps_its_data_as_it_came_and_its_id_decoded() -> None:
    decision = session().receive('{"action":"result","id":"a\\/b==","data": [1e999, {"n": 1.10}]}')
    assert isinstance(decision, Answer)
    assert decision.query_id == "a/b=="
    assert bytes(decision.data) == b'[1e999, {"n": 1.10}]'


@pytest.mark.parametrize("frame", [{}, {"id": 7}, {"id": None}, {"id": ["a"]}])
def test_result_without_an_id_of_ours_is_ignored(frame: dict[str, Any]) -> None:
    assert tell(session(), action="result", data=[], **frame) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text() | st.builds(lambda value: msgspec.json.encode(value).decode(), json_values))
def test_no_text_breaks_a_session(text: str) -> None:
    session().receive(text)


@given(
    st.sampled_from(["register", "agent_hello", "result"]),
    st.dictionaries(st.sampled_from(["name", "capabilities", "id", "data"]), json_values),
)
def test_no_frame_breaks_a_session(action: str, fields: dict[str, Any]) -> None:
    one = session()
    tell(one, action="register", name="a")
    tell(one, action=action, **fields)
