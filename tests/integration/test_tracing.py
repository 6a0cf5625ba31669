"""Traces through real processes to a real collector: parents of spans, and failures of tracing."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from disco import Node
from tests.cluster import COMMAND_TIMEOUT_S, Cluster, agent, cluster, until
from tests.cluster import ROOT as CHECKOUT
from tests.integration.collector import ROOT, Collector, Span, collecting

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CLIENT}-01"
SERVER, WORKER = "POST /agent/query", "query a"
KINDS = pytest.mark.parametrize("kind", ["def", "async def"])

SEES = """
from opentelemetry import trace
{kind} handle(body, memory):
    context = trace.get_current_span().get_span_context()
    return {{
        "trace": f"{{context.trace_id:032x}}", "span": f"{{context.span_id:016x}}",
        "sampled": bool(context.trace_flags.sampled), "state": context.trace_state.to_header(),
    }}, memory
"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@asynccontextmanager
async def traced(
    folder: Path,
    node: Node,
    handlers: str,
    environ: dict[str, str],
    runner: str = "",
    supervision: str = "",
    **of: object,
) -> AsyncIterator[Cluster]:
    async with cluster(
        folder,
        agent("a", [node.url], **of),
        handlers=handlers,
        runner=f"tracing = true\n{runner}",
        supervision=supervision,
        environ=environ,
    ) as running:
        await running.wait_ready()
        yield running


async def ask(running: Cluster, text: str, status: int = 200, **headers: str) -> object:
    answer = await running.http.post("/agent/query", json={"query": text}, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json().get("results")


def is_root(span: Span) -> bool:
    return span.parent_id == ROOT and span.trace_id != TRACE


@KINDS
async def test_trace_continues_from_the_client_to_the_handler(
    kind: str, tmp_path: Path, node: Node, collector: Collector
) -> None:
    async with traced(tmp_path, node, SEES.format(kind=kind), collector.environ) as running:
        seen = await ask(running, "secret-text", traceparent=PARENT, tracestate="congo=t61rcWkgMzE")
        server, worker = await collector.have(SERVER, WORKER)
    assert (server.kind, server.trace_id, server.parent_id) == ("SERVER", TRACE, CLIENT)
    assert (worker.kind, worker.trace_id, worker.parent_id) == ("INTERNAL", TRACE, server.span_id)
    assert seen == {
        "trace": TRACE,
        "span": worker.span_id,
        "sampled": True,
        "state": "congo=t61rcWkgMzE",
    }
    assert not server.failed
    assert not worker.failed
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/agent/query",
        "http.response.status_code": 200,
        "url.path": "/agent/query",
        "url.scheme": "http",
        "em_runner.source": "direct",
        "em_runner.worker": "a_server",
        "em_runner.outcome": "ok",
    }
    assert worker.attributes == {
        "em_runner.agent": "a",
        "em_runner.worker": "a_server",
        "em_runner.node": worker.attributes["em_runner.node"],
        "em_runner.source": "direct",
        "em_runner.outcome": "ok",
    }
    assert str(node.port) in worker.attributes["em_runner.node"]
    assert server.resource["service.name"] == worker.resource["service.name"] == "em-runner"
    assert server.resource["service.instance.id"] != worker.resource["service.instance.id"]
    assert worker.resource["em_runner.worker"] == "a_server"
    assert not [body for body in collector.bodies if b"secret-text" in body]


@KINDS
async def test_concurrent_queries_have_separate_traces(
    kind: str, tmp_path: Path, node: Node, collector: Collector
) -> None:
    together = 8
    wait = "await asyncio.sleep(0.002)" if kind == "async def" else "time.sleep(0.002)"
    handlers = f"""
import asyncio, time
from opentelemetry import trace
begun = []
{kind} handle(body, memory):
    begun.append(body)
    while len(begun) < {together}:
        {wait}
    return f"{{trace.get_current_span().get_span_context().trace_id:032x}}", memory
"""
    traces = [f"{number:032x}" for number in range(1, together + 1)]
    options = {"memory": "none", "concurrency": together}
    found: dict[str, object] = {}
    async with traced(tmp_path, node, handlers, collector.environ, **options) as running:

        async def one(trace: str) -> None:
            found[trace] = await ask(running, "q", traceparent=f"00-{trace}-{CLIENT}-01")

        async with anyio.create_task_group() as tasks:
            for trace in traces:
                tasks.start_soon(one, trace)
    assert found == {trace: trace for trace in traces}


@KINDS
async def test_query_from_a_node_starts_a_trace(
    kind: str, tmp_path: Path, node: Node, collector: Collector
) -> None:
    handlers = (
        SEES.format(kind=kind)
        .replace("return {", "return {'type': 't', 'properties': {")
        .replace("}, memory", "}}, memory")
    )
    async with traced(tmp_path, node, handlers, collector.environ) as running:
        await running.wait_ready()
        (embryo,) = await node.query("secret-text")
        (worker,) = await collector.have(WORKER)
    assert (worker.kind, worker.parent_id, worker.failed) == ("CONSUMER", ROOT, False)
    assert embryo["properties"]["trace"] == worker.trace_id
    assert embryo["properties"]["span"] == worker.span_id
    assert worker.attributes["em_runner.source"] == "node"
    assert worker.attributes["em_runner.outcome"] == "ok"
    assert [span for span in collector.spans if span.name != WORKER] == []


@KINDS
async def test_span_of_a_failed_query_has_no_text_of_the_handler(
    kind: str, tmp_path: Path, node: Node, collector: Collector
) -> None:
    handlers = f"""
import asyncio, time
{kind} handle(body, memory):
    if body == "slow":
        {"await asyncio" if kind == "async def" else "time"}.sleep(60)
    raise ValueError("secret-text: " + body)
"""
    supervision = "handler_timeout_ms = 1500"
    async with traced(
        tmp_path, node, handlers, collector.environ, supervision=supervision
    ) as running:
        await ask(running, "fails", 500)
        failed = await collector.have(SERVER, WORKER)

        async def time_out() -> list[Span] | None:
            await ask(running, "slow", 504)
            # The worker of a plain function exits after the timeout. It first sends its last span,
            # which may take too long on a busy machine.
            with anyio.move_on_after(10):
                return (await collector.have(SERVER, SERVER, WORKER, WORKER))[1::2]
            return None

        late = await until(time_out, "the spans of a query that times out have arrived")
    assert [span.failed for span in [*failed, *late]] == [True] * 4
    assert [span.attributes["em_runner.outcome"] for span in failed] == ["handler_failed"] * 2
    assert failed[0].attributes["error.type"] == "handler_failed"
    assert failed[1].attributes["error.type"] == "ValueError"
    assert failed[0].attributes["http.response.status_code"] == 500
    assert [span.attributes["em_runner.outcome"] for span in late] == ["timed_out"] * 2
    assert late[1].attributes["error.type"] == "timed_out"
    assert not [body for body in collector.bodies if b"secret-text" in body]


async def test_span_of_a_refused_request_is_not_an_error(
    tmp_path: Path, node: Node, collector: Collector
) -> None:
    async with traced(tmp_path, node, SEES.format(kind="def"), collector.environ) as running:
        answer = await running.http.post("/agents/unknown/query?token=hidden", json={"query": "q"})
        assert answer.status_code == 404
        (span,) = await collector.have("POST /agents/{agent}/query")
    assert span.attributes["http.response.status_code"] == 404
    assert span.attributes["url.path"] == "/agents/unknown/query"
    assert not span.failed
    assert not [body for body in collector.bodies if b"hidden" in body]


async def test_unsampled_trace_is_propagated_but_not_exported(
    tmp_path: Path, node: Node, collector: Collector
) -> None:
    async with traced(tmp_path, node, SEES.format(kind="def"), collector.environ) as running:
        seen = await ask(running, "q", traceparent=PARENT[:-2] + "00")
        assert isinstance(seen, dict)
        assert (seen["trace"], seen["sampled"]) == (TRACE, False)
        await ask(running, "q")  # a sampled query
        await collector.have(SERVER, WORKER)
        await running.stop()
    assert len(collector.spans) == 2


async def test_invalid_headers_and_trailers_start_a_new_trace(
    tmp_path: Path, node: Node, collector: Collector
) -> None:
    async with traced(tmp_path, node, SEES.format(kind="async def"), collector.environ) as running:
        for wrong in (
            "nonsense",
            "0" * 40_000,
            f"ff-{TRACE}-{CLIENT}-01",
            f"00-{'0' * 32}-{CLIENT}-01",
        ):
            await ask(running, "q", traceparent=wrong)
        url = running.http.base_url
        reader, writer = await asyncio.open_connection(url.host, url.port)
        lines = f"traceparent: {PARENT}\r\n".encode()
        head = b"POST /agent/query HTTP/1.1\r\nhost: localhost\r\n"
        writer.write(
            head
            + b"transfer-encoding: chunked\r\n\r\nd\r\n"
            + b'{"query":"q"}\r\n0\r\n'
            + lines
            + b"\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        await ask(running, "q", traceparent=PARENT, tracestate="," * 30_000)
        spans = await collector.have(*[SERVER] * 6)
    assert len({span.trace_id for span in spans}) == 6
    assert [span.trace_id for span in spans if not is_root(span)] == [TRACE]
    assert "Traceback" not in running.log


async def test_query_waiting_for_a_successor_keeps_its_trace(
    tmp_path: Path, node: Node, collector: Collector
) -> None:
    handlers = """
import os, pathlib, time
from opentelemetry import trace
def handle(body, memory):
    if body == "first":
        pathlib.Path("began").touch()
        while not pathlib.Path("gate").exists():
            time.sleep(0.005)
    context = trace.get_current_span().get_span_context()
    return {"pid": os.getpid(), "trace": f"{context.trace_id:032x}"}, memory
"""
    async with traced(tmp_path, node, handlers, collector.environ) as running:
        before = await running.worker_pid("a_server")
        found: list[object] = []

        async def one() -> None:
            found.append(await ask(running, "second", traceparent=PARENT))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, running, "first")
            await until((tmp_path / "began").exists, "the handler has started")
            tasks.start_soon(one)
            await running.wait_in_flight(2)
            config = tmp_path / "em-runner.toml"
            config.write_text(config.read_text() + 'capabilities = ["new"]\n')
            running.process.send_signal(1)
            await until(
                lambda: "given_back" in outcomes(collector),
                "the old worker has given the query back",
            )
            (tmp_path / "gate").touch()
        (second,) = found
        await until(
            lambda: outcomes(collector) == ["given_back", "ok"],
            "the spans of both workers have arrived",
        )
    assert isinstance(second, dict)
    assert second["pid"] != before
    assert second["trace"] == TRACE


def outcomes(collector: Collector) -> list[str]:
    """Return the outcomes of the client's query in the spans of the workers."""
    of_workers = [
        span for span in collector.spans if span.name == WORKER and span.trace_id == TRACE
    ]
    return sorted(span.attributes["em_runner.outcome"] for span in of_workers)


@pytest.mark.parametrize("collector_is", ["gone", "hanging"])
async def test_unresponsive_collector_delays_neither_queries_nor_shutdown(
    collector_is: str, tmp_path: Path, node: Node, collector: Collector
) -> None:
    environ = collector.environ
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening
        if collector_is == "gone":
            there = f"127.0.0.1:{closed.getsockname()[1]}/v1/traces?api_key=s3cr3t%20key"
            environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"http://op:p4ssw0rd@{there}"
        collector.open.clear()
        # With this small queue, most spans are dropped.
        environ |= {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
        async with traced(tmp_path, node, SEES.format(kind="def"), environ) as running:
            for number in range(200):
                await ask(running, f"q{number}")
            if collector_is == "hanging":
                await until(collector.asked.is_set, "the collector has a request")
            else:
                await until(lambda: running.events("tracing_failed"), "the failure is logged")
            began = time.monotonic()
            assert await running.stop() == 0
            took_s = time.monotonic() - began
            await running.wait_exited()
    assert took_s < 9, "at most two flushes of a second, and the shutdown"
    lines = running.events("tracing_failed")
    assert len(lines) <= 2 * 3, "one line for each part of the library in each of two processes"
    assert {line.get("worker") for line in lines} <= {None, "a_server"}
    assert not running.events("worker_killed")
    assert not running.events("drain_timed_out")
    assert not running.events("exit_timed_out")
    assert "Traceback" not in running.log
    for secret in ("s3cr3t", "p4ssw0rd"):
        assert secret not in running.log


async def test_queued_spans_are_sent_at_shutdown(
    tmp_path: Path, node: Node, collector: Collector
) -> None:
    environ = collector.environ | {
        "OTEL_BSP_SCHEDULE_DELAY": "3600000",
        "OTEL_SERVICE_NAME": "mine",
    }

    async def all_sent() -> bool:
        async with traced(tmp_path, node, SEES.format(kind="def"), environ) as running:
            collector.bodies.clear()
            await ask(running, "q")
            assert collector.spans == []
            assert await running.stop() == 0
        return sorted(span.name for span in collector.spans) == sorted([SERVER, WORKER])

    # On a busy machine the time that an exiting process has for this may be too short.
    await until(all_sent, "both processes send their spans")
    assert {span.resource["service.name"] for span in collector.spans} == {"mine"}


async def test_opentelemetry_is_not_imported_without_tracing(tmp_path: Path, node: Node) -> None:
    record = tmp_path / "modules"
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\n"
        "def write():\n"
        "    if 'runner.app' in sys.modules:\n"
        f"        open({str(record)!r}, 'w').write(' '.join(sys.modules))\n"
        "atexit.register(write)\n"
    )
    handlers = """
import sys
def handle(body, memory):
    return sorted(sys.modules), memory
"""
    environ = {"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=handlers, environ=environ
    ) as running:
        await running.wait_ready()
        in_worker = await running.results("q")
        await running.stop()
    in_runner = record.read_text().split()
    assert "worker.main" in in_worker
    assert "runner.routing.router" in in_runner
    for modules in (in_worker, in_runner):
        assert [
            name
            for name in modules
            if name.startswith("opentelemetry") or name.endswith(".tracing")
        ] == []


def em_runner(folder: Path, command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    (folder / "handlers.py").write_text("def handle(body, memory): return body, memory\n")
    (folder / "em-runner.toml").write_text(
        '[runner]\nhttp = "127.0.0.1:0"\ntracing = true\n' + agent("a", ["localhost:1"])
    )
    env = (
        os.environ | {"HOME": str(folder), "PYTHONPATH": str(CHECKOUT), "COLUMNS": "300"} | environ
    )
    return subprocess.run(
        [sys.executable, "-m", "runner", command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )


@pytest.mark.message_text
@pytest.mark.parametrize("command", ["check", "run"])
async def test_error_without_the_extra_names_the_package_to_install(
    command: str, home: Path
) -> None:
    (home / "none" / "opentelemetry").mkdir(parents=True)
    (home / "none" / "opentelemetry" / "__init__.py").touch()
    ended = em_runner(home, command, PYTHONPATH=f"{home / 'none'}:{CHECKOUT}")
    assert ended.returncode == 78
    assert ended.stderr.count("\n") == 1
    assert "runner.tracing" in ended.stderr
    assert "pip install 'em-runner[otel]'" in ended.stderr


@pytest.mark.message_text
@pytest.mark.parametrize("command", ["check", "run"])
async def test_invalid_variable_is_an_error_before_a_worker_starts(
    command: str, home: Path
) -> None:
    ended = em_runner(home, command, OTEL_BSP_MAX_QUEUE_SIZE="0")
    assert ended.returncode == 78
    assert "tracing cannot start" in ended.stderr
    assert "max_queue_size" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_error_for_an_unreadable_header_does_not_contain_its_secret(
    tmp_path: Path,
) -> None:
    ended = em_runner(tmp_path, "check", OTEL_EXPORTER_OTLP_HEADERS="s3cr3t")
    assert ended.returncode == 0
    (line,) = ended.stderr.splitlines()
    assert json.loads(line)["event"] == "tracing_failed"
    assert "s3cr3t" not in ended.stderr + ended.stdout


async def test_check_succeeds_with_tracing_and_no_collector(tmp_path: Path) -> None:
    ended = em_runner(tmp_path, "check")
    assert ended.returncode == 0, ended.stderr
    assert json.dumps(ended.stderr) == '""'
