"""Fixtures of all tests: the event loop that em-runner uses, nodes, a port and a home folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from disco import Node, NodeSettings, serve
from tests import ports


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder with a short path, because `tmp_path` can be too long for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        yield Path(folder)


@pytest.fixture
def reserved_port() -> Iterator[int]:
    """A port for a node that starts late or restarts. No other process gets it in between."""
    with ports.reserved_port() as port:
        yield port


@pytest.fixture(autouse=True, scope="session")
def private_files() -> Iterator[None]:
    """Create files that only their owner can read: em-runner refuses other secret files."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
async def node(anyio_backend: object) -> AsyncIterator[Node]:
    """A node that accepts agents without a token."""
    async with serve(NodeSettings(port=0)) as node:
        yield node


@pytest.fixture
async def other_node(anyio_backend: object) -> AsyncIterator[Node]:
    """A second node that accepts agents without a token."""
    async with serve(NodeSettings(port=0)) as node:
        yield node
