"""`shared.ipc`: messages of runner and worker arrive unchanged, and any other bytes are refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import ipc
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import parse_node
from shared.config.tokens import Secret, TokenSource
from shared.ipc import (
    Cancel,
    Counters,
    Drain,
    DrainRequest,
    Failed,
    Hello,
    LastError,
    Launch,
    Queries,
    Replies,
    Status,
)

numbers = st.integers(0, 2**63 - 1)
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
counters = st.builds(
    Counters,
    node_answers=st.lists(numbers, min_size=5, max_size=5),
    errors=numbers,
    ignored=st.dictionaries(texts, numbers),
    handler_error=st.none() | st.builds(LastError, st.floats(0, 2**40), texts),
)
states = st.sampled_from(
    ["starting", "connecting", "registering", "ready", "backoff", "draining", "stopped"]
)
from_runner = st.one_of(
    st.builds(Queries, st.lists(st.tuples(numbers, texts))),
    st.builds(
        Queries,
        st.lists(st.tuples(numbers, texts)),
        st.lists(st.tuples(texts, texts)),
    ),
    st.builds(Cancel, st.lists(numbers)),
    st.just(Drain()),
)
from_worker = st.one_of(
    st.builds(Hello, st.binary()),
    st.builds(Replies, st.lists(st.tuples(numbers, st.integers(0, 2), st.binary()))),
    st.builds(Status, states, texts, counters),
    st.just(DrainRequest()),
    st.builds(Failed, texts),
)


@given(from_runner)
def test_runner_message_is_decoded_unchanged(message: ipc.RunnerMessage) -> None:
    assert ipc.decode_runner_message(ipc.encode(message)) == message


@given(from_worker)
def test_worker_message_is_decoded_unchanged(message: ipc.WorkerMessage) -> None:
    assert ipc.decode_worker_message(ipc.encode(message)) == message


some_bytes = st.one_of(
    st.binary(),
    st.builds(
        lambda head, rest: head + rest,
        st.sampled_from([b"\x91\x01", b"\x92\x02", b"\x94\x03"]),
        st.binary(),
    ),
    st.builds(
        lambda message, cut: ipc.encode(message)[:cut],
        from_worker | from_runner,
        st.integers(0, 60),
    ),
    st.recursive(
        st.none() | st.integers(-5, 5) | st.binary() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
    ).map(msgspec.msgpack.encode),
)


@given(some_bytes)
@example(b"\xdd\xff\xff\xff\xff")  # the head of a list of four billion items
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x92\x02" + b"\x91" * 100_000)
@example(b"\x91" * 100_000)
@example(b"")
def test_any_bytes_are_a_message_or_a_decoding_error(data: bytes) -> None:
    for decode, kinds in (
        (ipc.decode_worker_message, ipc.WorkerMessage),
        (ipc.decode_runner_message, ipc.RunnerMessage),
    ):
        try:
            message = decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        assert isinstance(message, kinds)


@pytest.mark.parametrize(
    "message",
    [
        Status("crashed", "", Counters()),  # type: ignore[arg-type]
        Replies([(1, "x", b"")]),  # type: ignore[list-item]
        Hello("text"),  # type: ignore[arg-type]
        Queries([]),
    ],
)
def test_message_of_the_wrong_shape_is_refused(message: ipc.WorkerMessage) -> None:
    with pytest.raises(msgspec.DecodeError):
        ipc.decode_worker_message(ipc.encode(message))


def launch() -> Launch:
    agent = Agent(
        name="echo",
        handler=HandlerRef("worker.echo", None, "handle", Path("/")),
        nodes=(parse_node("localhost"),),
        token=TokenSource(token=Secret("s3cr3t")),
    )
    spec = WorkerSpec(name="echo_server_2", agent=agent, node=agent.nodes[0])
    return Launch(spec=spec, incarnation=7, endpoint="ipc:///tmp/x", key=b"k3y-k3y-k3y")


def test_routing_id_starts_with_worker_and_incarnation() -> None:
    assert launch().routing_id.startswith(b"echo_server_2#7#")
    next_launch = msgspec.structs.replace(launch(), incarnation=8)
    assert next_launch.routing_id != launch().routing_id


def test_routing_id_cannot_be_guessed_and_does_not_contain_the_key() -> None:
    with_another_key = msgspec.structs.replace(launch(), key=b"another")
    assert with_another_key.routing_id != launch().routing_id
    assert launch().key not in launch().routing_id


def test_launch_shows_neither_its_key_nor_its_token() -> None:
    for shown in (repr(launch()), str(launch()), f"{[launch()]}"):
        assert "k3y" not in shown
        assert "s3cr3t" not in shown


def test_pickled_launch_keeps_its_key_and_token() -> None:
    restored = pickle.loads(pickle.dumps(launch()))
    assert restored == launch()
    assert restored.spec.agent.token.read("echo") == "s3cr3t"
