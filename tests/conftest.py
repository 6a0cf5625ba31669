"""What all tests share: the event loop that the product runs on, and nodes for the agents."""

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
    """A home folder whose path is short, for the sockets below it: side by side, tests have long ones."""
    with tempfile.TemporaryDirectory(prefix="em-") as folder:
        yield Path(folder)


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port for a node that comes late, or goes and comes back; nobody else is given it."""
    with ports.held_port() as port:
        yield port


@pytest.fixture(autouse=True, scope="session")
def private_files() -> Iterator[None]:
    """What tests write is theirs alone, as files with secrets must be."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.fixture
async def node(anyio_backend: object) -> AsyncIterator[Node]:
    """A node that asks nobody for a token."""
    async with serve(NodeSettings(port=0)) as node:
        yield node


@pytest.fixture
async def other_node(anyio_backend: object) -> AsyncIterator[Node]:
    """A second one."""
    async with serve(NodeSettings(port=0)) as node:
        yield node
