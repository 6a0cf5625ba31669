"""`em-runner try`: one call of a handler, and what is wrong with what it returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.cluster import ROOT

pytestmark = pytest.mark.anyio

HANDLERS = """
import asyncio, os, time

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
def typeless(body, memory): return [{"properties": {}}], memory
def text(body, memory): return body, memory
def unsendable(body, memory): return {"what": object()}, memory
def fails(body, memory): raise ValueError("no such thing: " + body)
def wants_async(body, memory): return asyncio.sleep(0)
def sleeps(body, memory): time.sleep(30)
async def waits(body, memory): await asyncio.sleep(30)
def leaves(body, memory): os._exit(3)
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
        ("wants_async", "returned a coroutine; write it as 'async def'"),
        ("sleeps", "a query took longer than 200 ms"),
        ("waits", "a query took longer than 200 ms"),
    ],
)
async def test_failure_is_explained(handler: str, says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}", "hello", "--timeout-s", "0.2")
    assert found.returncode == 3
    assert says in found.stderr.splitlines()[-1]
    assert "result" not in found.stdout


@pytest.mark.parametrize(("handler", "note"), [("typeless", "embryo 0 has no 'type'"), ("text", "expect a list")])
async def test_result_that_a_node_makes_nothing_of_is_told(handler: str, note: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, f"handlers:{handler}")
    assert found.returncode == 0
    assert note in found.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("handlers:nothing", "x"), "it has Remembers, alone, count"),
        (("nowhere.py:handle", "x"), "nowhere.py"),
        (("handlers:count", "x", "--memory", "[1]"), "--memory: found '[1]', expected a JSON object"),
        (("handlers:leaves", "x"), "ended the process"),
    ],
)
async def test_what_cannot_be_tried_is_one_clear_line(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    found = await trial(tmp_path, *arguments)
    assert found.returncode == 78
    assert says in found.stderr
    assert "Traceback" not in found.stderr
