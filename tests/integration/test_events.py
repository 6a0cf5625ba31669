"""GET / and GET /events for clients that are not browsers, or are hostile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from disco import Node
from runner.web.dashboard import PATHS
from runner.web.dashboard.routes import MAX_STREAMS
from tests.cluster import Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio


async def events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line:
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.message_text
async def test_first_event_has_the_table_and_later_ones_its_changes(
    tmp_path: Path, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), agent("b", ["127.0.0.1:9"])) as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        async with running.http.stream("GET", "/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            stream = events(answer)
            first = await anext(stream)
            assert [row["name"] for row in first["changed"]] == ["a_server", "b_server"]
            assert first["summary"] == "1 of 2 workers ready"
            assert (await running.ask("x", agent="a")).status_code == 200
            async for event in stream:
                changed = {row["name"]: row for row in event["changed"]}
                if changed.get("a_server", {}).get("queries") == "1":
                    break
            # An open stream must not delay the runner's shutdown.
            assert await running.stop() == 0
            await until(lambda: running.process.poll() is not None, "the runner has exited")
            states = {
                row["name"]: row["state"]
                async for event in stream
                for row in event["changed"]
                if "state" in row
            }
            assert states == {"a_server": "stopped", "b_server": "stopped"}


async def test_events_contain_only_the_changed_cells(tmp_path: Path) -> None:
    async with cluster(
        tmp_path, agent("a", ["127.0.0.1:9"]), connection="reconnect_interval_ms = 60000"
    ) as running:
        await running.wait_state("a_server", "backoff")
        async with running.http.stream("GET", "/events") as answer:
            stream = events(answer)
            (whole,) = (await anext(stream))["changed"]
            assert "Connection refused" in whole["last_errors"]
            async for event in stream:
                for cells in event["changed"]:
                    assert cells["name"] == "a_server"
                    assert not {"agent", "node", "state", "reason", "spark", "last_errors"} & set(
                        cells
                    ), cells
                    whole |= cells
                if int(whole["uptime"].removesuffix("s")) >= 3:
                    break


@pytest.mark.message_text
async def test_number_of_streams_is_limited(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        assert (await running.http.head("/events")).status_code == 200
        async with AsyncExitStack() as looking:
            kept = []
            for _ in range(MAX_STREAMS):
                answer = await looking.enter_async_context(running.http.stream("GET", "/events"))
                assert answer.status_code == 200
                kept.append(events(answer))
                await anext(kept[-1])
            refused = await running.http.get("/events")
            assert refused.status_code == 503
            assert refused.json()["code"] == "too_many_streams"
            assert "GET /workers" in refused.json()["error"]
            assert (await running.results("x"))["properties"]["count"] == 1, (
                "streams take no places of queries"
            )

        async def free() -> bool:
            async with running.http.stream("GET", "/events") as answer:
                return answer.status_code == 200

        await until(free, "the place of a closed stream is free")


async def test_page_forbids_content_of_other_origins(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        for path in PATHS:
            answer = await running.http.head(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; ")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert (await running.http.get("/assets/page.html")).status_code == 404
        assert (await running.http.get("/assets/..%2froutes.py")).status_code == 404
        refused = await running.http.get("/", headers={"host": "evil.example"})
        assert refused.status_code == 403


async def test_client_that_reads_no_events_affects_no_other(tmp_path: Path, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url])) as running:
        await running.wait_ready()
        _, writer = await stuck(running)
        try:
            for number in range(1, 50):
                assert (await running.results("x"))["properties"]["count"] == number
            assert await running.stop() == 0
        finally:
            writer.close()


async def stuck(running: Cluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = running.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=1)
    writer.write(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await writer.drain()
    return reader, writer
