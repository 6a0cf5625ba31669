"""The session of an agent, without sockets."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disco._registry import Registry
from disco._session import (
    MAX_CAPABILITIES,
    MAX_NAME_CHARS,
    AgentSession,
    Close,
    Decision,
    Refuse,
    Registered,
    Result,
    Send,
)
from tests.disco.harness import NullConnection


def session(registry: Registry | None = None, subject: str | None = None) -> AgentSession:
    return AgentSession(registry if registry is not None else Registry(), NullConnection(), subject)


def send(session: AgentSession, **frame: Any) -> Decision:
    return session.receive(msgspec.json.encode(frame).decode())


def reply_of(decision: Decision) -> Any:
    assert isinstance(decision, Send | Refuse | Registered)
    return msgspec.json.decode(decision.frame)


def test_register_then_agent_hello_lists_the_agent() -> None:
    registry = Registry()
    agent = session(registry, subject="a")
    assert reply_of(send(agent, action="register", name="a")) == {
        "status": "ok",
        "action": "registered",
    }
    assert "a" not in registry
    decision = send(agent, action="agent_hello", capabilities=["x", "y"])
    assert reply_of(decision) == {
        "status": "ok",
        "action": "agent_registered",
        "capabilities": ["x", "y"],
    }
    assert registry.agents()[0].capabilities == ("x", "y")


def test_name_other_than_the_tokens_subject_is_refused() -> None:
    registry = Registry()
    agent = session(registry, subject="a")
    assert reply_of(send(agent, action="register", name="b")) == {
        "status": "error",
        "reason": "name_mismatch",
    }
    assert reply_of(send(agent, action="agent_hello", capabilities=[])) == {
        "error": "must register before agent_hello"
    }
    assert len(registry) == 0


def test_taken_name_is_refused_until_it_is_free() -> None:
    registry = Registry()
    first, second = session(registry), session(registry)
    for agent in (first, second):
        assert reply_of(send(agent, action="register", name="a"))["action"] == "registered"
    send(first, action="agent_hello", capabilities=[])
    refused = send(second, action="agent_hello", capabilities=[])
    assert reply_of(refused) == {"status": "error", "reason": "name_taken"}
    assert isinstance(refused, Refuse)
    first.end()
    assert isinstance(send(second, action="agent_hello", capabilities=[]), Registered)


def test_registered_agent_may_change_its_capabilities_but_not_its_name() -> None:
    registry = Registry()
    agent = session(registry)
    send(agent, action="register", name="a")
    first = send(agent, action="agent_hello", capabilities=["x"])
    second = send(agent, action="agent_hello", capabilities=["y"])
    assert isinstance(first, Registered)
    assert isinstance(second, Registered)
    assert (first.is_new, second.is_new) == (True, False)
    assert reply_of(send(agent, action="register", name="b"))["reason"] == "name_mismatch"
    assert [(listed.name, listed.capabilities) for listed in registry.agents()] == [("a", ("y",))]


@pytest.mark.parametrize("name", [None, 7, "", "a\nb", "a" * (MAX_NAME_CHARS + 1), ["a"]])
def test_invalid_name_is_refused(name: Any) -> None:
    assert reply_of(send(session(), action="register", name=name)) == {
        "status": "error",
        "reason": "invalid_name",
    }


@pytest.mark.parametrize("capabilities", ["x", [1], {"x": 1}, ["x"] * (MAX_CAPABILITIES + 1)])
def test_invalid_capabilities_are_refused(capabilities: Any) -> None:
    agent = session()
    send(agent, action="register", name="a")
    assert (
        reply_of(send(agent, action="agent_hello", capabilities=capabilities))["reason"]
        == "invalid_capabilities"
    )


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", "5", "null", '{"action":["query"]}', '{"action":"dance"}', '{"name":1e999}'],
)
def test_json_without_a_known_action_is_answered_with_an_error(text: str) -> None:
    assert reply_of(session().receive(text)) == {"error": "unknown_action"}


@pytest.mark.parametrize(
    "text", ["", "hello", "{", '{"action":"result"', "[1, x", "[" * 30_000 + "]" * 30_000]
)
def test_text_that_is_not_json_closes_with_1011(text: str) -> None:
    decision = session().receive(text)
    assert isinstance(decision, Close)
    assert decision.code == 1011


def test_result_keeps_its_data_verbatim_and_its_id_decoded() -> None:
    decision = session().receive('{"action":"result","id":"a\\/b==","data": [1e999, {"n": 1.10}]}')
    assert isinstance(decision, Result)
    assert decision.query_id == "a/b=="
    assert bytes(decision.data) == b'[1e999, {"n": 1.10}]'


@pytest.mark.parametrize("frame", [{}, {"id": 7}, {"id": None}, {"id": ["a"]}])
def test_result_without_a_text_id_is_ignored(frame: dict[str, Any]) -> None:
    assert send(session(), action="result", data=[], **frame) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.text() | st.builds(lambda value: msgspec.json.encode(value).decode(), json_values))
def test_no_text_makes_a_session_raise(text: str) -> None:
    session().receive(text)


@given(
    st.sampled_from(["register", "agent_hello", "result"]),
    st.dictionaries(st.sampled_from(["name", "capabilities", "id", "data"]), json_values),
)
def test_no_frame_makes_a_session_raise(action: str, fields: dict[str, Any]) -> None:
    agent = session()
    send(agent, action="register", name="a")
    send(agent, action=action, **fields)
