"""The `em-runner` command. Each subcommand reads its options, calls a function, and prints."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import anyio
import typer
from rich.console import Console

from runner import version
from runner.commands import client
from shared.config import tokens
from shared.config.load import Config, HttpAddress, load, parse_http_address
from shared.config.nodes import DEFAULT_HOST, DEFAULT_PORT, NodeAddress
from shared.config.schema import (
    DEFAULT_HTTP,
    DEFAULT_STATE_DIR,
    RunnerSection,
    SupervisionSection,
)
from shared.config.tokens import Secret, TokenError
from shared.errors import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_HANDLER_FAILED,
    CommandError,
    ConfigError,
    StartError,
)
from shared.logs import logger as logs
from shared.logs.logger import LogFormat, LogLevel

# Modules that only some commands need are imported in these commands' functions. Otherwise
# `em-runner token` would wait for the imports of the whole runner.

cli = typer.Typer(
    name="em-runner",
    help="Runs Emergence agents: one supervised process per em_disco node, and direct queries "
    "over HTTP.",
    no_args_is_help=True,
    # Typer's tracebacks show local variables, which may contain tokens and secrets.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Rich fits its output to the width of a terminal, and to 80 columns elsewhere. Programs that read
# a pipe or a file need whole lines.
_on_terminal: Final = sys.stdout is not None and sys.stdout.isatty()
_out: Final = Console(
    soft_wrap=True,
    highlight=False,
    markup=False,
    emoji=False,
    width=None if _on_terminal else 10_000,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"em-runner {version()}")
        raise typer.Exit


def _check_url(text: str | None) -> str | None:
    # A callback, because click replaces the message of a parser's ValueError by its own.
    try:
        return None if text is None else client.parse_url(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


_DEFAULT_CONFIG: Final = Path("em-runner.toml")
# The runner answers 504 after its own timeout. That answer should arrive.
_QUERY_TIMEOUT_S: Final = RunnerSection().query_timeout_ms / 1000 + 5

# The options that several commands have.
_ConfigFile = Annotated[
    Path,
    typer.Option("--config", "-c", help="The configuration, a TOML file."),
]
_StateDir = Annotated[
    Path,
    typer.Option(help="The runner's state folder."),
]
_RunnerUrl = Annotated[
    str | None,
    typer.Option(
        "--url",
        callback=_check_url,
        help=f"The runner's address, such as {client.EXAMPLE_URL}.",
    ),
]
_TokenFile = Annotated[
    Path | None,
    typer.Option(help="A file that contains the runner's HTTP token."),
]


def main() -> None:
    """Run the command line.

    An error that the user can fix is one line on standard error, without a traceback.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            # A character that the terminal's encoding lacks must not be an error. A stream may also
            # be None, or a test's replacement that cannot be reconfigured.
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            cli()
        finally:
            # Python itself would flush after the `except` clauses below, and report a failure with
            # a traceback.
            if sys.stdout is not None:
                sys.stdout.flush()
    except ConfigError as exc:
        _fail(str(exc), EXIT_CONFIG)
    except (StartError, CommandError, TokenError) as exc:
        _fail(str(exc), EXIT_FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as exc:
        if exc.filename is not None:
            _fail(f"{exc.filename}: {exc.strerror}", EXIT_FAILED)
        # Only `os.getcwd` raises this error without a name.
        if isinstance(exc, FileNotFoundError):
            _fail("the current folder does not exist; change to another one", EXIT_FAILED)
        # All other errors are of the command's output: its reader has closed the pipe, as in
        # `em-runner check | head`, or it is redirected to a full disk.
        _discard_output()
        _fail(f"cannot write the output: {exc.strerror or exc}", EXIT_FAILED)


def _discard_output() -> None:
    """Discard output that could not be written. Otherwise Python tries again when it exits."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(message: str, status: int) -> NoReturn:
    # Standard error may be closed, too. The exit status still reports the failure.
    with contextlib.suppress(OSError):
        print(f"em-runner: {logs.printable_line(message)}", file=sys.stderr)
    sys.exit(status)


@cli.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Options before a command."""


@cli.command("run")
def _run(
    config: _ConfigFile = _DEFAULT_CONFIG,
    http: Annotated[
        str | None,
        typer.Option(help="Listen at this HOST:PORT instead; port 0 takes any free port."),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Use this state folder instead of the configured one.")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--reload", help="For development: watch files, and replace workers when they change."
        ),
    ] = False,
) -> None:
    """Run the agents of a configuration until SIGTERM or Ctrl-C. SIGHUP reloads the configuration.

    With --reload, a change of a Python file in a handler's folder, or below it, replaces the
    handler's workers. They keep their memory, and no direct query is lost. While the new code is
    broken, the old workers answer. A change of the configuration is applied as by em-runner reload.

    Example: em-runner run -c em-runner.toml
    """
    from runner import start

    def read() -> Config:
        return _with_options(load(config), http, state_dir)

    # An error in the first reading is a line for the user. Errors in later ones are log events.
    loaded = read()
    logs.configure(loaded.runner.log_level, loaded.runner.log_format)
    start.run(loaded, read_config=read, watched_file=config if watch else None)


@cli.command("reload")
def _reload(state_dir: _StateDir = Path(DEFAULT_STATE_DIR)) -> None:
    """Reload the configuration of a running runner, and print what changed.

    Exit status: 0 on success, 78 if the configuration is invalid, 1 if no runner answers, if it
    cannot reload now, or if some workers could not be replaced.

    Example: em-runner reload --state-dir ~/.local/state/em-runner
    """
    outcome = client.reload(state_dir.expanduser())
    if outcome.result != "done":
        _fail(outcome.message, EXIT_CONFIG if outcome.result == "invalid" else EXIT_FAILED)
    print(outcome.message)


@cli.command("check")
def _check(config: _ConfigFile = _DEFAULT_CONFIG) -> None:
    """Load a configuration, import its handlers, check its tokens, and print its workers.

    Exit status: 0 on success, 1 if a token would be refused, 78 if the configuration is invalid.

    Example: em-runner check -c em-runner.toml
    """
    from runner.commands import check

    rows, problems = check.check(load(config))
    check.print_rows(rows, _out)
    for problem in problems:
        print(f"em-runner: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(EXIT_FAILED)
    plural = "s" if len(rows) != 1 else ""
    _out.print(f"{config}: OK, {len(rows)} worker{plural}")


@cli.command("demo")
def _demo(
    nodes: Annotated[
        int,
        typer.Option(min=1, max=100, help="The number of embedded nodes."),
    ] = 2,
    first_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="The first node's port; the others follow. 0 takes free ports.",
        ),
    ] = DEFAULT_PORT,
    http: Annotated[
        str,
        typer.Option(
            help="The runner's address on this machine, as HOST:PORT; port 0 takes any free port."
        ),
    ] = DEFAULT_HTTP,
    state_dir: _StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Run embedded em_disco nodes and the echo agent with one worker per node, all on this machine.

    Example: em-runner demo --nodes 2
    """
    from runner.commands import demo

    logs.configure()
    address = parse_http_address(http, "--http")
    if not address.loopback:
        # Without a token, anyone in the network could query the agent.
        raise ConfigError(
            f"--http: the demo has no HTTP token, so it cannot listen on {address}; use a loopback "
            "address"
        )
    demo.run(address, first_port, nodes, state_dir.expanduser(), _welcome)


@cli.command("disco")
def _disco(
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 takes any free port.")
    ] = DEFAULT_PORT,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = DEFAULT_HOST,
    jwt_secret_file: Annotated[
        Path | None, typer.Option(help="A file with the secret that signs the tokens.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Require no token (loopback only).")
    ] = False,
    log_level: Annotated[
        LogLevel,
        typer.Option(help="The least severe level that is logged."),
    ] = logs.DEFAULT_LEVEL,
    log_format: Annotated[
        LogFormat, typer.Option(help="The format of the log.")
    ] = logs.DEFAULT_FORMAT,
) -> None:
    """Run an embedded em_disco node alone, for development.

    Give exactly one of --jwt-secret-file and --no-auth.

    Example: em-runner disco --port 8080 --no-auth
    """
    import disco
    import disco.main

    if no_auth == (jwt_secret_file is not None):
        raise typer.BadParameter("give either --jwt-secret-file FILE or --no-auth")
    logs.configure(log_level, log_format)
    secret = None if jwt_secret_file is None else Secret(tokens.read_secret_file(jwt_secret_file))
    settings = disco.NodeSettings(host=host, port=port, secret=secret)

    def announce(node: disco.Node) -> None:
        # Flushed, because a program may wait for this line in a pipe.
        print(f"em_disco node at {node.url}", flush=True)

    run = partial(disco.main.run, settings, announce=announce)
    anyio.run(run, backend_options={"use_uvloop": True})


@cli.command("new")
def _new(
    name: Annotated[
        str, typer.Argument(help="The agent's name, a Python name such as weather_report.")
    ],
    folder: Annotated[
        Path, typer.Option(help="The folder in which to create the agent's folder.")
    ] = Path(),
) -> None:
    """Create a new agent: a handler, its test and its configuration, ready to run.

    Example: em-runner new weather_report
    """
    from runner.commands import new

    written = new.write(name, folder)
    for path in written:
        _out.print(f"wrote {path}")
    handler = written[0]
    _out.print(f"""
Try it:

  cd {shlex.quote(str(handler.parent))}
  em-runner try {handler.name}:handle 'red fish'
  pytest                  # first: pip install pytest
  em-runner check
  em-runner run --reload  # replaces the handler when you save it""")


@cli.command("try")
def _try(
    handler: Annotated[str, typer.Argument(help="module:attribute or path/to/file.py:attribute.")],
    text: Annotated[str, typer.Argument(help="The query.")],
    memory: Annotated[str, typer.Option(help="The memory before the query, a JSON object.")] = "{}",
    timeout_s: Annotated[
        float, typer.Option(min=0.01, max=3600, help="The handler's timeout, in seconds.")
    ] = SupervisionSection().handler_timeout_ms / 1000,
) -> None:
    """Call a handler once, without a node or a runner, and print its result, memory and time.

    Exit status: 0 on success, 3 if the handler fails, 78 if it cannot be loaded.

    Example: em-runner try agents.py:handle "what is new?" --memory '{"asked": 3}'
    """
    from runner.commands import trials

    print_note = partial(print, file=sys.stderr)
    lines, error = trials.try_out(handler, text, memory, timeout_s, print_note)
    print("\n".join(lines))
    if error is not None:
        _fail(error, EXIT_HANDLER_FAILED)


@cli.command("token")
def _token(
    sub: Annotated[str, typer.Option(help="The name of the agent for which the token is valid.")],
    secret_file: Annotated[Path, typer.Option(help="A file with the secret, at least 32 bytes.")],
    ttl_s: Annotated[
        int, typer.Option(min=1, help="How long the token is valid, in seconds.")
    ] = 86_400,
) -> None:
    """Print a new token for an agent.

    Example: em-runner token --sub echo --secret-file disco.secret
    """
    secret = tokens.require_strong(tokens.read_secret_file(secret_file), str(secret_file))
    print(tokens.mint(secret, sub, ttl_s=ttl_s))


@cli.command("query")
def _query(
    text: Annotated[str, typer.Argument(help="The query.")],
    agent: Annotated[
        str | None, typer.Option(help="The agent; required if there are several.")
    ] = None,
    worker: Annotated[str | None, typer.Option(help="The worker.")] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0.1, max=86_400, help="How long to wait, in seconds.")
    ] = _QUERY_TIMEOUT_S,
    url: _RunnerUrl = None,
    token_file: _TokenFile = None,
    state_dir: _StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Send a query to a running agent, and print its results as JSON.

    Exit status: 0 on success, 1 if no runner answers in time or it refuses the request (401, 403),
    2 if the query is invalid or the agent unknown, 3 if the handler fails, 4 if no worker is up or
    the worker is busy.

    Example: em-runner query "what is new?" --agent echo
    """
    base = client.find(url, state_dir.expanduser())
    # An empty name, such as of an unset variable, is sent and refused. If it were left out, another
    # agent might answer.
    names = {"agent": agent, "worker": worker}
    given = {key: name for key, name in names.items() if name is not None}
    try:
        answer = client.call(
            base,
            "/agent/query",
            {"query": text} | given,
            token=_read_token(token_file),
            timeout_s=timeout_s,
            timeout_hint="is the runner up? A query may take longer: --timeout-s",
        )
    except UnicodeEncodeError:
        # Python decodes an argument that is not UTF-8 to characters that JSON cannot contain.
        _fail("the query is not text in UTF-8", 2)
    if answer.status == 200 and isinstance(answer.body, dict) and "results" in answer.body:
        _print_json(answer.body["results"])
        return
    _fail(client.describe_failure(base, answer), client.exit_status(answer.status))


@cli.command("status")
def _status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Update the table until Ctrl-C.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the answer of GET /workers.")
    ] = False,
    interval_s: Annotated[
        float,
        typer.Option("--interval", min=0.1, max=3600, help="The seconds between two updates."),
    ] = 1.0,
    wide: Annotated[bool, typer.Option("--wide", help="Show all columns.")] = False,
    url: _RunnerUrl = None,
    token_file: _TokenFile = None,
    state_dir: _StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Show the workers of a running runner, with their states, counts and last errors.

    Exit status: 0 if all workers are ready, 1 if some are not or there are no workers, 2 if no
    runner answers or it refuses the request.

    Example: em-runner status --watch
    """
    from runner.commands import status

    if watch and as_json:
        raise typer.BadParameter("--watch is for people and --json for programs; give one of them")

    def find() -> tuple[str, str | None]:
        return client.find(url, state_dir.expanduser()), _read_token(token_file)

    if watch:
        # By default these signals end the process at once, and the terminal stays in the mode of
        # the full-screen table. `sys.exit` restores it first.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        with contextlib.suppress(KeyboardInterrupt):
            status.watch(_out, find, interval_s, wide)
        return
    try:
        table = status.fetch(*find())
    except (CommandError, TokenError) as exc:
        _fail(str(exc), status.EXIT_NO_RUNNER)
    if as_json:
        _print_json(table)
    else:
        _out.print(status.grid(table.workers, wide))
        # Only on a terminal, the table cuts reasons that are too long for a line.
        if _on_terminal:
            _out.print(status.reasons(table.workers), end="")
        _out.print(status.summary(table.workers))
    raise typer.Exit(status.exit_status(table.workers))


def _read_token(file: Path | None) -> str | None:
    return None if file is None else tokens.read_secret_file(file)


def _with_options(config: Config, http: str | None, state_dir: Path | None) -> Config:
    """Return the configuration with the options of the command line applied."""
    import msgspec

    runner = config.runner
    if http is not None:
        address = parse_http_address(http, "--http")
        if not address.loopback and runner.http_token is None:
            # The same rule as for the configuration, which has checked only its own address.
            raise ConfigError(
                f"--http: {http!r} can be reached from other machines; set runner.http_token_file "
                "first"
            )
        runner = msgspec.structs.replace(runner, http=http)
    if state_dir is not None:
        # Absolute, because the paths of a loaded configuration are.
        path = state_dir.expanduser().absolute()
        runner = msgspec.structs.replace(runner, state_dir=path)
    return msgspec.structs.replace(config, runner=runner)


def _print_json(value: Any) -> None:
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value)).decode()
    # A handler's strings may contain sequences that control the terminal.
    print(logs.printable_json(text))


def _welcome(nodes_at: Sequence[NodeAddress], http: HttpAddress) -> None:
    nodes = [f"http://{node.authority}" for node in nodes_at]
    text = f"""
The demo is up. Ctrl-C ends it.

  status    http://{http}/
  nodes     {", ".join(nodes)}

Ask the agent directly:

  curl -s http://{http}/agent/query -H 'content-type: application/json' -d '{{"query":"hello"}}'

Ask all agents at the first node:

  curl -s {nodes[0]}/query -H 'content-type: application/json' -d '{{"query":"hello"}}'
"""
    try:
        print(text, flush=True)
    except OSError:
        # Standard output is closed. The demo itself needs none.
        _discard_output()
