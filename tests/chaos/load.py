"""Load for the chaos tests: clients that check every response and count every query.

Each query has a unique text. A handler must return `{"type": ..., "properties": {"body": TEXT,
...}}`, so that the response to another query is recognized.
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

HANG_S = 60.0
"""After this time without a response a query hangs. Every timeout in the tests is shorter."""

ECHO = """
import os

def handle(body, memory):
    return {"type": "t", "properties": {"body": body, "pid": os.getpid()}}, memory
"""


class Response(NamedTuple):
    """An HTTP response to a query; `sent_s` and `received_s` are readings of `time.monotonic`."""

    query: str
    status: int
    headers: dict[str, str]
    body: Any
    sent_s: float
    received_s: float

    @property
    def properties(self) -> dict[str, Any]:
        found = self.body["results"]["properties"]
        assert isinstance(found, dict)
        return found

    @property
    def is_correct(self) -> bool:
        """Whether it has the results for its own query."""
        return self.status == 200 and self.properties["body"] == self.query

    @property
    def is_refusal(self) -> bool:
        """Whether it is a complete 503, with `Retry-After` and an error."""
        return (
            self.status == 503
            and self.headers.get("retry-after", "").isdigit()
            and bool(self.body["error"])
        )


class ConnectionLost(Exception):
    """The connection ended before the response; the arguments are the query and `sent_s`."""


class Client:
    """One keep-alive connection. A query on it costs a hundredth of a query with httpx."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader

    async def ask(self, query: str, path: str = "/agent/query") -> Response:
        """Send a query and return the response.

        Raises:
            ConnectionLost: if the connection ended before the response.
            TimeoutError: if there is no response within `HANG_S`.
            OSError: if no connection can be opened.
        """
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        body = json.dumps({"query": query}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: {self._host}\r\ncontent-length: {len(body)}\r\n\r\n"
        sent_s = time.monotonic()
        self._writer.write(head.encode() + body)
        try:
            async with asyncio.timeout(HANG_S):
                status, headers, payload = await self._read_response()
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            self.close()
            raise ConnectionLost(query, sent_s) from exc
        if headers.get("connection") == "close":
            self.close()
        return Response(query, status, headers, json.loads(payload), sent_s, time.monotonic())

    async def _read_response(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.split("\r\n")
        fields = (line.partition(":") for line in lines if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        body = await self._reader.readexactly(int(headers["content-length"]))
        return int(status_line.split()[1]), headers, body

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class HttpLoad:
    """The results of all queries that a group of HTTP clients sent.

    Attributes:
        asked: how many queries were sent.
        answered: how many got the right response.
        statuses: how many responses had each status.
        refused: the complete 503 responses.
        wrong: all other responses.
        lost: the queries whose connection ended before the response, and when each was sent.
        hung: the queries without a response within `HANG_S`.
        took_s: how long each response took.
        on_response: called with each response.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.answered = 0
        self.statuses: Counter[int] = Counter()
        self.refused: list[Response] = []
        self.wrong: list[Response] = []
        self.lost: list[tuple[str, float]] = []
        self.hung: list[str] = []
        self.took_s: list[float] = []
        self.on_response: Callable[[Response], None] = lambda response: None
        self._stopping = False

    def __str__(self) -> str:
        longest_ms = max(self.took_s, default=0) * 1000
        return (
            f"asked {self.asked}, answered {self.answered}, refused {len(self.refused)}, "
            f"wrong {len(self.wrong)}, lost {len(self.lost)}, hung {len(self.hung)}; "
            f"p50 {self.percentile_ms(50):.1f} ms, p99 {self.percentile_ms(99):.1f} ms, "
            f"longest {longest_ms:.0f} ms"
        )

    def percentile_ms(self, percent: int) -> float:
        if len(self.took_s) < 2:
            return 0.0
        return statistics.quantiles(self.took_s, n=100)[percent - 1] * 1000

    def stop(self) -> None:
        """Stop each client after its next response."""
        self._stopping = True

    def assert_nothing_lost(self) -> None:
        """Check that each query got one response: 200 with its own text, or a complete 503."""
        assert not self.hung, f"{len(self.hung)} queries hang"
        assert not self.lost, f"{len(self.lost)} queries got no response"
        assert not self.wrong, f"{len(self.wrong)} wrong responses, such as {self.wrong[0]}"
        assert self.answered + len(self.refused) == self.asked

    async def run(self, client: Client, path: str, queries: Iterator[str], pause_s: float) -> None:
        try:
            while not self._stopping:
                await self._ask(client, path, next(queries))
                if pause_s:
                    await anyio.sleep(pause_s)
        finally:
            client.close()

    async def _ask(self, client: Client, path: str, query: str) -> None:
        try:
            self.asked += 1
            response = await client.ask(query, path)
        except ConnectionLost as exc:
            self.lost.append(exc.args)  # type: ignore[arg-type]
        except TimeoutError:
            self.hung.append(query)
            client.close()
        except OSError:  # the runner no longer listens, so the query was not sent
            self.asked -= 1
            await anyio.sleep(0.01)
        else:
            self._record(response)

    def _record(self, response: Response) -> None:
        self.statuses[response.status] += 1
        self.took_s.append(response.received_s - response.sent_s)
        if response.is_correct:
            self.answered += 1
        elif response.is_refusal:
            self.refused.append(response)
        else:
            self.wrong.append(response)
        self.on_response(response)


async def all_ready(running: Cluster) -> None:
    """Wait until every worker is ready. `Cluster.wait_ready` needs only one of each agent."""

    async def ready() -> bool:
        return all(row["state"] == "ready" for row in (await running.rows()).values())

    await until(ready, "all workers are ready")
    running.record_processes()


async def ask_once(running: Cluster, query: str, path: str = "/agent/query") -> Response:
    """Send one query on a new connection."""
    url = running.http.base_url
    client = Client(url.host, url.port or 80)
    try:
        return await client.ask(query, path)
    finally:
        client.close()


async def ask_all(running: Cluster, queries: list[str], path: str) -> list[Response]:
    """Send several queries at once, and return the responses in the order of their arrival."""
    responses: list[Response] = []

    async def ask(query: str) -> None:
        responses.append(await ask_once(running, query, path))

    async with anyio.create_task_group() as tasks:
        for query in queries:
            tasks.start_soon(ask, query)
    return responses


_load_numbers = itertools.count()


@asynccontextmanager
async def http_load(
    running: Cluster, *paths: str, clients: int = 32, pause_s: float = 0.005
) -> AsyncIterator[HttpLoad]:
    """Send queries until the end of the block, then wait for the last responses.

    Args:
        running: the cluster whose runner gets the queries.
        paths: the paths for the queries; each client uses one of them.
        clients: how many clients send queries at the same time.
        pause_s: how long a client waits after a response.
    """
    load, url = HttpLoad(), running.http.base_url
    failure: BaseException | None = None
    queries = (f"h{next(_load_numbers)}-{number}" for number in itertools.count())
    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            path = (paths or ("/agent/query",))[number % max(len(paths), 1)]
            client = Client(url.host, url.port or 80)
            tasks.start_soon(load.run, client, path, queries, pause_s)
        try:
            yield load
        except BaseException as exc:  # noqa: BLE001 - raised again below
            failure = exc
            tasks.cancel_scope.cancel()
        load.stop()
    if failure is not None:
        raise failure  # itself, not in an exception group


class NodeLoad:
    """The results of all queries that were sent through a node.

    Attributes:
        asked: how many queries were sent.
        answered: how many got the right result.
        empty: how many got no result, because no agent was registered or the agent had none.
        wrong: the queries with another result, and their results.
        longest_s: how long the slowest query took.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.answered = 0
        self.empty = 0
        self.wrong: list[Any] = []
        self.longest_s = 0.0
        self._stopping = False

    def __str__(self) -> str:
        return (
            f"asked {self.asked}, answered {self.answered}, without a result {self.empty}, "
            f"wrong {len(self.wrong)}; longest {self.longest_s * 1000:.0f} ms"
        )

    def stop(self) -> None:
        self._stopping = True

    def assert_nothing_lost(self) -> None:
        """Check each query: if a result is lost, the node waits for it until its timeout."""
        assert not self.wrong, f"{len(self.wrong)} wrong results, such as {self.wrong[0]}"
        assert self.answered + self.empty == self.asked
        assert self.longest_s < 20.0, "the node waited for a result until its timeout"

    async def run(
        self, node: Node, capability: str, queries: Iterator[str], pause_s: float
    ) -> None:
        while not self._stopping:
            query = next(queries)
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
async def node_load(
    node: Node, *capabilities: str, clients: int = 4, pause_s: float = 0.005
) -> AsyncIterator[NodeLoad]:
    """Send queries through a node until the end of the block, then wait for the last results.

    Args:
        node: the node.
        capabilities: the capabilities to ask for; each client uses one of them.
        clients: how many clients send queries at the same time.
        pause_s: how long a client waits after a result.
    """
    load = NodeLoad()
    failure: BaseException | None = None
    queries = (f"n{next(_load_numbers)}-{number}" for number in itertools.count())
    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            capability = capabilities[number % len(capabilities)]
            tasks.start_soon(load.run, node, capability, queries, pause_s)
        try:
            yield load
        except BaseException as exc:  # noqa: BLE001 - raised again below
            failure = exc
            tasks.cancel_scope.cancel()
        load.stop()
    if failure is not None:
        raise failure  # itself, not in an exception group


def report(title: str, *lines: object) -> None:
    """Print what a test measured. Pytest shows it with -s or -rP."""
    for line in lines:
        print(f"[{title}] {line}")
