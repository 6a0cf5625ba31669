"""The event loop and the nodes of these tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from disco import Node
from shared.config.tokens import Secret
from tests.disco.harness import LIMIT_S, SECRET, node_with


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
async def node(anyio_backend: object) -> AsyncIterator[Node]:
    """A node that requires no token."""
    async with node_with() as node:
        yield node


@pytest.fixture
async def guarded(anyio_backend: object) -> AsyncIterator[Node]:
    """A node that requires tokens."""
    async with node_with(secret=Secret(SECRET)) as node:
        yield node


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `node`."""
    async with httpx.AsyncClient(
        base_url=f"http://{node.address.authority}", timeout=LIMIT_S, trust_env=False
    ) as client:
        yield client
