"""`shared.ipc`: what runner and worker say to each other survives the way, and nothing else is taken for it."""

from __future__ import annotations

import pickle
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared import ipc
from shared.config import Agent, WorkerSpec
from shared.handlers import HandlerRef
from shared.ipc import (
    Cancel,
    Counters,
    Drain,
    DrainRequest,
    Failed,
    Hello,
    Launch,
    Mishap,
    Queries,
    Replies,
    Status,
    TracedQueries,
)
from shared.nodes import parse_node
from shared.tokens import Secret, TokenSource

numbers = st.integers(0, 2**63 - 1)
words = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
counters = st.builds(
    Counters,
    node=st.lists(numbers, min_size=5, max_size=5),
    errors=numbers,
    ignored=st.dictionaries(words, numbers),
    handler_error=st.none() | st.builds(Mishap, st.floats(0, 2**40), words),
)
states = st.sampled_from(["starting", "connecting", "registering", "ready", "backoff", "draining", "stopped"])
from_runner = st.one_of(
    st.builds(Queries, st.lists(st.tuples(numbers, words))),
    st.builds(TracedQueries, st.lists(st.tuples(numbers, words, words, words))),
    st.builds(Cancel, st.lists(numbers)),
    st.just(Drain()),
)
from_worker = st.one_of(
    st.builds(Hello, st.binary(), numbers),
    st.builds(Replies, st.lists(st.tuples(numbers, st.integers(0, 2), st.binary()))),
    st.builds(Status, states, words, counters),
    st.just(DrainRequest()),
    st.builds(Failed, words),
)


@given(from_runner)
def test_what_the_runner_says_reaches_the_worker_as_it_was(message: ipc.RunnerMessage) -> None:
    assert ipc.decode_runner_message(ipc.encode(message)) == message


@given(from_worker)
def test_what_a_worker_says_reaches_the_runner_as_it_was(message: ipc.WorkerMessage) -> None:
    assert ipc.decode_worker_message(ipc.encode(message)) == message


some_bytes = st.one_of(
    st.binary(),
    st.builds(lambda head, rest: head + rest, st.sampled_from([b"\x91\x01", b"\x92\x02", b"\x94\x03"]), st.binary()),
    st.builds(lambda message, cut: ipc.encode(message)[:cut], from_worker | from_runner, st.integers(0, 60)),
    st.recursive(
        st.none() | st.integers(-5, 5) | st.binary() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ).map(msgspec.msgpack.encode),
)


@given(some_bytes)
@example(b"\xdd\xff\xff\xff\xff")  # a list that claims four thousand million items
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
    [Status("crashed", "", Counters()), Replies([(1, "x", b"")]), Hello("text", 1), Queries([])],  # type: ignore[list-item, arg-type]
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
    spec = WorkerSpec(name="echo_server_2", agent=agent, node=agent.nodes[0], index=2)
    return Launch(spec=spec, incarnation=7, endpoint="ipc:///tmp/x", key=b"k3y-k3y-k3y")


def test_routing_id_carries_the_incarnation() -> None:
    assert launch().routing_id.startswith(b"echo_server_2#7#")
    assert msgspec.structs.replace(launch(), key=b"another").routing_id != launch().routing_id, "nobody can guess it"
    assert launch().key not in launch().routing_id
    assert msgspec.structs.replace(launch(), incarnation=8).routing_id != launch().routing_id


def test_launch_shows_neither_its_key_nor_its_token() -> None:
    for shown in (repr(launch()), str(launch()), f"{[launch()]}"):
        assert "k3y" not in shown
        assert "s3cr3t" not in shown


def test_launch_reaches_the_forked_process_with_its_key_and_its_token() -> None:
    again = pickle.loads(pickle.dumps(launch()))
    assert again == launch()
    assert again.spec.agent.token.read("echo") == "s3cr3t"
