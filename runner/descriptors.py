"""How many file descriptors the runner needs: workers and HTTP clients share the system's limit."""

from __future__ import annotations

import resource
from typing import Final

from shared.errors import StartError
from shared.http.limits import HttpLimits

_BASE: Final = 64
"""For the runner without workers and clients: sockets, ZeroMQ, the fork server, and a reserve."""

_PER_WORKER: Final = 4
"""For one worker: its pidfd, the two pipes of its fork, and its ZeroMQ connection."""

_CLIENTS: Final = HttpLimits().max_connections
"""For HTTP clients, if the hard limit allows that many."""


def needed(workers: int) -> int:
    """Return how many the runner and these workers need. The rest of the limit is for clients."""
    return _BASE + _PER_WORKER * workers


def raise_limit(workers: int) -> None:
    """Raise the soft limit to what these workers and the clients may need, if it is lower.

    Raises:
        StartError: if the hard limit is too low for the workers.
    """
    # Linux has no infinite limit of this kind: `fs.nr_open` bounds it.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = needed(workers)
    # Refuse now, because later ZeroMQ would abort the process, and forks would fail.
    if hard < least:
        raise StartError(
            f"only {hard} files may be open at once, and {workers} workers need {least}; "
            "raise the limit with ulimit -n, or LimitNOFILE in a systemd unit"
        )
    wanted = min(least + _CLIENTS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
