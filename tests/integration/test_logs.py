"""The log of a running cluster: every line names its worker, and none has the text of a query."""

from __future__ import annotations

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from disco import Node
from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from shared.config.handlers import parse_handler
from shared.errors import ConfigError
from tests.cluster import TIMEOUT_S, Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio

NOISY = """
import logging, sys, threading, warnings
import structlog
print("imported")
def in_thread():
    logging.getLogger("lib").warning("of a thread")
    raise KeyError("thread failed")
class Ends:
    def __del__(self):
        raise OSError("while it was deleted")
def handle(body, memory):
    structlog.contextvars.clear_contextvars()
    print("two", "words")
    print("to stderr", file=sys.stderr)
    print("no end of line", end="")
    sys.stdout.write("\\n\\n")
    warnings.warn("outdated")
    logging.getLogger("lib").error("of a library")
    thread = threading.Thread(target=in_thread, name="mine")
    thread.start(); thread.join()
    Ends()
    structlog.get_logger("own").info("its event")
    print("unfinished", end="")
    if "fail" in body:
        raise ValueError("failed")
    return [{"type": "t"}], memory
"""
ASYNC = "import asyncio, logging, sys, threading, warnings\n" + NOISY.replace(
    "def handle", "async def handle"
)
ECHO = "def handle(body, memory):\n    return [{'type': body}], memory\n"
OF_THE_RUNNER = {"started", "worker_started", "draining", "stopped", "worker_replaced", "reloaded"}
WHOSE = {"worker": "a_server", "agent": "a", "incarnation": 1}


def lines(running: Cluster) -> list[dict[str, Any]]:
    """Return the lines of standard output and standard error. Each must be JSON."""
    return [json.loads(line) for line in running.log.splitlines()]


@pytest.mark.parametrize("handlers", [NOISY, ASYNC], ids=["thread", "async"])
@pytest.mark.parametrize("memory", ["ram", "disk"])
async def test_every_line_of_a_worker_names_the_worker(
    handlers: str, memory: str, tmp_path: Path, node: Node
) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url], memory=memory), handlers=handlers
    ) as running:
        await running.wait_ready()
        assert (await running.ask("x")).status_code == 200
        assert (await running.ask("fail")).status_code == 500
        assert await running.stop() == 0
        found = lines(running)
        of_worker = [
            line for line in found if "agent" in line or line["event"] not in OF_THE_RUNNER
        ]
        for line in of_worker:
            assert line | WHOSE | {"node": node.url.replace("http", "ws")} == line, line
        printed = {
            (line["text"], line["stream"], line["level"])
            for line in of_worker
            if line["event"] == "printed"
        }
        assert {
            ("imported", "stdout", "info"),
            ("two words", "stdout", "info"),
            ("to stderr", "stderr", "warning"),
            ("unfinished", "stdout", "info"),
        } <= printed | {(text.removeprefix("unfinished"), *rest) for text, *rest in printed}
        found = {line["event"] for line in of_worker}
        assert {
            "ready",
            "of a library",
            "of a thread",
            "its event",
            "thread_failed",
            "exception_ignored",
        } <= found
        assert any("UserWarning: outdated" in event for event in found)
        imported = [line for line in of_worker if line.get("text") == "imported"]
        assert len(imported) == 1, "the process that checks the handler logs nothing"
        (failed,) = (line for line in of_worker if line["event"] == "handler_failed")
        assert "ValueError: failed" in failed["exception"]
        (thread, *_) = (line for line in of_worker if line["event"] == "thread_failed")
        assert thread["thread"] == "mine"
        assert "KeyError: 'thread failed'" in thread["exception"]


SETUP_FAILS = """
class Handle:
    def setup(self):
        connect("db")
    def handle(self, body, memory):
        return [], memory
def connect(host):
    try:
        raise OSError("refused")
    except OSError:
        raise ValueError("no " + host)
handle = Handle
"""


@pytest.mark.message_text
@pytest.mark.parametrize(
    "handlers", [SETUP_FAILS, SETUP_FAILS.replace("def setup", "async def setup")]
)
async def test_traceback_of_a_failed_setup_has_only_the_handlers_frames(
    handlers: str, tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handlers) as running:
        await until(
            lambda: any("exception" in line for line in running.events("worker_ended_itself")),
            "the failure is logged",
        )
        failed = next(line for line in running.events("worker_ended_itself") if "exception" in line)
        assert failed["error"] == "the handler's setup() failed: ValueError: no db"
        assert failed["agent"] == "a"
        assert 'connect("db")' in failed["exception"]
        assert 'raise OSError("refused")' in failed["exception"]
        assert {
            Path(part.split('"')[0]).name for part in failed["exception"].split('File "')[1:]
        } == {"handlers.py"}

        async def is_in_the_row() -> bool:
            return bool((await running.row("a_server"))["last_error"] == failed["error"])

        await until(is_in_the_row, "the row has only the error message")


async def test_handler_may_replace_its_standard_streams(tmp_path: Path, node: Node) -> None:
    text = """
import sys
for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")
    assert (stream.errors, stream.newlines) == ("backslashreplace", None)
    assert (stream.line_buffering, stream.mode) == (True, "w")
    assert stream.name in ("<stdout>", "<stderr>")
    assert not stream.write_through and not stream.isatty()
def handle(body, memory):
    return [], memory
"""
    async with cluster(tmp_path, agent("a", [node.url]), handlers=text) as running:
        await running.wait_ready()
        assert not running.events("worker_restarting")


async def test_handler_that_fails_only_in_a_worker_is_found_before_the_fork(
    tmp_path: Path, node: Node
) -> None:
    text = """
import sys
sys.stdout.no_such_thing
def handle(body, memory):
    return [], memory
"""
    (tmp_path / "handlers.py").write_text(text)
    ref = parse_handler("handlers.py:handle", tmp_path)
    fork_server = ForkServer()
    fork_server.start()
    with pytest.raises(ConfigError, match="'_LogStream' object has no attribute 'no_such_thing'"):
        await anyio.to_thread.run_sync(Probes(fork_server).probe, ref)


async def test_each_change_of_state_is_one_line(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        assert await running.stop() == 0
        states = [
            line["event"] for line in lines(running) if "incarnation" in line and "agent" in line
        ]
        # Another process logs this one, at any time after the start.
        states.remove("worker_started")
        assert states == ["ready", "draining", "stopped"]
        assert [line["event"] for line in lines(running) if "agent" not in line] == [
            "started",
            "draining",
            "stopped",
        ]


@pytest.mark.parametrize("level", ["debug", "info"])
async def test_queries_are_logged_only_at_debug_level_and_shortened(
    level: str, tmp_path: Path, node: Node
) -> None:
    text = "whisper" + "0123456789" * 1000
    runner = f'log_level = "{level}"'
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO, runner=runner) as running:
        await running.wait_ready()
        await running.results(text)
        await node.query(text)
        assert await running.stop() == 0
        found = [line for line in lines(running) if "whisper" in json.dumps(line)]
        assert len(found) == (2 if level == "debug" else 0)
        for line in found:
            assert (line["event"], line["level"], line["worker"]) == ("query", "debug", "a_server")
            assert len(line["text"]) < 250


async def test_repeated_failures_are_one_line(tmp_path: Path, node: Node) -> None:
    handlers = "def handle(body, memory):\n    raise ValueError(body)\n"
    async with cluster(tmp_path, agent("a", [node.url]), handlers=handlers) as running:
        await running.wait_ready()
        for number in range(50):
            assert (await running.ask(str(number))).status_code == 500

        async def counted() -> bool:
            return (await running.row("a_server"))["errors"] == 50

        await until(counted, "all queries have failed")
        assert len(running.events("handler_failed")) == 1


async def test_stalled_reader_of_the_log_delays_no_query(tmp_path: Path, node: Node) -> None:
    handlers = """
import asyncio, os, signal
async def handle(body, memory):
    for number in range(1000 if body == "flood" else 0):
        print(number, "x" * (number % 90 * 100))
    if body == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return body, memory
"""
    reading, writing = os.pipe()
    data = bytearray()

    def read_all() -> None:
        while found := os.read(reading, 1 << 16):
            data.extend(found)

    agents = [agent("talks", [node.url]), agent("quiet", [node.url])]
    supervision = "liveness_timeout_ms = 5000"
    try:
        async with cluster(
            tmp_path, *agents, handlers=handlers, supervision=supervision, errors=writing
        ) as running:
            os.close(writing)
            await running.wait_ready()
            for _ in range(3):
                assert await running.results("flood", agent="talks") == "flood"
            pid = await running.worker_pid("quiet_server")
            assert (await running.ask("die", agent="quiet")).status_code == 503
            await running.wait_ready()  # the runner has logged, too
            assert await running.results("x", agent="quiet") == "x"
            assert await running.worker_pid("quiet_server") != pid
            row = await running.row("talks_server")
            assert (row["restarts"], row["errors"]) == (0, 0)
            assert await running.stop() == 0
    finally:
        reader = threading.Thread(target=read_all)
        reader.start()
        reader.join(TIMEOUT_S)
        os.close(reading)


async def test_log_lines_of_several_processes_do_not_mix(tmp_path: Path, node: Node) -> None:
    handlers = """
def handle(body, memory):
    for number in range(60):
        print(number, "x" * (number % 3 * 4000))
    return body, memory
"""
    reading, writing = os.pipe()
    data = bytearray()

    def read_slowly() -> None:
        while found := os.read(reading, 3000):
            data.extend(found)

    reader = threading.Thread(target=read_slowly)
    async with cluster(
        tmp_path, *(agent(name, [node.url]) for name in "abc"), handlers=handlers, errors=writing
    ) as running:
        os.close(writing)
        reader.start()
        await running.wait_ready()
        async with anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(partial(running.results, "x", agent=name))
        assert await running.stop() == 0
    await anyio.to_thread.run_sync(reader.join, TIMEOUT_S)
    os.close(reading)
    found = [json.loads(line) for line in data.splitlines()]
    assert len([line for line in found if line["event"] == "printed"]) == 180
    assert {"started", "ready", "stopped"} <= {line["event"] for line in found}


async def test_reload_can_change_the_log_level(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=ECHO) as running:
        await running.wait_ready()
        config = tmp_path / "em-runner.toml"
        config.write_text(
            config.read_text().replace(
                "[runner]\n", '[runner]\nlog_format = "console"\nlog_level = "error"\n'
            )
        )
        os.kill(running.process.pid, signal.SIGHUP)
        await until(lambda: '"stopped"' in running.log, "the old worker has exited")
        await running.wait_ready()
        before = running.log
        assert await running.stop() == 0
        assert running.log == before, "the exit is logged at info level"
