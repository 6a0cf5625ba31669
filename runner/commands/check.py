"""`em-runner check`: loads the handlers and checks the tokens, without starting a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from runner.reload import check_handlers
from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from shared.config import tokens
from shared.config.load import Agent, Config, worker_specs
from shared.config.nodes import OWN_NODES, NodeAddress
from shared.config.tokens import TokenError
from shared.errors import ConfigError
from shared.logs import logger as logs

_COLUMNS: Final = ("worker", "agent", "node", "handler", "memory", "capabilities", "token")
_UNLIMITED: Final = 10_000

Row = tuple[str, ...]
"""The cells of `_COLUMNS` for one worker."""


def check(config: Config) -> tuple[list[Row], list[str]]:
    """Import every handler, and check every token.

    Returns:
        A row for each worker, and a message for each token that would be refused.

    Raises:
        ConfigError: if a handler cannot be loaded, or a variable for tracing is invalid.
    """
    # Handlers are imported as in a run, in processes of the fork server. None of them can end this
    # command.
    fork_server = ForkServer()
    fork_server.start()
    if config.runner.tracing:
        from shared.tracing import Tracing

        # A tracer reads the variables when it is created, and raises an error for an invalid one.
        # OpenTelemetry logs a warning for a variable that it ignores.
        logs.configure("warning")
        Tracing({}).close(0)
    capabilities = check_handlers(config.agents, Probes(fork_server))
    origins = {agent.name: agent.nodes_origin for agent in config.agents}
    rows: list[Row] = [
        (
            spec.name,
            spec.agent.name,
            _node(spec.node, origins[spec.agent.name]),
            str(spec.agent.handler),
            spec.agent.memory,
            ", ".join(capabilities[spec.agent.name]),
            spec.agent.token.describe(),
        )
        for spec in worker_specs(config)
    ]
    problems = [problem for agent in config.agents for problem in token_problems(agent)]
    return rows, problems


def _node(node: NodeAddress, origin: str) -> str:
    """Return a worker's node, and where it comes from if not from the agent's own keys."""
    return str(node) if origin == OWN_NODES else f"{node} ({origin})"


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """Print a line for each worker. A terminal folds the lines that are too long for it."""
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    # Rich would fold the columns of a wider table to a few characters each, which cannot be read or
    # copied.
    console.width = _UNLIMITED
    console.print(table)


def token_problems(agent: Agent) -> list[str]:
    """Return why em_disco would refuse the agent's token, as far as the token itself shows it."""
    source = agent.token
    where = f"agent {agent.name!r}, token ({source.describe()})"
    try:
        token = source.read(agent.name)
        if token is None:
            return []
        # The signature is not checked, because only the node has the secret.
        problems = tokens.inspect(token).problems(agent.name)
        if source.secret_file is not None:
            # A worker also accepts a shorter secret, but em_disco refuses tokens signed with it.
            secret = tokens.read_secret_file(source.secret_file)
            tokens.require_strong(secret, str(source.secret_file))
    except (TokenError, ConfigError) as exc:
        problems = [str(exc)]
    return [f"{where}: {problem}" for problem in problems]
