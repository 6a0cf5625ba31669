"""Nodes for the tests against real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from disco import Node, NodeSettings, serve


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
