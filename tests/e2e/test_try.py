"""`em-runner try` calls a handler once, and explains what is wrong with its result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from runner.commands.trials import try_out
from shared.errors import ConfigError
from tests.cluster import ROOT, alive, until

pytestmark = pytest.mark.anyio

HANGING = ("sleeps", "waits_async", "computes", "SetUpHangs")
HANDLERS = """
import asyncio, functools, os, time

def count(body, memory):
    number = memory.get("count", 0) + 1
    return [{"type": "count", "properties": {"title": body, "number": number}}], {"count": number}

class Remembers:
    def setup(self):
        self.words = ["set up"]
    async def handle(self, body, memory):
        await asyncio.sleep(0)
        return [{"type": "words", "properties": {"words": [*self.words, body]}}], memory
    def close(self):
        print("closed")

def omits_memory(body, memory): return [body]
def returns_list_as_memory(body, memory): return body, [1]
def swaps_result_and_memory(body, memory): return {"asked": 1}, [{"type": "x"}]
def returns_one_embryo(body, memory): return {"type": "x"}, memory
class _Pair(tuple): pass
def returns_tuple_subclass(body, memory): return _Pair(([{"type": "x"}], {"pair": 1}))
def decorator_without_wraps(function): return lambda body, memory: function(body, memory)
@decorator_without_wraps
async def decorated(body, memory): return [], memory
class _Called:
    async def __call__(self, body, memory): return [{"type": "called"}], memory
callable_object = functools.partial(_Called())
async def forgets_await_of_sleep(body, memory):
    asyncio.sleep(0)
    return [{"type": "x"}], memory
def warns(body, memory):
    import logging, warnings
    warnings.warn("this is outdated")
    logging.getLogger("mine").warning("low on %s", "fuel")
    return [{"type": "x"}], memory
async def task_fails(body, memory):
    async def fail(): raise ValueError("not awaited")
    task = asyncio.ensure_future(fail())
    memory = {"itself": []}
    memory["itself"].append(task)
    await asyncio.sleep(0)
    return [{"type": "x"}], {}
def omits_type(body, memory): return [{"properties": {}}], memory
def returns_text(body, memory): return body, memory
def returns_object(body, memory): return {"what": object()}, memory
def fails(body, memory): raise ValueError("no such thing: " + body)
def returns_coroutine(body, memory): return asyncio.sleep(0)
def sleeps(body, memory): time.sleep(30)
async def waits_async(body, memory): await asyncio.sleep(30)
async def waits_briefly(body, memory):
    await asyncio.sleep(0.02)
    return [{"type": "late", "properties": {}}], memory
async def computes(body, memory):
    while True: pass
def exits(body, memory): os._exit(3)
def crashes(body, memory): os.kill(os.getpid(), 11)
def returns_result_not_awaited(body, memory):
    waiting = waits_async(body, memory)
    try:
        return waiting, memory
    finally:
        waiting.close()
def returns_tuple_keys(body, memory): return {(1, 2): 3}, memory
class SetUpFails:
    def setup(self): raise ValueError("no database")
    def handle(self, body, memory): return [], memory
class SetUpHangs(SetUpFails):
    def setup(self): time.sleep(30)
class CloseFails:
    def handle(self, body, memory): return [{"type": "x", "properties": {}}], {"asked": 1}
    def close(self): raise ValueError("no way out")
class CloseHangs(CloseFails):
    def close(self): time.sleep(30)
class BrokenRepr:
    def __repr__(self): return str(1 / 0)
def remembers_broken_repr(body, memory): return [{"type": "x"}], {"broken": BrokenRepr()}
def remembers_a_set(body, memory): return [{"type": "x"}], {"seen": {"x"}, "at": (1,)}
def remembers_a_lock(body, memory):
    import threading
    return [{"type": "x"}], {"lock": threading.Lock()}
def starts_a_process(body, memory):
    import subprocess, sys
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return [{"type": "x", "pid": started.pid}], memory
"""


def timeout(handler: str) -> tuple[str, ...]:
    """Return the option for a short timeout, if the handler exceeds it in any case."""
    return ("--timeout-s", "0.2") if handler in HANGING else ()


async def trial(
    folder: Path, handler: str, query: str = "hello", *options: str
) -> subprocess.CompletedProcess[str]:
    """Run `em-runner try` with one of the handlers."""
    (folder / "handlers.py").write_text(HANDLERS)
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", "try", handler, query, *options],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=200,
        )
    )


async def test_result_memory_and_time_are_printed(tmp_path: Path) -> None:
    done = await trial(tmp_path, "handlers.py:count", "fish", "--memory", '{"count": 41}')
    assert (done.returncode, done.stderr) == (0, "")
    assert '"number": 42' in done.stdout
    assert '"title": "fish"' in done.stdout
    assert "memory  {'count': 42}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("time    ")


async def test_class_is_set_up_queried_and_closed(tmp_path: Path) -> None:
    done = await trial(tmp_path, "handlers:Remembers")
    assert done.returncode == 0
    assert '"set up"' in done.stdout
    assert "closed" in done.stdout


WITH_DURATION = ["omits_memory", "returns_object", "fails", "sleeps"]
WITHOUT_DURATION = ["computes", "exits", "SetUpFails", "SetUpHangs"]


@pytest.mark.parametrize("handler", [*WITH_DURATION, *WITHOUT_DURATION])
async def test_failing_handler_has_no_result(handler: str, tmp_path: Path) -> None:
    done = await trial(tmp_path, f"handlers:{handler}", "hello", *timeout(handler))
    assert done.returncode == 3
    assert "result" not in done.stdout


@pytest.mark.parametrize("handler", WITH_DURATION)
async def test_duration_of_a_failed_call_is_printed(handler: str, tmp_path: Path) -> None:
    done = await trial(tmp_path, f"handlers:{handler}", "hello", *timeout(handler))
    assert "time" in done.stdout
    assert "e+" not in done.stdout, "it is not in scientific notation"


@pytest.mark.parametrize("handler", WITHOUT_DURATION)
async def test_call_that_does_not_return_has_no_duration(handler: str, tmp_path: Path) -> None:
    done = await trial(tmp_path, f"handlers:{handler}", "hello", *timeout(handler))
    assert "time" not in done.stdout


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (
            "omits_memory",
            "must return (result, memory), it returned a list; end it with: return result, memory",
        ),
        ("returns_list_as_memory", "must return a dict as memory, it returned a list"),
        (
            "returns_object",
            "Encoding objects of type object is unsupported; return what JSON supports",
        ),
        ("fails", "ValueError: no such thing: hello"),
        (
            "swaps_result_and_memory",
            "it returned a list and a dict as result; are the two swapped?",
        ),
        ("returns_coroutine", "returned a coroutine; write it as 'async def'"),
        ("decorated", "if it is behind a decorator, use functools.wraps there"),
        ("sleeps", "a query took longer than 200 ms"),
        ("waits_async", "a query took longer than 200 ms"),
        (
            "computes",
            "handle() has not ended after 0.2 s, and blocks the event loop: "
            "an 'async def' must not",
        ),
        ("exits", "handle() has ended its process: exit status 3"),
        ("crashes", "handle() has ended its process: killed by SIGSEGV"),
        (
            "returns_result_not_awaited",
            "Encoding objects of type coroutine is unsupported; 'await' it before you return it",
        ),
        ("returns_tuple_keys", "number-like keys are supported; return what JSON supports"),
        ("SetUpFails", "the handler's setup() failed: ValueError: no database"),
        ("SetUpHangs", "setup() has not ended after 0.2 s"),
    ],
)
async def test_failure_is_explained_in_the_last_line(
    handler: str, text: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, f"handlers:{handler}", "hello", *timeout(handler))
    assert text in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("handler", "text", "timeout_s"),
    [
        ("CloseFails", ": ValueError: no way out", "30"),
        ("CloseHangs", " 1.5 s", "1.5"),
    ],
)
async def test_result_is_printed_although_close_fails(
    handler: str, text: str, timeout_s: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, f"handlers:{handler}", "hello", "--timeout-s", timeout_s)
    assert done.returncode == 3
    assert text in done.stderr.splitlines()[-1]
    assert '"type": "x"' in done.stdout
    assert "memory  {'asked': 1}" in done.stdout


@pytest.mark.parametrize(
    ("handler", "line"),
    [("fails", "raise ValueError"), ("SetUpFails", 'raise ValueError("no database")')],
)
async def test_traceback_shows_the_failing_line(handler: str, line: str, tmp_path: Path) -> None:
    done = await trial(tmp_path, f"handlers.py:{handler}")
    assert line in done.stderr
    assert str(tmp_path / "handlers.py") in done.stderr


async def test_async_handler_is_awaited(tmp_path: Path) -> None:
    done = await trial(tmp_path, "handlers:waits_briefly")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        float(done.stdout.split()[-2]) >= 19
    )  # it waits 20 ms; the event loop counts whole milliseconds


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("handler", "note"),
    [
        ("omits_type", "embryo 0 is not an object with a 'type'"),
        ("returns_text", "the result is a str, which nodes drop: they expect a list"),
    ],
)
async def test_note_explains_that_a_node_rejects_the_result(
    handler: str, note: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, f"handlers:{handler}")
    assert done.returncode == 0
    assert note in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("handlers:unknown", "x"), " CloseFails, CloseHangs, Remembers"),
        (("handlers:cuont", "x"), "'count'"),
        (("nowhere.py:handle", "x"), "nowhere.py"),
        (
            ("handlers:count", "x", "--memory", "[1]"),
            "--memory: found '[1]', expected a JSON object",
        ),
    ],
)
async def test_invalid_arguments_are_reported_without_a_traceback(
    arguments: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, *arguments)
    assert done.returncode == 78
    assert text in done.stderr
    assert "Traceback" not in done.stderr


async def test_memory_without_a_usable_repr_is_shown_by_its_exception(tmp_path: Path) -> None:
    done = await trial(tmp_path, "handlers:remembers_broken_repr")
    assert done.returncode == 0
    assert '"type": "x"' in done.stdout
    assert " ZeroDivisionError)" in done.stdout


@pytest.mark.parametrize(
    ("handler", "note"),
    [
        ("remembers_a_set", ": {'seen': ['x'], 'at': [1]}"),
        ("remembers_a_lock", ": Encoding objects of type _thread.lock"),
    ],
)
async def test_note_explains_what_disk_memory_would_do(
    handler: str, note: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, f"handlers:{handler}")
    assert done.returncode == 0
    assert '"type": "x"' in done.stdout
    assert note in done.stdout


@pytest.mark.parametrize(
    "handler", ["returns_one_embryo", "returns_tuple_subclass", "callable_object"]
)
async def test_valid_result_has_no_note(handler: str, tmp_path: Path) -> None:
    done = await trial(tmp_path, f"handlers:{handler}")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"type": ' in done.stdout
    assert "note" not in done.stdout


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        ("forgets_await_of_sleep", "RuntimeWarning: coroutine 'sleep' was never awaited"),
        ("warns", "UserWarning: this is outdated"),
        ("warns", "low on fuel"),
        ("task_fails", "ValueError: not awaited"),
    ],
)
async def test_warnings_and_lost_exceptions_are_shown(
    handler: str, text: str, tmp_path: Path
) -> None:
    done = await trial(tmp_path, f"handlers:{handler}")
    assert done.returncode == 0
    assert text in done.stderr


async def test_slow_import_is_reported_before_it_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.supervision.probes.SLOW_IMPORT_S", 0.05)
    monkeypatch.setattr("runner.supervision.probes.PROBE_TIMEOUT_S", 0.1)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    reported: list[str] = []
    with pytest.raises(ConfigError, match=r" 0\.1 s$"):
        await anyio.to_thread.run_sync(try_out, "slow.py:handle", "x", "{}", 1.0, reported.append)
    [message] = reported
    assert " 0.05 s" in message
    assert message.endswith(" 0.1 s")


async def test_process_that_the_handler_started_is_killed(tmp_path: Path) -> None:
    done = await trial(tmp_path, "handlers:starts_a_process")
    assert done.returncode == 0
    pid = int(done.stdout.split('"pid": ')[1].split()[0])
    await until(lambda: not alive(pid), "the process has exited")
