"""What the service manager is told: ready, how it stands, alive, leaving. The protocol of sd_notify(3).

Without a service manager that wants to hear (no NOTIFY_SOCKET) nothing is said.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final

import anyio

from runner.table import WorkerRow

LOOK_S: Final = 0.05
"""How often it is looked whether all agents are up, until they are."""

REPORT_S: Final = 5.0
"""How often the status is told after that, at the least."""

_UNDER_WAY: Final = frozenset({"starting", "standby", "connecting", "registering"})


class ServiceManager:
    """The line to systemd, or to nobody.

    Args:
        environ: where it says how it wants to be told. What is found is taken out: it is for no worker.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        for_us = watchdog_us.isdigit() and pid in ("", str(os.getpid()))
        self._watchdog_s = int(watchdog_us) / 1e6 if for_us else None
        self._status = ""

    async def report(self, rows: Callable[[], Sequence[WorkerRow]]) -> None:
        """Say when the agents are up, then how they stand and that the loop runs, until cancelled.

        Args:
            rows: returns the table of workers.
        """
        if not self._address:
            return
        tried: set[str] = set()
        while not _all_up(rows(), tried):
            self._tell_status(rows())
            await anyio.sleep(LOOK_S)
        self._tell("READY=1")
        # Half of the time that the watchdog leaves, as sd_watchdog_enabled(3) says.
        interval_s = REPORT_S if self._watchdog_s is None else min(REPORT_S, self._watchdog_s / 2)
        while True:
            self._tell_status(rows())
            await anyio.sleep(interval_s)

    def leave(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    def _tell_status(self, rows: Sequence[WorkerRow]) -> None:
        ready = sum(row.state == "ready" for row in rows)
        lines = [f"STATUS={ready} of {len(rows)} workers ready"]
        if self._watchdog_s is not None:
            lines.append("WATCHDOG=1")
        elif lines == [self._status]:
            return
        self._status = lines[0]
        self._tell(*lines)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.setblocking(False)
                line.sendto("\n".join(lines).encode(), self._address)
        except OSError:  # it restarts, or its queue is full: the next one comes in a moment
            return


def _all_up(rows: Sequence[WorkerRow], tried: set[str]) -> bool:
    """Return whether every agent has a worker that is ready, or all of its workers have tried to be."""
    tried |= {row.name for row in rows if row.state not in _UNDER_WAY}
    ready = {row.agent for row in rows if row.state == "ready"}
    return all(row.agent in ready or row.name in tried for row in rows)
