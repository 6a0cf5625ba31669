"""Load for the chaos tests: clients that check every answer, and account for every query.

A query's text is unique, and whatever handler answers must return `{"type": ..., "properties":
{"body": <the text>, ...}}`: an answer to another query is seen as such.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio

from disco import Node
from tests.cluster import Cluster, until

HANG_S = 10.0
"""A query without an answer for so long hangs; longer than any time-out of the tests that use this."""

ECHO = """
import os

def handle(body, memory):
    return {"type": "t", "properties": {"body": body, "pid": os.getpid()}}, memory
"""


class Answer(NamedTuple):
    """One answer over HTTP; `sent_s` and `came_s` are `time.monotonic`'s."""

    query: str
    status: int
    headers: dict[str, str]
    body: Any
    sent_s: float
    came_s: float

    @property
    def properties(self) -> dict[str, Any]:
        found = self.body["results"]["properties"]
        assert isinstance(found, dict)
        return found

    @property
    def right(self) -> bool:
        return self.status == 200 and self.properties["body"] == self.query

    @property
    def honest_refusal(self) -> bool:
        return self.status == 503 and self.headers.get("retry-after", "").isdigit() and bool(self.body["error"])


class Lost(Exception):
    """The connection ended before the answer came."""


class Client:
    """One keep-alive connection, a hundred times lighter than httpx."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader

    async def ask(self, query: str, path: str = "/agent/query") -> Answer:
        """Raises: Lost; TimeoutError; OSError when there is no connection to be had."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._place)
        body = json.dumps({"query": query}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._place[0]}\r\ncontent-length: {len(body)}\r\n\r\n"
        sent_s = time.monotonic()
        self._writer.write(head.encode() + body)
        try:
            async with asyncio.timeout(HANG_S):
                status, headers, payload = await self._answer()
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            self.close()
            raise Lost(query, sent_s) from exc
        if headers.get("connection") == "close":
            self.close()
        return Answer(query, status, headers, json.loads(payload), sent_s, time.monotonic())

    async def _answer(self) -> tuple[int, dict[str, str], bytes]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        return int(lines[0].split()[1]), headers, await self._reader.readexactly(int(headers["content-length"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class HttpLoad:
    """What became of every query of some HTTP clients."""

    def __init__(self) -> None:
        self.asked = 0
        self.right = 0
        self.statuses: Counter[int] = Counter()
        self.refused: list[Answer] = []
        self.wrong: list[Answer] = []
        self.lost: list[tuple[str, float]] = []
        self.hung: list[str] = []
        self.took_s: list[float] = []
        self.watch: Callable[[Answer], None] = lambda answer: None
        self._stopping = False

    def __str__(self) -> str:
        return (
            f"asked {self.asked}, answered {self.right}, refused {len(self.refused)}, wrong {len(self.wrong)}, "
            f"lost {len(self.lost)}, hung {len(self.hung)}; p50 {self.percentile_ms(50):.1f} ms, "
            f"p99 {self.percentile_ms(99):.1f} ms, longest {max(self.took_s, default=0) * 1000:.0f} ms"
        )

    def percentile_ms(self, percent: int) -> float:
        if len(self.took_s) < 2:
            return 0.0
        return statistics.quantiles(self.took_s, n=100)[percent - 1] * 1000

    def stop(self) -> None:
        """Have every client leave after the answer that it waits for."""
        self._stopping = True

    def assert_nothing_lost(self) -> None:
        """Each query had exactly one answer, 200 with its own text or an honest 503."""
        assert not self.hung, f"{len(self.hung)} hang"
        assert not self.lost, f"{len(self.lost)} had no answer"
        assert not self.wrong, f"{len(self.wrong)} wrong, such as {self.wrong[0]}"
        assert self.right + len(self.refused) == self.asked

    async def run(self, client: Client, path: str, names: Iterator[str], pause_s: float) -> None:
        try:
            while not self._stopping:
                await self._ask(client, path, next(names))
                if pause_s:
                    await anyio.sleep(pause_s)
        finally:
            client.close()

    async def _ask(self, client: Client, path: str, query: str) -> None:
        try:
            self.asked += 1
            answer = await client.ask(query, path)
        except Lost as exc:
            self.lost.append(exc.args)  # type: ignore[arg-type]
        except TimeoutError:
            self.hung.append(query)
            client.close()
        except OSError:  # nobody listens any more: nothing was sent
            self.asked -= 1
            await anyio.sleep(0.01)
        else:
            self._account(answer)

    def _account(self, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        self.took_s.append(answer.came_s - answer.sent_s)
        if answer.right:
            self.right += 1
        elif answer.honest_refusal:
            self.refused.append(answer)
        else:
            self.wrong.append(answer)
        self.watch(answer)


async def all_ready(running: Cluster) -> None:
    """Wait until every worker is ready, not only one of each agent."""

    async def ready() -> bool:
        return all(row["state"] == "ready" for row in (await running.rows()).values())

    await until(ready, "all workers are ready")
    running.note_processes()


async def ask_once(running: Cluster, query: str, path: str = "/agent/query") -> Answer:
    """Ask one query on a connection of its own."""
    url = running.http.base_url
    client = Client(url.host, url.port or 80)
    try:
        return await client.ask(query, path)
    finally:
        client.close()


async def ask_all(running: Cluster, queries: list[str], path: str) -> list[Answer]:
    """Ask several at once; the answers are in the order in which they came."""
    answers: list[Answer] = []

    async def ask(query: str) -> None:
        answers.append(await ask_once(running, query, path))

    async with anyio.create_task_group() as tasks:
        for query in queries:
            tasks.start_soon(ask, query)
    return answers


_loads = itertools.count()


@asynccontextmanager
async def http_load(
    running: Cluster, *paths: str, clients: int = 32, pause_s: float = 0.005
) -> AsyncIterator[HttpLoad]:
    """Keep asking from `clients` connections, shared out over `paths`; all has been answered after it."""
    load, url = HttpLoad(), running.http.base_url
    failure: BaseException | None = None
    names = (f"h{next(_loads)}-{number}" for number in itertools.count())
    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            path = (paths or ("/agent/query",))[number % max(len(paths), 1)]
            tasks.start_soon(load.run, Client(url.host, url.port or 80), path, names, pause_s)
        try:
            yield load
        except BaseException as exc:  # noqa: BLE001 - raised again below
            failure = exc
            tasks.cancel_scope.cancel()
        load.stop()
    if failure is not None:
        raise failure  # as it is, not in a group


class NodeLoad:
    """What became of every query of some askers of a node. `slow_s` would mean that an answer was lost."""

    def __init__(self) -> None:
        self.asked = 0
        self.answered = 0
        self.empty = 0
        self.wrong: list[Any] = []
        self.longest_s = 0.0
        self._stopping = False

    def __str__(self) -> str:
        return (
            f"asked {self.asked}, answered {self.answered}, null or nobody there {self.empty}, "
            f"wrong {len(self.wrong)}; longest {self.longest_s * 1000:.0f} ms"
        )

    def stop(self) -> None:
        self._stopping = True

    def assert_nothing_lost(self) -> None:
        """Each query ended at once: a node waits for whom it asked, so a lost answer would cost its time-out."""
        assert not self.wrong, f"{len(self.wrong)} wrong, such as {self.wrong[0]}"
        assert self.answered + self.empty == self.asked
        assert self.longest_s < 4.0, "the node waited in vain"

    async def run(self, node: Node, capability: str, names: Iterator[str], pause_s: float) -> None:
        while not self._stopping:
            query = next(names)
            began_s = time.monotonic()
            self.asked += 1
            found = await node.query(query, [capability])
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            if not found:
                self.empty += 1
            elif all(item["properties"]["body"] == query for item in found):
                self.answered += 1
            else:
                self.wrong.append((query, found))
            await anyio.sleep(pause_s)


@asynccontextmanager
async def node_load(node: Node, *capabilities: str, askers: int = 4, pause_s: float = 0.005) -> AsyncIterator[NodeLoad]:
    """Keep asking agents by way of their node."""
    load = NodeLoad()
    failure: BaseException | None = None
    names = (f"n{next(_loads)}-{number}" for number in itertools.count())
    async with anyio.create_task_group() as tasks:
        for number in range(askers):
            tasks.start_soon(load.run, node, capabilities[number % len(capabilities)], names, pause_s)
        try:
            yield load
        except BaseException as exc:  # noqa: BLE001 - raised again below
            failure = exc
            tasks.cancel_scope.cancel()
        load.stop()
    if failure is not None:
        raise failure  # as it is, not in a group


def report(title: str, *lines: object) -> None:
    """Print what a test measured: pytest shows it with -s or -rP."""
    for line in lines:
        print(f"[{title}] {line}")
