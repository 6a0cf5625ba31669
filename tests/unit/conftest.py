"""Shared by the unit tests: no log lines, and the settings of hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests import logs

# Two busy cores make a single example slow now and then; that is no failure.
settings.register_profile(
    "unit", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unit")


@pytest.fixture(autouse=True, scope="package")
def _silent_log():
    """Render no log lines; tests that are about them capture them."""
    with logs.use_processors(logs.drop):
        yield
