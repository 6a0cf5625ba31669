"""The demo: embedded nodes that require tokens, and the echo agent, which mints its tokens."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import disco
from runner import start
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, Config, HttpAddress
from shared.config.nodes import DEFAULT_HOST, NodeAddress
from shared.config.schema import RunnerSection
from shared.config.tokens import Secret, TokenSource, read_secret_file
from shared.errors import ConfigError, StartError


def run(
    http: HttpAddress,
    first_port: int,
    count: int,
    state_dir: Path,
    on_started: Callable[[Sequence[NodeAddress], HttpAddress], None],
) -> None:
    """Run the demo until SIGTERM or SIGINT: several nodes, with one worker each.

    Args:
        http: the address of the runner's HTTP server.
        first_port: the first node's port, 0 for free ones.
        count: the number of nodes.
        state_dir: the state folder.
        on_started: called with the addresses of the nodes and of the HTTP server.

    Raises:
        ConfigError: if a port would be above 65535.
        StartError: if a port or the state folder is in use.
    """
    ports = _ports(first_port, count)
    addresses = tuple(NodeAddress(DEFAULT_HOST, port, False) for port in ports)
    secret_file = _secret_file(state_dir)
    secret = Secret(read_secret_file(secret_file))
    echo = Agent(
        name="echo",
        handler=HandlerRef("worker.echo", None, "handle", state_dir),
        capabilities=("search", "query", "echo"),
        nodes=addresses,
        token=TokenSource(secret_file=secret_file),
    )
    config = Config(
        agents=(echo,),
        runner=RunnerSection(http=str(http), state_dir=state_dir),
    )

    @asynccontextmanager
    async def nodes() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # In the runner's own process and event loop, and before its workers connect.
            for port in ports:
                await stack.enter_async_context(disco.serve(_node(port, secret)))
            yield

    start.run(config, on_started=partial(on_started, addresses), lifespan=nodes)


def _node(port: int, secret: Secret) -> disco.NodeSettings:
    hint = "choose other ports for the nodes with --first-port (0 takes any free ones)"
    return disco.NodeSettings(
        port=port,
        secret=secret,
        port_hint=hint,
    )


def _ports(first: int, count: int) -> list[int]:
    """Return the nodes' ports: `count` of them, from `first` on, or any free ones if that is 0.

    Raises:
        ConfigError: if the last one would be above 65535.
    """
    if first + count > 65536:
        raise ConfigError(f"--first-port: {count} nodes from {first} on exceed port 65535")
    if first:
        return list(range(first, first + count))
    # All sockets stay open until the last one has its port, or the kernel could give one twice.
    with ExitStack() as sockets:
        ports = []
        for _ in range(count):
            server = sockets.enter_context(socket.create_server((DEFAULT_HOST, 0)))
            ports.append(server.getsockname()[1])
        return ports


def _secret_file(state_dir: Path) -> Path:
    """Return the file of the demo's secret, which its first start creates."""
    path = state_dir / "demo.secret"
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Kept, so that a token from `em-runner token` stays valid. A start on a full disk may have
        # left the file empty.
        if not path.exists() or not path.stat().st_size:
            # With its mode from the start: with `chmod`, others could read it for a moment.
            created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(created, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
    except OSError as exc:
        raise StartError(f"the state folder {state_dir} cannot be used: {exc.strerror}") from None
    return path
