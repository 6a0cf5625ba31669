"""What all tests share: the event loop that the product runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(autouse=True, scope="session")
def private_files() -> Iterator[None]:
    """What tests write is theirs alone, as files with secrets must be."""
    before = os.umask(0o077)
    yield
    os.umask(before)
