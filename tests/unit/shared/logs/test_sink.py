"""`shared.logs._sink`: lines are whole and in order, and a slow reader delays no writer."""

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

from shared.logs._sink import MAX_WAITING_BYTES, Sink

ROOT = Path(__file__).resolve().parents[4]
Ends = tuple[int, int]


def open_pipe() -> Ends:
    return os.pipe()


def open_socket() -> Ends:
    """Open a socket pair, as journald does."""
    left, right = socket.socketpair()
    return left.detach(), right.detach()


def open_terminal() -> Ends:
    """Open a terminal whose output is not read, as after Ctrl-S."""
    reading, writing = pty.openpty()
    attributes = termios.tcgetattr(writing)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(writing, termios.TCSANOW, attributes)
    return reading, writing


KINDS = [open_pipe, open_socket, open_terminal]


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
    data, ends_s = b"", time.monotonic() + 60
    while not enough(data.split(b"\n")[:-1]):
        assert time.monotonic() < ends_s, data[-200:]
        if select.select([fd], [], [], 0.1)[0]:
            data += os.read(fd, 1 << 20)
    return data.split(b"\n")[:-1]


def test_line_is_written_at_once(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    opened(writing).write(b"one\n")
    assert os.read(reading, 100) == b"one\n"


def test_descriptor_stays_blocking_for_other_processes(ends: Ends, opened: Open) -> None:
    _, writing = ends
    opened(writing).write(b"one\n")
    assert os.get_blocking(writing)


def test_stalled_reader_blocks_no_writer_and_loses_no_buffered_line(
    ends: Ends, opened: Open
) -> None:
    reading, writing = ends
    sink = opened(writing)
    lines = [b"%06d %s" % (number, b"x" * (50 + number % 9000)) for number in range(500)]
    started_s = time.monotonic()
    for line in lines:
        sink.write(line + b"\n")
    assert time.monotonic() - started_s < 30, "a blocking write would never return"
    sink.flush(0.01)
    assert read_lines(reading, lambda found: len(found) >= len(lines)) == lines
    sink.flush(20)
    sink.write(b"at once again\n")
    assert read_lines(reading, bool) == [b"at once again"]


def test_lines_beyond_the_buffer_are_dropped_and_counted(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    dropped: list[int] = []
    sink = opened(writing, dropped.append)
    line_count = 2 * MAX_WAITING_BYTES // 10_000
    for number in range(line_count):
        sink.write(b"%06d %s\n" % (number, b"x" * 10_000))
    found: list[bytes] = []

    def drained(lines: list[bytes]) -> bool:
        return bool(dropped) and len(lines) + dropped[0] >= line_count

    found = read_lines(reading, drained)
    assert len(found) + dropped[0] == line_count
    # The oldest lines are kept.
    assert found == [b"%06d %s" % (number, b"x" * 10_000) for number in range(len(found))]


def test_reader_that_closes_while_lines_wait_blocks_no_writer(ends: Ends, opened: Open) -> None:
    reading, writing = ends
    sink = opened(writing)
    for _ in range(100):
        sink.write(b"x" * 10_000 + b"\n")
    os.close(reading)
    sink.flush(20)
    sink.write(b"without a reader\n")


FULL = """
import resource, sys
from shared.logs._sink import Sink

def room(more_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + more_bytes, resource.RLIM_INFINITY))

dropped = []
sink, size = Sink(2, dropped.append), 0
for number in range(6):
    if number == 1:
        size = 12
        room(5)  # a part of the second line fits, nothing of the next two
    if number == 4:
        room(1000)
    sink.write(b'{"line": %d}\\n' % number)
    sink.flush(20)
print(dropped)
"""


def test_lines_lost_to_a_full_disk_are_counted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab") as stream:
        done = subprocess.run(
            [sys.executable, "-c", FULL],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            timeout=200,
        )
    assert done.stdout == "[3]\n"
    assert log.read_text().splitlines() == ['{"line": 0}', '{"lin', '{"line": 4}', '{"line": 5}']


WRITER = """
import sys
from shared.logs._sink import Sink
sink, name = Sink(2), sys.argv[1].encode()
for number in range(60):
    sink.write(b'{"from": "%b", "text": "%b"}\\n' % (name, name * (4000 if number % 3 else 9)))
sink.flush(20)
"""


def test_lines_of_several_processes_do_not_mix_on_a_pipe() -> None:
    reading, writing = os.pipe()
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], cwd=ROOT, stderr=writing)
        for name in "abc"
    ]
    os.close(writing)
    data = b""
    try:
        # Slow reads, so that the writers wait.
        while found := os.read(reading, 3000):
            data += found
    finally:
        os.close(reading)
        for writer in writers:
            writer.kill()
            writer.wait()
    lines = [json.loads(line) for line in data.splitlines()]
    assert len(lines) == 180
    assert all(set(line["text"]) == {line["from"]} for line in lines)


@pytest.mark.parametrize("mode", ["ab", "wb"])
def test_lines_of_several_processes_do_not_mix_in_a_file(mode: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open(mode) as stream:
        command = [sys.executable, "-c", WRITER]
        writers = [subprocess.Popen([*command, name], cwd=ROOT, stderr=stream) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 180
    assert all(set(line["text"]) == {line["from"]} for line in lines)


def test_forked_child_writes_its_lines_while_the_parents_wait() -> None:
    reading, writing = os.pipe()
    sink = Sink(writing)
    for _ in range(40):
        sink.write(b"x" * 4000 + b"\n")
    if (pid := os.fork()) == 0:
        sink.write(b"child\n")
        sink.flush(20)
        os._exit(0)
    lines = read_lines(reading, lambda found: len(found) >= 41)
    os.waitpid(pid, 0)
    assert sorted(set(lines)) == [b"child", b"x" * 4000]
    for fd in (reading, writing):
        os.close(fd)


def test_threads_write_whole_lines() -> None:
    reading, writing = os.pipe()
    sink = Sink(writing)
    threads = [
        threading.Thread(
            target=lambda name=name: [sink.write(name * 5000 + b"\n") for _ in range(40)]
        )
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


def test_line_over_the_limit_is_dropped_whole_and_blocks_no_writer(
    ends: Ends, opened: Open
) -> None:
    reading, writing = ends
    dropped: list[int] = []
    sink = opened(writing, dropped.append)
    sink.write(b"x" * 6_000_000 + b"\n")
    opened(writing).write(b"another\n")
    sink.write(b"next\n")
    assert read_lines(reading, lambda found: len(found) >= 2) == [b"another", b"next"]
    assert dropped == [1]


def test_full_pipe_of_another_user_blocks_no_writer(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    reading, writing = os.pipe()
    sink = opened(writing)
    lines = [b"%06d %s" % (number, b"x" * 3000) for number in range(200)]
    started_s = time.monotonic()
    for line in lines:
        sink.write(line + b"\n")
    assert time.monotonic() - started_s < 30
    assert read_lines(reading, lambda found: len(found) >= len(lines)) == lines
    for fd in (reading, writing):
        os.close(fd)


def test_sink_that_cannot_start_its_thread_does_not_block_others(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    reading, writing = os.pipe()
    dropped: list[int] = []
    sink, other = opened(writing, dropped.append), opened(writing)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(40):
        sink.write(b"x" * 4000 + b"\n")
    read_lines(reading, lambda found: len(found) >= 6)
    monkeypatch.undo()
    while select.select([reading], [], [], 0)[0]:
        os.read(reading, 1 << 20)
    other.write(b"another\n")
    assert os.read(reading, 100) == b"another\n"
    sink.write(b"next\n")
    assert read_lines(reading, bool)[0] == b"next"
    assert sum(dropped) >= 3
    for fd in (reading, writing):
        os.close(fd)
