"""The demo: embedded nodes that ask for tokens, and the echo agent with minted ones, in one command."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import disco
from runner import start
from shared.config import Agent, Config, HttpAddress
from shared.errors import ConfigError, StartError
from shared.handlers import HandlerRef
from shared.nodes import NodeAddress
from shared.tokens import Secret, TokenSource, read_secret_file

AGENT: Final = "echo"
CAPABILITIES: Final = ("search", "query", "echo")
HOST: Final = "127.0.0.1"


def run(http: HttpAddress, ports: Sequence[int], state_dir: Path, on_started: start.OnStarted) -> None:
    """Run the demo until SIGTERM or SIGINT: a node on each of `ports`, a worker at each node.

    Raises:
        StartError: when a port or the state folder is in use.
    """
    secret_file = _secret_file(state_dir)
    secret = Secret(read_secret_file(secret_file))
    config = Config(
        agents=(
            Agent(
                name=AGENT,
                handler=HandlerRef("worker.echo", None, "handle", state_dir),
                capabilities=CAPABILITIES,
                nodes=tuple(NodeAddress(HOST, port, False) for port in ports),
                token=TokenSource(secret_file=secret_file),
            ),
        ),
        http=http,
        state_dir=state_dir,
    )

    @asynccontextmanager
    async def nodes() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for port in ports:
                await stack.enter_async_context(disco.serve(_node(port, secret)))
            yield

    start.run(config, on_started=on_started, around=nodes)


def _node(port: int, secret: Secret) -> disco.NodeSettings:
    hint = "choose other ports for the nodes with --first-port (0 takes any free ones)"
    return disco.NodeSettings(host=HOST, port=port, secret=secret, port_hint=hint)


def ports(first: int, count: int) -> list[int]:
    """Return the nodes' ports: `count` of them from `first` on, or any free ones when that is 0.

    Raises:
        ConfigError: when they go past 65535.
    """
    if first == 0:
        with ExitStack() as held:
            return [held.enter_context(_any_port()).getsockname()[1] for _ in range(count)]
    if first + count - 1 > 65535:
        raise ConfigError(f"--first-port: {count} nodes from {first} on go past port 65535")
    return list(range(first, first + count))


def _any_port() -> socket.socket:
    return socket.create_server((HOST, 0))


def _secret_file(state_dir: Path) -> Path:
    """Return the file of the demo's secret, made at its first start and kept, so that tokens stay good."""
    path = state_dir / "demo.secret"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists() or not path.stat().st_size:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
    except OSError as exc:
        raise StartError(f"the state folder {state_dir} cannot be used: {exc.strerror}") from None
    return path
