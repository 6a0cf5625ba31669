"""An agent that calls a search service over HTTP.

It sends `GET <address>?q=<query>` and expects a JSON list of objects. It uses their "url", "title"
and "summary". For a service with another format, change `_embryo`. If the service fails or is too
slow, the result is empty.

    [[agent]]
    name = "http_api"
    handler = "examples.http_api:HttpApi"
    memory = "none"
    concurrency = 16          # this many queries wait for the service at once

The environment names the service:

    SEARCH_API_URL          its address, such as http://127.0.0.1:8000/search
    SEARCH_API_TIMEOUT_S    the timeout for a query, by default 4 (an em_disco node waits 5 s)

Needs httpx.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

import httpx

log = logging.getLogger(__name__)

Embryo = dict[str, Any]


class HttpApi:
    """One worker's client of the service.

    `setup` runs before the first query, and `close` after the last.
    """

    def capabilities(self) -> list[str]:
        """Return the capabilities to announce to the node, unless the configuration sets them."""
        return ["search", "query"]

    async def setup(self) -> None:
        """Open one client for all queries, so that connections are reused."""
        self._url = os.environ.get("SEARCH_API_URL", "")
        if not self._url:
            raise RuntimeError("SEARCH_API_URL is not set; it is the address of the search service")
        self._timeout_s = float(os.environ.get("SEARCH_API_TIMEOUT_S", "4"))
        self._client = httpx.AsyncClient(timeout=None)  # _search bounds the whole request instead

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def handle(
        self, body: str, memory: dict[str, Any]
    ) -> tuple[list[Embryo], dict[str, Any]]:
        """Return the results of the service, or an empty list if it fails."""
        try:
            return [_embryo(item) for item in await self._search(body)], memory
        except (httpx.HTTPError, TimeoutError, ValueError) as exc:
            # Log neither the query nor the address: both may contain confidential data.
            status = exc.response.status_code if isinstance(exc, httpx.HTTPStatusError) else None
            log.warning("no results from the search service: %s", status or type(exc).__name__)
            return [], memory

    async def _search(self, query: str) -> list[Embryo]:
        # httpx's timeouts apply to each read, and a slow answer may need many reads.
        async with asyncio.timeout(self._timeout_s):
            response = await self._client.get(self._url, params={"q": query})
        response.raise_for_status()
        found = response.json()
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise ValueError("expected a list of objects")
        return found


def _embryo(item: dict[str, Any]) -> Embryo:
    return {
        "type": "url",
        "properties": {
            "url": item.get("url"),
            "title": item.get("title"),
            "resume": item.get("summary"),
        },
    }
