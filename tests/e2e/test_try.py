"""`em-runner try`: one call of a handler, and what is wrong with what it returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from runner.trials import try_out
from shared.errors import ConfigError
from tests.cluster import ROOT, alive, until

pytestmark = pytest.mark.anyio

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

def alone(body, memory): return [body]
def listed(body, memory): return body, [1]
def swapped(body, memory): return {"asked": 1}, [{"type": "x"}]
def one_embryo(body, memory): return {"type": "x"}, memory
def keyed_twice(body, memory): return [{"type": "x", "properties": {1: 2, "1": 3}}], memory
def large(body, memory): return [{"type": "x", "text": "x" * (1 << 24)}], memory
class _Pair(tuple): pass
def paired(body, memory): return _Pair(([{"type": "x"}], {"pair": 1}))
def undecorated(function): return lambda body, memory: function(body, memory)
@undecorated
async def decorated(body, memory): return [], memory
class _Called:
    async def __call__(self, body, memory): return [{"type": "called"}], memory
called = functools.partial(_Called())
async def forgets_to_wait(body, memory):
    asyncio.sleep(0)
    return [{"type": "x"}], memory
def warns(body, memory):
    import logging, warnings
    warnings.warn("this is outdated")
    logging.getLogger("mine").warning("low on %s", "fuel")
    return [{"type": "x"}], memory
async def fails_unseen(body, memory):
    async def fail(): raise ValueError("nobody saw it")
    task = asyncio.ensure_future(fail())
    memory = {"itself": []}
    memory["itself"].append(task)
    await asyncio.sleep(0)
    return [{"type": "x"}], {}
def typeless(body, memory): return [{"properties": {}}], memory
def text(body, memory): return body, memory
def unsendable(body, memory): return {"what": object()}, memory
def fails(body, memory): raise ValueError("no such thing: " + body)
def wants_async(body, memory): return asyncio.sleep(0)
def sleeps(body, memory): time.sleep(30)
async def waits(body, memory): await asyncio.sleep(30)
async def waits_a_little(body, memory):
    await asyncio.sleep(0.02)
    return [{"type": "late", "properties": {}}], memory
async def computes(body, memory):
    while True: pass
def leaves(body, memory): os._exit(3)
def is_killed(body, memory): os.kill(os.getpid(), 11)
def forgets_await(body, memory):
    waiting = waits(body, memory)
    try:
        return waiting, memory
    finally:
        waiting.close()
def keyed(body, memory): return {(1, 2): 3}, memory
def nan(body, memory): return [{"type": "x", "properties": {"n": float("nan"), "s": {1}}}], {"f": print}
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
class Weird:
    def __repr__(self): return str(1 / 0)
def weird(body, memory): return [{"type": "x"}], {"weird": Weird()}
def remembers_a_set(body, memory): return [{"type": "x"}], {"seen": {"x"}, "at": (1,)}
def remembers_a_lock(body, memory):
    import threading
    return [{"type": "x"}], {"lock": threading.Lock()}
def starts_another(body, memory):
    import subprocess, sys
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return [{"type": "x", "pid": started.pid}], memory
"""


async def trial(folder: Path, handler: str, text: str = "hello", *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "handlers.py").write_text(HANDLERS)
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, "-m", "runner", "try", handler, text, *options],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=60,
        )
    )


async def test_result_memory_and_time_are_printed(tmp_path: Path) -> None:
    found = await trial(tmp_path, "handlers.py:count", "fish", "--memory", '{"count": 41}')
    assert (found.returncode, found.stderr) == (0, "")
    assert '"number": 42' in found.stdout
    assert '"title": "fish"' in found.stdout
    assert "memory  {'count': 42}" in found.stdout
    assert found.stdout.splitlines()[-1].startswith("time    ")


async def test_class_is_set_up_asked_and_closed(tmp_path: Path) -> None:
    found = await trial(tmp_path, "handlers:Remembers")
    assert found.returncode == 0
    assert '"set up"' in found.stdout
    assert "closed" in found.stdout


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("alone", "must return (result, memory), it returned a list; end it with: return result, memory"),
        ("listed", "must return a dict as memory, it returned a list; the second value is what the next query gets"),
        ("unsendable", "Encoding objects of type object is unsupported; return what JSON can hold"),
        ("fails", "ValueError: no such thing: hello"),
        ("swapped", "it returned a list and a dict as result: are the two swapped?; end it with: return result, mem"),
        ("wants_async", "returned a coroutine; write it as 'async def'"),
        ("decorated", "where it is one behind a decorator, have that use functools.wraps"),
        ("sleeps", "a query took longer than 200 ms"),
        ("waits", "a query took longer than 200 ms"),
        ("computes", "handle() has not ended after 0.2 s, and keeps the event loop: an 'async def' must not"),
        ("leaves", "handle() has ended its process: exit status 3"),
        ("is_killed", "handle() has ended its process: killed by SIGSEGV"),
        ("forgets_await", "Encoding objects of type coroutine is unsupported; 'await' it before you return it"),
        ("keyed", "number-like keys are supported; JSON has texts as keys"),
        ("SetUpFails", "the handler's setup() failed: ValueError: no database"),
        ("SetUpHangs", "setup() has not ended after 0.2 s"),
    ],
)
async def test_failure_is_explained(handler: str, says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}", "hello", "--timeout-s", "0.2")
    assert found.returncode == 3
    assert says in found.stderr.splitlines()[-1]
    assert "result" not in found.stdout
    asked = not (says.startswith("handle() has") or handler.startswith("SetUp"))
    assert ("time" in found.stdout) is asked, "of what had no end no time is told"
    assert "e+" not in found.stdout


@pytest.mark.parametrize(
    ("handler", "says"),
    [("CloseFails", "close() failed: ValueError: no way out"), ("CloseHangs", "close() has not ended after 0.2 s")],
)
async def test_answer_is_not_lost_to_a_close_that_fails(handler: str, says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}", "hello", "--timeout-s", "0.2")
    assert found.returncode == 3
    assert says in found.stderr.splitlines()[-1]
    assert '"type": "x"' in found.stdout
    assert "memory  {'asked': 1}" in found.stdout


async def test_place_of_a_failure_is_shown(tmp_path: Path) -> None:
    for handler, line in (("fails", "raise ValueError"), ("SetUpFails", 'raise ValueError("no database")')):
        found = await trial(tmp_path, f"handlers.py:{handler}")
        assert line in found.stderr
        assert f"{tmp_path / 'handlers.py'}" in found.stderr


async def test_handler_that_waits_is_waited_for(tmp_path: Path) -> None:
    found = await trial(tmp_path, "handlers:waits_a_little")
    assert (found.returncode, found.stderr) == (0, "")
    assert float(found.stdout.split()[-2]) >= 19, "the loop counts in whole milliseconds"


@pytest.mark.parametrize(
    ("handler", "note"),
    [
        ("typeless", "embryo 0 has no 'type'"),
        ("text", "the result is a str, which nodes drop: they expect a list"),
        ("keyed_twice", "keys that are no texts become texts, and some are the same then"),
        ("large", "the result has 16.0 MiB as JSON; a node takes 16 MiB, and cuts the connection at more"),
        ("nan", "NaN and infinity are sent as null"),
        ("nan", "a set is sent as a list"),
        ("nan", '"disk" would refuse it'),
    ],
)
async def test_result_that_a_node_makes_nothing_of_is_told(handler: str, note: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}")
    assert found.returncode == 0
    assert note in found.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("handlers:nothing", "x"), "it has CloseFails, CloseHangs, Remembers"),
        (("handlers:cuont", "x"), "did you mean 'count'?"),
        (("nowhere.py:handle", "x"), "nowhere.py"),
        (("handlers:count", "x", "--memory", "[1]"), "--memory: found '[1]', expected a JSON object"),
    ],
)
async def test_what_cannot_be_tried_is_one_clear_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, *arguments)
    assert found.returncode == 78
    assert says in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("handler", "shown"),
    [
        ("weird", "memory  (cannot be shown: its __repr__ raised ZeroDivisionError)"),
        ("remembers_a_set", "another one after a restart: {'seen': ['x'], 'at': [1]}"),
        ("remembers_a_lock", "it is lost when the worker is replaced, at a reload too: cannot pickle"),
    ],
)
async def test_what_becomes_of_a_memory_is_told(handler: str, shown: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}")
    assert found.returncode == 0
    assert '"type": "x"' in found.stdout
    assert shown in found.stdout


@pytest.mark.parametrize("handler", ["one_embryo", "paired", "called"])
async def test_result_that_is_taken_as_it_is_has_no_note(handler: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}")
    assert (found.returncode, found.stderr) == (0, "")
    assert '"type": ' in found.stdout
    assert "note" not in found.stdout


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        ("forgets_to_wait", "RuntimeWarning: coroutine 'sleep' was never awaited"),
        ("warns", "UserWarning: this is outdated"),
        ("warns", "low on fuel"),
        ("fails_unseen", "ValueError: nobody saw it"),
    ],
)
async def test_what_python_and_libraries_warn_of_is_shown(handler: str, says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}")
    assert found.returncode == 0
    assert says in found.stderr


async def test_import_that_takes_long_is_told_while_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.process.SLOW_IMPORT_S", 0.05)
    monkeypatch.setattr("runner.process.PROBE_TIMEOUT_S", 0.1)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    with pytest.raises(ConfigError, match=r"its import has not ended after 0\.1 s"):
        await anyio.to_thread.run_sync(try_out, "slow.py:handle", "x", "{}", 1.0, told.append)
    assert told == ["its import has not ended after 0.05 s; it is given up after 0.1 s"]


async def test_what_a_handler_has_started_ends_with_the_trial(tmp_path: Path) -> None:
    found = await trial(tmp_path, "handlers:starts_another")
    assert found.returncode == 0
    pid = int(found.stdout.split('"pid": ')[1].split()[0])
    await until(lambda: not alive(pid), "it has ended")
