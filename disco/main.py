"""A node alone, as `em-runner disco` runs it."""

from __future__ import annotations

import signal
from collections.abc import Callable

import anyio

from disco.node import Node, serve
from disco.settings import NodeSettings
from shared.signals import obeyed


async def run(settings: NodeSettings, *, announce: Callable[[Node], None]) -> None:
    """Serve a node until SIGTERM or SIGINT.

    Args:
        settings: what to serve.
        announce: called once, when agents can connect.

    Raises:
        ConfigError: when the address is open to others without a secret, or the secret is too short.
        StartError: when the address cannot be had.
    """
    over = anyio.Event()
    with obeyed(signal.SIGTERM, signal.SIGINT, by=lambda _: over.set()):
        async with serve(settings) as node:
            announce(node)
            await over.wait()
