"""`shared.tracing`, `runner.tracing`: what of a client's headers is taken for a trace (W3C Trace Context)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from runner.tracing import _trace_in
from shared.errors import ConfigError
from shared.ipc import NO_TRACE
from shared.tracing import MAX_HEADER, read, sends, written

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_parent_is_read_as_it_is_written() -> None:
    context = read((PARENT, "congo=t61,rojo=00f"))
    assert context is not None
    assert (f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags) == (TRACE, SPAN, 1)
    assert context.is_remote
    assert written(NonRecordingSpan(context)) == (PARENT, "congo=t61,rojo=00f")


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_every_span_can_be_a_parent(trace_id: int, span_id: int, flags: int) -> None:
    context = SpanContext(trace_id, span_id, False, TraceFlags(flags), TraceState([("a", "b")]))
    found = read(written(NonRecordingSpan(context)))
    assert found is not None
    assert (found.trace_id, found.span_id, found.trace_flags) == (trace_id, span_id, flags)
    assert found.trace_state.to_header() == "a=b"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "nonsense",
        PARENT.upper(),
        PARENT + "-",
        PARENT + "-more",
        PARENT + "\n",
        " " + PARENT,
        PARENT[:-1],
        PARENT[:-1] + "g",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"01-{TRACE}-{SPAN}-01-{'x' * MAX_HEADER}",
        f"01-{TRACE}-{SPAN}-01.more",
        f"{PARENT},{PARENT}",
    ],
)
def test_parent_that_is_wrong_is_none(wrong: str) -> None:
    assert read((wrong, "a=b")) is None


def test_parent_of_a_later_version_is_read_as_far_as_this_one_knows_it() -> None:
    context = read((f"cc-{TRACE}-{SPAN}-ff-what-the-future-will-be-like", ""))
    assert context is not None
    assert context.trace_flags == 3


@pytest.mark.parametrize(
    "wrong",
    [
        "a",
        "a=",
        "A=b",
        "a=b,,c",
        "a=b=c",
        "a=1,a=2",
        "a=\x7f",
        "a=" + "b" * 257,
        "a=" + "b" * MAX_HEADER,
        ",".join(f"k{number}=v" for number in range(33)),
        " " * MAX_HEADER + "x",
    ],
)
def test_state_that_is_wrong_is_dropped_and_its_parent_kept(wrong: str) -> None:
    context = read((PARENT, wrong))
    assert context is not None
    assert context.trace_state.to_header() == ""


def test_state_may_have_spaces_around_its_members_and_empty_ones() -> None:
    context = read((PARENT, "a=1 , t@v=2,,\tb=3"))
    assert context is not None
    assert context.trace_state.to_header() == "a=1,t@v=2,b=3"


@given(st.text(), st.text())
def test_no_text_hurts(parent: str, state: str) -> None:
    assert read((parent, state)) is None
    assert read((PARENT, state)) is not None


@pytest.mark.parametrize("state", [" " * 64_000, "," * 64_000, "\t," * 32_000, "a=" * 32_000])
def test_largest_head_that_is_taken_costs_next_to_nothing(state: str) -> None:
    began = time.process_time()
    for _ in range(100):
        read((PARENT, state))
        read((PARENT, state[:MAX_HEADER]))
        read((state, ""))
    assert time.process_time() - began < 1.0


def test_headers_name_one_parent_and_as_many_states_as_there_are() -> None:
    assert _trace_in([(b"host", b"h")]) == NO_TRACE
    assert _trace_in([(b"tracestate", b"a=b")]) == NO_TRACE
    parent = (b"traceparent", PARENT.encode())
    assert _trace_in([parent, (b"tracestate", b"a=b"), (b"tracestate", b"c=d")]) == (PARENT, "a=b,c=d")
    assert _trace_in([parent, parent]) == NO_TRACE
    assert _trace_in([(b"traceparent", b"\xff\xfe")]) == ("\xff\xfe", "")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "expected otlp or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc", "expected http/protobuf"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense", "expected one such as http://localhost:4318"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20s3cr3t%0Ax", "a character that no header can"),
    ],
)
def test_what_the_environment_asks_for_in_vain_is_an_error(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        sends({name: value})
    assert name in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_environment_may_ask_for_no_spans_to_be_sent() -> None:
    assert not sends({"OTEL_TRACES_EXPORTER": "none"})
    assert sends({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4318/v1"})
    assert sends({})
