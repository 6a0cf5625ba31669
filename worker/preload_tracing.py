"""What the fork server imports before all else where queries are traced, so that no worker has to."""

from __future__ import annotations

import contextlib

import worker.tracing  # noqa: F401 - a worker would import it otherwise
from shared.tracing import rehearse

with contextlib.suppress(Exception):  # what is wrong with the environment is a worker's to say
    rehearse()
