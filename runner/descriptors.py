"""How many files the runner may have open at once, and for what: the system's limit is shared by all of them."""

from __future__ import annotations

import resource
from typing import Final

from shared.errors import StartError

OWN: Final = 64
"""What the runner needs without a worker or a client: sockets, ZeroMQ, the fork server, some to spare."""

OF_A_WORKER: Final = 4
"""What it keeps open for one worker: its pidfd, the two pipes of its fork, its ZeroMQ connection."""

OF_CLIENTS: Final = 4096
"""What its HTTP clients may have, where the hard limit allows it."""


def needed(workers: int) -> int:
    """Return how many the runner needs for so many workers; what is left of the limit is for HTTP clients."""
    return OWN + OF_A_WORKER * workers


def require(workers: int) -> None:
    """Raise the soft limit to what these workers and the clients may need, if it is lower.

    Raises:
        StartError: when the hard limit is too low for the workers: ZeroMQ would abort, forks would fail.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = needed(workers)
    if hard != resource.RLIM_INFINITY and hard < least:
        raise StartError(
            f"only {hard} files may be open at once, and {workers} workers need {least}; "
            "raise the limit with ulimit -n, or LimitNOFILE in a systemd unit"
        )
    wanted = least + OF_CLIENTS if hard == resource.RLIM_INFINITY else min(least + OF_CLIENTS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
