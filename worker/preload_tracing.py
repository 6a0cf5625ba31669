"""What the fork server imports first if queries are traced, so that no worker has to."""

from __future__ import annotations

import contextlib

import worker.tracing  # noqa: F401 - a worker would import it otherwise
from shared.tracing import warm_up

# If the environment is invalid, each worker reports it. The fork server must start nevertheless.
with contextlib.suppress(Exception):
    warm_up()
