"""`shared.sink`: lines are whole, in order, and nobody waits for whoever reads them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.sink import MOST_BYTES, Sink

ROOT = Path(__file__).resolve().parents[2]
Ends = tuple[int, int]


def a_pipe() -> Ends:
    return os.pipe()


def a_socket() -> Ends:
    """As journald's."""
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def a_terminal() -> Ends:
    """As one that is held with Ctrl-S: nobody reads."""
    reading, writing = pty.openpty()
    attributes = termios.tcgetattr(writing)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(writing, termios.TCSANOW, attributes)
    return reading, writing


KINDS = [a_pipe, a_socket, a_terminal]


@pytest.fixture(params=KINDS)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    reading, writing = request.param()
    yield reading, writing
    for fd in (reading, writing):
        with contextlib.suppress(OSError):
            os.close(fd)


Open = Callable[..., Sink]


@pytest.fixture
def opened() -> Iterator[Open]:
    sinks: list[Sink] = []

    def open_one(*arguments: Any) -> Sink:
        sinks.append(Sink(*arguments))
        return sinks[-1]

    yield open_one
    for sink in sinks:
        sink.flush(20)
        sink.close()


def read_lines(fd: int, enough: Callable[[list[bytes]], bool]) -> list[bytes]:
    data, ends_s = b"", time.monotonic() + 20
    while not enough(data.split(b"\n")[:-1]):
        assert time.monotonic() < ends_s, data[-200:]
        if select.select([fd], [], [], 0.1)[0]:
            data += os.read(fd, 1 << 20)
    return data.split(b"\n")[:-1]


def test_line_is_there_at_once(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    opened(writing).write(b"one\n")
    assert os.read(reading, 100) == b"one\n"
    assert os.get_blocking(writing), "it is not ours alone"


def test_nobody_waits_for_a_reader_that_stalls_and_nothing_is_lost_of_what_may_wait(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    sink = opened(writing)
    lines = [b"%06d %s" % (number, b"x" * (50 + number % 9000)) for number in range(500)]
    began_s = time.monotonic()
    for line in lines:
        sink.write(line + b"\n")
    assert time.monotonic() - began_s < 5, "it would be for ever"
    sink.flush(0.01)
    assert read_lines(reading, lambda found: len(found) >= len(lines)) == lines
    sink.flush(20)
    sink.write(b"at once again\n")
    assert read_lines(reading, bool) == [b"at once again"]


def test_what_comes_on_top_is_dropped_counted_and_told(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    told: list[int] = []
    sink = opened(writing, told.append)
    many = 2 * MOST_BYTES // 10_000
    for number in range(many):
        sink.write(b"%06d %s\n" % (number, b"x" * 10_000))
    found: list[bytes] = []

    def drained(lines: list[bytes]) -> bool:
        return bool(told) and len(lines) + told[0] >= many

    found = read_lines(reading, drained)
    assert len(found) + told[0] == many
    assert found == [b"%06d %s" % (number, b"x" * 10_000) for number in range(len(found))], "the oldest are kept"


def test_reader_that_goes_away_while_lines_wait_holds_up_nothing(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    sink = opened(writing)
    for _ in range(100):
        sink.write(b"x" * 10_000 + b"\n")
    os.close(reading)
    sink.flush(20)
    sink.write(b"to nobody\n")


FULL = """
import resource, sys
from shared.sink import Sink

def room(more_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + more_bytes, resource.RLIM_INFINITY))

told = []
sink, size = Sink(2, told.append), 0
for number in range(6):
    if number == 1:
        size = 12
        room(5)  # of the second line there is a part, of the third and fourth nothing
    if number == 4:
        room(1000)
    sink.write(b'{"line": %d}\\n' % number)
    sink.flush(20)
print(told)
"""


def test_disk_that_was_full_costs_the_lines_of_that_time_and_says_how_many(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as stream:
        done = subprocess.run(
            [sys.executable, "-c", FULL], cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, text=True, timeout=60
        )
    assert done.stdout == "[3]\n"
    assert log.read_text().splitlines() == ['{"line": 0}', '{"lin', '{"line": 4}', '{"line": 5}']


WRITER = """
import sys
from shared.sink import Sink
sink, name = Sink(2), sys.argv[1].encode()
for number in range(60):
    sink.write(b'{"from": "%b", "text": "%b"}\\n' % (name, name * (9000 if number % 3 else 9)))
sink.flush(20)
"""


def test_lines_of_several_processes_do_not_mix_on_a_pipe_however_long_they_are() -> None:
    reading, writing = os.pipe()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT, stderr=writing) for name in "abc"]
    os.close(writing)
    data = b""
    try:
        while found := os.read(reading, 3000):  # a little at a time: they wait for it, and for each other
            data += found
    finally:
        os.close(reading)
        for writer in writers:
            writer.kill()
            writer.wait()
    lines = [json.loads(line) for line in data.splitlines()]
    assert len(lines) == 180
    assert all(set(line["text"]) == {line["from"]} for line in lines)


def test_child_that_was_forked_while_lines_wait_writes_its_own() -> None:
    reading, writing = os.pipe()
    sink = Sink(writing)
    for _ in range(20):
        sink.write(b"x" * 10_000 + b"\n")
    if (pid := os.fork()) == 0:
        sink.begin_anew()
        sink.write(b"of the child\n")
        sink.flush(20)
        os._exit(0)
    lines = read_lines(reading, lambda found: len(found) >= 21)
    os.waitpid(pid, 0)
    assert sorted(set(lines)) == [b"of the child", b"x" * 10_000]
    for fd in (reading, writing):
        os.close(fd)


def test_threads_write_whole_lines() -> None:
    reading, writing = os.pipe()
    sink = Sink(writing)
    threads = [
        threading.Thread(target=lambda name=name: [sink.write(name * 5000 + b"\n") for _ in range(40)])
        for name in (b"a", b"b", b"c")
    ]
    for thread in threads:
        thread.start()
    lines = read_lines(reading, lambda found: len(found) >= 120)
    assert {line[:1] * 5000 for line in lines} == set(lines)
    for thread in threads:
        thread.join()
    for fd in (reading, writing):
        os.close(fd)


def test_line_that_is_far_too_long_is_dropped_whole_and_holds_up_nobody(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    told: list[int] = []
    sink = opened(writing, told.append)
    sink.write(b"x" * 6_000_000 + b"\n")
    opened(writing).write(b"of another\n")
    sink.write(b"and on\n")
    assert read_lines(reading, lambda found: len(found) >= 2) == [b"of another", b"and on"]
    assert told == [1]


def test_pipe_of_another_user_holds_up_nobody_either(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    reading, writing = os.pipe()
    sink = opened(writing)
    lines = [b"%06d %s" % (number, b"x" * 3000) for number in range(200)]
    began_s = time.monotonic()
    for line in lines:
        sink.write(line + b"\n")
    assert time.monotonic() - began_s < 5
    assert read_lines(reading, lambda found: len(found) >= len(lines)) == lines
    for fd in (reading, writing):
        os.close(fd)


def test_process_that_can_have_no_thread_keeps_others_from_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reading, writing = os.pipe()
    told: list[int] = []
    sink, other = opened(writing, told.append), opened(writing)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(10):
        sink.write(b"x" * 10_000 + b"\n")
    read_lines(reading, lambda found: len(found) >= 6)
    monkeypatch.undo()
    while select.select([reading], [], [], 0)[0]:
        os.read(reading, 1 << 20)
    other.write(b"of another\n")
    assert os.read(reading, 100) == b"of another\n"
    sink.write(b"and on\n")
    assert read_lines(reading, bool)[0] == b"and on"
    assert sum(told) >= 3
    for fd in (reading, writing):
        os.close(fd)
