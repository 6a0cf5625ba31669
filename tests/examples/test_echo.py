"""The echo example. The demo runs the same file."""

from __future__ import annotations

import pytest

import worker.echo
from tests.examples.harness import ROOT

pytestmark = pytest.mark.anyio


async def test_echo_answers_with_the_query(ask):
    [[answer]] = await ask("examples.echo:handle", "hello")
    assert answer["type"] == "echo"
    assert answer["properties"]["title"] == "hello"


async def test_echo_is_the_file_that_the_demo_runs():
    assert (ROOT / "examples/echo.py").samefile(worker.echo.__file__)
