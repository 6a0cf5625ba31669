"""Shared by the unit tests: no log lines."""

from __future__ import annotations

import pytest

from tests import logs


@pytest.fixture(autouse=True, scope="package")
def _silent_log():
    """Render no log lines; tests that are about them capture them."""
    with logs.use_processors(logs.drop):
        yield
