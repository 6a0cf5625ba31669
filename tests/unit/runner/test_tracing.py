"""`runner.tracing`: which headers of a request are its trace context (W3C Trace Context)."""

from __future__ import annotations

import pytest

from runner.tracing import _trace_in
from shared.ipc import NO_TRACE, Trace

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PARENT_HEADER = (b"traceparent", PARENT.encode())


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ([(b"host", b"h")], NO_TRACE),
        ([(b"tracestate", b"a=b")], NO_TRACE),
        ([PARENT_HEADER], (PARENT, "")),
        ([PARENT_HEADER, (b"tracestate", b"a=b"), (b"tracestate", b"c=d")], (PARENT, "a=b,c=d")),
        ([PARENT_HEADER, PARENT_HEADER], NO_TRACE),
        ([(b"traceparent", b"\xff\xfe")], ("\xff\xfe", "")),
    ],
    ids=["none", "only a state", "parent", "parent and two states", "two parents", "no ascii"],
)
def test_headers_may_contain_one_parent_and_several_states(
    headers: list[tuple[bytes, bytes]], trace: Trace
) -> None:
    assert _trace_in(headers) == trace
