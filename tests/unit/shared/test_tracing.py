"""`shared.tracing`: which headers are read as a trace (W3C Trace Context)."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from shared.errors import ConfigError
from shared.tracing import MAX_HEADER_CHARS, _check_environ, parent_of, trace_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


def test_parent_is_read_and_written_unchanged() -> None:
    context = parent_of((PARENT, "congo=t61,rojo=00f"))
    assert context is not None
    assert f"{context.trace_id:032x}" == TRACE
    assert f"{context.span_id:016x}" == SPAN
    assert context.trace_flags == 1
    assert context.is_remote
    assert trace_of(NonRecordingSpan(context)) == (PARENT, "congo=t61,rojo=00f")


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.integers(0, 3))
def test_every_span_can_be_a_parent(trace_id: int, span_id: int, flags: int) -> None:
    context = SpanContext(trace_id, span_id, False, TraceFlags(flags), TraceState([("a", "b")]))
    found = parent_of(trace_of(NonRecordingSpan(context)))
    assert found is not None
    assert (found.trace_id, found.span_id, found.trace_flags) == (trace_id, span_id, flags)
    assert found.trace_state.to_header() == "a=b"


@pytest.mark.parametrize(
    "invalid",
    [
        "",
        "nonsense",
        PARENT.upper(),
        PARENT + "-",
        PARENT + "-more",
        PARENT[:-1],
        PARENT[:-1] + "g",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"01-{TRACE}-{SPAN}-01-{'x' * MAX_HEADER_CHARS}",
        f"01-{TRACE}-{SPAN}-01.more",
        f"{PARENT},{PARENT}",
    ],
)
def test_invalid_parent_is_ignored(invalid: str) -> None:
    assert parent_of((invalid, "a=b")) is None


def test_known_fields_of_a_later_version_are_read() -> None:
    context = parent_of((f"cc-{TRACE}-{SPAN}-ff-what-the-future-will-be-like", ""))
    assert context is not None
    assert context.trace_flags.sampled


@pytest.mark.parametrize(
    "invalid",
    [
        "a",
        "a=",
        "A=b",
        "a=b,,c",
        "a=b=c",
        "a=1,a=2",
        "a=\x7f",
        "a=" + "b" * 257,
        "a=" + "b" * MAX_HEADER_CHARS,
        ",".join(f"k{number}=v" for number in range(33)),
        " " * MAX_HEADER_CHARS + "x",
    ],
)
def test_invalid_state_is_dropped_and_its_parent_kept(invalid: str) -> None:
    context = parent_of((PARENT, invalid))
    assert context is not None
    assert context.trace_state.to_header() == ""


def test_state_may_contain_spaces_and_empty_members() -> None:
    context = parent_of((PARENT, "a=1 , t@v=2,,\tb=3"))
    assert context is not None
    assert context.trace_state.to_header() == "a=1,t@v=2,b=3"


@given(st.text(), st.text())
def test_any_text_is_read_without_an_error(parent: str, state: str) -> None:
    assert parent_of((parent, state)) is None
    assert parent_of((PARENT, state)) is not None


@pytest.mark.parametrize("state", [" " * 64_000, "," * 64_000, "\t," * 32_000, "a=" * 32_000])
def test_large_headers_are_read_quickly(state: str) -> None:
    started_s = time.process_time()
    for _ in range(100):
        parent_of((PARENT, state))
        parent_of((PARENT, state[:MAX_HEADER_CHARS]))
        parent_of((state, ""))
    assert time.process_time() - started_s < 1.0


UNSUPPORTED = [
    ("OTEL_TRACES_EXPORTER", "zipkin", "expected otlp or none"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "expected http/protobuf"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc", "expected http/protobuf"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "nonsense", "expected one such as http://localhost:4318"),
    (
        "OTEL_EXPORTER_OTLP_HEADERS",
        "authorization=Bearer%20s3cr3t%0Ax",
        "a character that no header may have",
    ),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in UNSUPPORTED])
def test_unsupported_environment_variable_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check_environ({name: value})
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("name", "value", "expected"), UNSUPPORTED)
def test_message_for_an_unsupported_variable_names_it_and_the_fault(
    name: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        _check_environ({name: value})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "sends"),
    [
        ({"OTEL_TRACES_EXPORTER": "none"}, False),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector:4318/v1",
            },
            True,
        ),
        ({}, True),
    ],
)
def test_environment_may_disable_the_sending_of_spans(environ: dict[str, str], sends: bool) -> None:
    assert _check_environ(environ) is sends
