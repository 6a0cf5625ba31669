"""Reports to the service manager that the runner is ready, alive or stopping, and its status.

The protocol is that of sd_notify(3). Without NOTIFY_SOCKET, nothing is sent.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping, Sequence
from typing import Final

import anyio

from runner import table
from runner.table import WorkerRow

CHECK_INTERVAL_S: Final = 0.05
"""How often the table is checked until the start is complete."""

_REPORT_INTERVAL_S: Final = 5.0
"""The longest time between two checks after the start. An unchanged status is not sent."""

_STARTING: Final = frozenset({"starting", "standby", "connecting", "registering"})


class ServiceManager:
    """The connection to systemd, if it started this process.

    Args:
        environ: has systemd's variables. They are removed, because they are not for the workers.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        # A leading @ means an abstract socket, whose name starts with a NUL byte: sd_notify(3).
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # The variables may be inherited from a parent that the watchdog watches instead.
        self._watchdog_s: float | None = None
        if watchdog_us.isdigit() and pid in ("", str(os.getpid())):
            self._watchdog_s = int(watchdog_us) / 1e6
        self._status = ""

    async def report(self, rows: Callable[[], Sequence[WorkerRow]]) -> None:
        """Report that the start is complete, and repeatedly the status and that the loop runs.

        Returns only without a service manager; otherwise it runs until cancelled.

        Args:
            rows: returns the table of workers.
        """
        if not self._address:
            return
        tried: set[str] = set()
        while not (_is_start_complete(rows(), tried) and self._send("READY=1")):
            self._report_status(rows())
            await anyio.sleep(CHECK_INTERVAL_S)
        interval_s = _REPORT_INTERVAL_S
        if self._watchdog_s is not None:
            # Half of the watchdog's time, as sd_watchdog_enabled(3) recommends.
            interval_s = min(interval_s, self._watchdog_s / 2)
        while True:
            self._report_status(rows())
            await anyio.sleep(interval_s)

    def report_stopping(self) -> None:
        """Report that the runner is stopping."""
        self._send("STOPPING=1")

    def _report_status(self, rows: Sequence[WorkerRow]) -> None:
        status = f"STATUS={table.summary([row.state for row in rows])}"
        # The watchdog needs each report, also if the status is the same.
        if self._watchdog_s is not None:
            self._send(f"{status}\nWATCHDOG=1")
        elif status != self._status and self._send(status):
            self._status = status

    def _send(self, message: str) -> bool:
        """Send a message if there is a service manager. Return whether it was sent."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                # A full queue must not block the event loop.
                notify.setblocking(False)
                notify.sendto(message.encode(), self._address)
        except OSError:  # systemd is restarting, or its queue is full
            return False
        return True


def _is_start_complete(rows: Sequence[WorkerRow], tried: set[str]) -> bool:
    """Return whether each agent has a ready worker, or all its workers have tried to connect.

    Args:
        rows: the table of workers.
        tried: the names of the workers that have tried. New ones are added.
    """
    # One attempt is enough. Otherwise, a node that is down would keep systemd waiting until it
    # kills the runner, although the agents at other nodes work.
    tried |= {row.name for row in rows if row.state not in _STARTING}
    ready = {row.agent for row in rows if row.state == "ready"}
    return all(row.agent in ready or row.name in tried for row in rows)
