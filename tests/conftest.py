"""Shared by all tests: the event loop, nodes, a port, a home folder, settings of hypothesis."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from disco import Node, NodeSettings, serve
from tests import ports

# On a busy machine a single example may be slow. That is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


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


# On a busy machine a query may take longer than a node's default timeout.
PATIENT = NodeSettings(port=0, query_timeout_ms=30_000)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Accept Ctrl-C, and have child processes accept it: a shell's background job ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
async def node(anyio_backend: object) -> AsyncIterator[Node]:
    """A node that accepts agents without a token."""
    async with serve(PATIENT) as node:
        yield node


@pytest.fixture
async def other_node(anyio_backend: object) -> AsyncIterator[Node]:
    """A second node that accepts agents without a token."""
    async with serve(PATIENT) as node:
        yield node
