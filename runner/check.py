"""What `em-runner check` finds out: everything that can be known before the first worker runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from runner.process import ForkServer
from runner.reload import check_handlers
from shared import logs, tokens
from shared.config import Agent, Config, WorkerSpec, worker_specs
from shared.nodes import OWN_NODES
from shared.tokens import TokenError, TokenSource

_COLUMNS: Final = ("worker", "agent", "node", "handler", "memory", "capabilities", "token")
_ANY: Final = 10_000


class Report(NamedTuple):
    """A row for each worker that would run, and what would go wrong, in words."""

    rows: Sequence[tuple[str, ...]]
    problems: list[str]


def check(config: Config) -> Report:
    """Import every handler and look at every token.

    Raises:
        ConfigError: when a handler cannot be loaded, or tracing not begin.
    """
    fork_server = ForkServer()
    fork_server.start()
    if config.tracing:
        from shared.tracing import Tracing

        logs.configure("warning")  # where its library says what it makes of the environment's variables
        Tracing({}).close(0)
    capabilities = check_handlers(config.agents, fork_server)
    rows = [
        (
            spec.name,
            spec.agent.name,
            _node(spec),
            str(spec.agent.handler),
            spec.agent.memory,
            ", ".join(capabilities[spec.agent.name]),
            spec.agent.token.describe(),
        )
        for spec in worker_specs(config)
    ]
    return Report(rows, [problem for agent in config.agents for problem in token_problems(agent)])


def _node(spec: WorkerSpec) -> str:
    """Return a worker's node, and where it was found if the agent does not name it itself."""
    origin = spec.agent.nodes_origin
    return str(spec.node) if origin == OWN_NODES else f"{spec.node} ({origin})"


def show(rows: Sequence[tuple[str, ...]], console: Console) -> None:
    """Print the workers: a line for each, or a paragraph where a terminal is too narrow for lines."""
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    wanted = Measurement.get(console, console.options.update(max_width=_ANY), table).maximum
    if not console.is_terminal or wanted <= console.width:
        console.print(table)
        return
    for name, *cells in rows:
        paragraph = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
        paragraph.add_column()
        paragraph.add_column(overflow="fold")
        for heading, cell in zip(_COLUMNS[1:], cells, strict=True):
            paragraph.add_row(heading, Text(cell))
        console.print(Text(name, style="bold"), paragraph, sep="\n")


def token_problems(agent: Agent) -> list[str]:
    """Return why em_disco would refuse the agent's token, as far as can be seen without its secret."""
    where = f"agent {agent.name!r}, token ({agent.token.describe()})"
    try:
        token = agent.token.read(agent.name)
        if token is None:
            return []
        if agent.token.secret_file is not None:
            return _secret_problems(agent.token, where)
        return [f"{where}: {problem}" for problem in tokens.inspect(token).problems(agent.name)]
    except TokenError as exc:
        return [f"{where}: {exc}"]


def _secret_problems(source: TokenSource, where: str) -> list[str]:
    assert source.secret_file is not None
    size = len(tokens.read_secret_file(source.secret_file).encode())
    if size >= tokens.MIN_SECRET_BYTES:
        return []
    return [f"{where}: the secret has {size} bytes, at least {tokens.MIN_SECRET_BYTES} are needed for HS256"]
