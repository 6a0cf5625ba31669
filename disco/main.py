"""Runs a node alone, for `em-runner disco`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

import anyio

from disco._node import Node, serve
from disco._settings import NodeSettings
from shared.logs.logger import report_suppressed
from shared.signals import handle_signals

_REPORT_INTERVAL_S: Final = 1.0


async def run(settings: NodeSettings, *, announce: Callable[[Node], None]) -> None:
    """Serve a node until SIGTERM or SIGINT arrives.

    Args:
        settings: the settings of the node.
        announce: called once, as soon as agents can connect.

    Raises:
        ConfigError: if the secret is weak, or there is none and others can reach the address.
        StartError: if the address is unavailable.
    """
    stopped = anyio.Event()
    with handle_signals(lambda _: stopped.set(), signal.SIGTERM, signal.SIGINT):
        async with serve(settings) as node:
            announce(node)
            while not stopped.is_set():
                report_suppressed()
                with anyio.move_on_after(_REPORT_INTERVAL_S):
                    await stopped.wait()
