"""Measures the throughput of direct queries, with `wrk` if it is installed.

Otherwise it uses a generator in Python.
"""

from __future__ import annotations

import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.load_node import WrongAnswer
from benchmarks.raw_http import READ_BYTES, Address, connect, parse, request

PATH: Final = "/agent/query"
QUERY: Final = "x" * 40
_RATE: Final = re.compile(r"Requests/sec:\s+([\d.]+)")
_WRONG: Final = re.compile(r"Non-2xx.*|Socket errors: (?!connect 0, read 0, write 0,).*")


def closed_loop(
    address: Address, connections: int, seconds: int, workers: Sequence[str] = ()
) -> float:
    """Return the number of requests that are answered per second.

    Args:
        address: where the system listens.
        connections: how many requests are in flight at once, one on each connection.
        seconds: how long to measure.
        workers: the workers to query in turn. If empty, the system chooses.

    Raises:
        WrongAnswer: an answer's status is not 200.
    """
    requests = [request(address, PATH, QUERY, worker=each) for each in workers] or [
        request(address, PATH, QUERY)
    ]
    if shutil.which("wrk"):
        return _wrk(address, requests, connections, seconds)
    return _own(address, requests, connections, seconds)


def _wrk(address: Address, requests: Sequence[bytes], connections: int, seconds: int) -> float:
    # The script holds complete requests, so that for each one its Lua only reads a table.
    texts = ", ".join(f"[==[\n{each.decode()}]==]" for each in requests)
    script = (
        f"local n, requests = 0, {{ {texts} }}\n"
        "for i, text in ipairs(requests) do requests[i] = text:gsub('\\r?\\n', '\\r\\n', 5) end\n"
        "request = function() n = n % #requests + 1 return requests[n] end\n"
    )
    with tempfile.TemporaryDirectory(prefix="em-bench-") as folder:
        file = Path(folder) / "query.lua"
        file.write_text(script)
        url = f"http://{address[0]}:{address[1]}{PATH}"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(file), url]
        printed = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 30, check=True
        ).stdout
    rate = _RATE.search(printed)
    if rate is None or _WRONG.search(printed):
        raise WrongAnswer(printed)
    return float(rate[1])


def _own(address: Address, requests: Sequence[bytes], connections: int, seconds: int) -> float:
    poll = select.epoll()
    clients: dict[int, socket.socket] = {}
    unread: dict[int, bytes] = {}
    answered = 0

    def ask(client: socket.socket) -> None:
        client.sendall(requests[answered % len(requests)])

    def open_one() -> None:
        client = connect(address)
        poll.register(client.fileno(), select.EPOLLIN)
        clients[client.fileno()], unread[client.fileno()] = client, b""
        ask(client)

    for _ in range(connections):
        open_one()
    began_s = time.perf_counter()
    while time.perf_counter() < began_s + seconds:
        for fd, _ in poll.poll(0.1):
            data = unread[fd] + clients[fd].recv(READ_BYTES)
            unread[fd] = data
            if (answer := parse(data)) is None:
                continue
            if answer.status != 200:
                raise WrongAnswer(f"answered {answer.status}: {answer.body[:200]!r}")
            answered += 1
            if data.startswith(b"HTTP/1.0"):  # a connection for each request
                poll.unregister(fd)
                clients.pop(fd).close()
                open_one()
            else:
                unread[fd] = data[answer.size :]
                ask(clients[fd])
    took_s = time.perf_counter() - began_s
    poll.close()
    for client in clients.values():
        client.close()
    return answered / took_s
