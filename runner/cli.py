"""The `em-runner` command. Each subcommand reads its options, calls one function, and says how it went."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
from io import TextIOWrapper
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import anyio
import typer
from rich.console import Console
from typer.core import TyperCommand

from runner import client
from shared import logs, tokens
from shared.config import Config, HttpAddress, load, parse_http_address
from shared.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_HANDLER_FAILED, ConfigError, StartError
from shared.schema import DEFAULT_HTTP, DEFAULT_STATE_DIR, LogFormat, LogLevel
from shared.tokens import Secret, TokenError

cli = typer.Typer(
    name="em-runner",
    help="Runs Emergence agents: one supervised process for each em_disco node, direct queries over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Into a pipe or a file nothing is cut to a terminal's width.
_on_terminal: Final = sys.stdout is not None and sys.stdout.isatty()
_out: Final = Console(
    soft_wrap=True, highlight=False, markup=False, emoji=False, width=None if _on_terminal else 10_000
)

_NO_OPTION: Final = re.compile(r"-[^-a-zA-Z].*|-[^-].*\s.*", re.DOTALL)


def _version(asked: bool) -> None:
    if asked:
        from runner.metrics import version

        print(f"em-runner {version()}")
        raise typer.Exit


def _url(text: str | None) -> str | None:
    try:
        return None if text is None else client.parse_url(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None


def _name(text: str | None) -> str | None:
    if text == "":  # such as of a variable that is not set: nobody else is asked instead
        raise typer.BadParameter("found an empty name; name one, or leave the option out")
    return text


class _TakesText(TyperCommand):
    """A command whose argument may be any text, and so look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for word in takewhile(lambda word: word != "--", args):
            if _NO_OPTION.fullmatch(word):
                raise typer.BadParameter(f"{word!r} is taken for an option; a query that begins with '-' follows '--'")
        return super().parse_args(ctx, args)


ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The configuration, a TOML file.")]
StateDir = Annotated[Path, typer.Option(help="Where the runner keeps its socket and its address.")]
HttpOption = Annotated[str | None, typer.Option("--http", help="Listen here instead: HOST:PORT; port 0 takes any.")]
RunnerUrl = Annotated[
    str | None, typer.Option("--url", callback=_url, help="The runner, such as http://127.0.0.1:9600.")
]
TokenFile = Annotated[Path | None, typer.Option(help="A file with the runner's HTTP token.")]
Level = Annotated[LogLevel, typer.Option("--log-level", help="The least severe level that is logged.")]
Style = Annotated[LogFormat, typer.Option("--log-format", help="How the log is written.")]


def main() -> None:
    """Run the command line; what the user can mend is one line on standard error, never a traceback."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # what a terminal cannot show is no reason to show nothing
                stream.reconfigure(errors="backslashreplace")
        try:
            cli()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ConfigError as exc:
        _leave(str(exc), EXIT_CONFIG)
    except (StartError, TokenError) as exc:
        _leave(str(exc), EXIT_FAILED)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except OSError as exc:
        if _folder_is_gone():
            _leave("the current folder is gone; change to another one", EXIT_FAILED)
        if exc.filename is not None:
            _leave(f"{exc.filename}: {exc.strerror}", EXIT_FAILED)
        _give_up_output()  # `em-runner check | head`, or a full disk behind a redirection
        _leave(f"the output cannot be written: {exc.strerror or exc}", EXIT_FAILED)


def _folder_is_gone() -> bool:
    """Return whether the current folder was removed."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _give_up_output() -> None:
    """Keep the interpreter from writing at its end what could not be written."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)


def _leave(message: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        print(f"em-runner: {logs.printable_line(message)}", file=sys.stderr)
    sys.exit(status)


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version, and leave.")
    ] = False,
) -> None:
    """What stands before a command."""


@cli.command()
def run(
    config: ConfigFile = Path("em-runner.toml"),
    http: HttpOption = None,
    state_dir: Annotated[Path | None, typer.Option(help="Use this state folder instead of the file's.")] = None,
    watch: Annotated[
        bool, typer.Option("--reload", help="While developing: watch the files, and replace workers as they change.")
    ] = False,
) -> None:
    """Run the agents of a configuration until SIGTERM or Ctrl-C; SIGHUP reads the configuration again.

    With --reload a handler's file, or a module beside it that it imports, replaces that handler's workers when it
    is saved, with their memory and without a direct query lost; while it is broken the old ones answer. A change of the
    configuration is applied as by em-runner reload.

    Example: em-runner run -c em-runner.toml
    """

    from runner import start

    def read() -> Config:
        return _overridden(load(config), http, state_dir)

    loaded = read()
    logs.configure(loaded.log_level, loaded.log_format)
    start.run(loaded, read_again=read, watched=config if watch else None)


@cli.command()
def reload(state_dir: StateDir = Path(DEFAULT_STATE_DIR)) -> None:
    """Make a running runner read its configuration again, and print what that changed.

    Exit status: 0 when it is done, 1 when there is no runner, it does not answer, or some workers could not be
    replaced, 78 when it was refused.

    Example: em-runner reload --state-dir ~/.local/state/em-runner
    """
    outcome = client.reload(state_dir.expanduser())
    if not outcome.done:
        _leave(outcome.message, EXIT_FAILED if outcome.changed else EXIT_CONFIG)
    print(outcome.message)


@cli.command()
def check(config: ConfigFile = Path("em-runner.toml")) -> None:
    """Load a configuration, import its handlers, look at its tokens, and print the workers that would run.

    Exit status: 0 when all is well, 1 when a token would be refused, 78 when the configuration is wrong.

    Example: em-runner check -c em-runner.toml
    """
    from runner import check as checking

    report = checking.check(load(config))
    checking.show(report.rows, _out)
    for problem in report.problems:
        print(f"em-runner: {problem}", file=sys.stderr)
    if report.problems:
        raise typer.Exit(EXIT_FAILED)
    _out.print(f"{config}: good, {len(report.rows)} worker{'s' if len(report.rows) != 1 else ''} would run")


@cli.command("demo")
def run_demo(
    nodes: Annotated[int, typer.Option(min=1, max=100, help="How many embedded nodes to run.")] = 2,
    first_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The first node's port, the next ones follow; 0 takes any.")
    ] = 8080,
    http: Annotated[
        str, typer.Option(help="Where the runner listens, on this machine: HOST:PORT; port 0 takes any.")
    ] = DEFAULT_HTTP,
    state_dir: StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Run embedded em_disco nodes and the echo agent with one worker at each, all on this machine.

    Example: em-runner demo --nodes 2
    """
    from runner import demo

    logs.configure()
    address = parse_http_address(http, "--http")
    if not address.loopback:
        raise ConfigError(f"--http: the demo has no token and listens on this machine only, not on {address}")
    ports = demo.ports(first_port, nodes)
    nodes_at = [f"{demo.HOST}:{port}" for port in ports]
    demo.run(address, ports, state_dir.expanduser(), lambda http: _welcome(http, nodes_at))


@cli.command("disco")
def run_disco(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes any.")] = 8080,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    jwt_secret_file: Annotated[Path | None, typer.Option(help="A file with the secret that signs the tokens.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no token (loopback only).")] = False,
    level: Level = "info",
    style: Style = "auto",
) -> None:
    """Run an embedded em_disco node alone, for development. Give exactly one of --jwt-secret-file and --no-auth.

    Example: em-runner disco --port 8080 --no-auth
    """
    import disco
    import disco.main

    if no_auth == (jwt_secret_file is not None):
        raise typer.BadParameter("give either --jwt-secret-file FILE or --no-auth")
    logs.configure(level, style)
    secret = None if jwt_secret_file is None else Secret(tokens.read_secret_file(jwt_secret_file))
    settings = disco.NodeSettings(host=host, port=port, secret=secret)
    anyio.run(
        lambda: disco.main.run(settings, announce=lambda node: print(f"em_disco node at {node.url}", flush=True)),
        backend_options={"use_uvloop": True},
    )


@cli.command("new")
def write_new(
    name: Annotated[str, typer.Argument(help="The agent's name, a Python name such as weather_report.")],
    folder: Annotated[Path, typer.Option(help="Where its own folder is made.")] = Path(),
) -> None:
    """Write a new agent: a handler, its test and its configuration, which run as they are.

    Example: em-runner new weather_report
    """
    from runner import new

    written = new.write(name, folder)
    inside = written[0].parent
    _out.print("\n".join(f"wrote {path}" for path in written))
    _out.print(f"\nTry it:\n\n  cd {shlex.quote(str(inside))}\n  em-runner try {written[0].name}:handle 'red fish'")
    _out.print("  pytest                  # once before: pip install pytest\n  em-runner check")
    _out.print("  em-runner run --reload  # replaces it whenever it is saved")


@cli.command("try")
def try_out(
    handler: Annotated[str, typer.Argument(help="module:attribute or path/to/file.py:attribute.")],
    text: Annotated[str, typer.Argument(help="The query.")],
    memory: Annotated[str, typer.Option(help="What it remembers before, a JSON object.")] = "{}",
    timeout_s: Annotated[float, typer.Option(min=0.01, max=3600, help="How long it may take, in seconds.")] = 30.0,
) -> None:
    """Call a handler once, without a node or a runner, and print its result, its memory and the time it took.

    Exit status: 0 when it answered, 3 when it failed, 78 when it cannot be loaded.

    Example: em-runner try agents.py:handle "what is new?" --memory '{"asked": 3}'
    """
    from runner import trials

    report = trials.try_out(handler, text, memory, timeout_s, lambda words: print(words, file=sys.stderr))
    print(report.text)
    if report.failed:
        _leave(report.failed, EXIT_HANDLER_FAILED)


@cli.command()
def token(
    sub: Annotated[str, typer.Option(help="The agent's name, which the token is for.")],
    secret_file: Annotated[Path, typer.Option(help="A file with the secret, at least 32 bytes.")],
    ttl_s: Annotated[int, typer.Option(min=1, help="How long the token is valid, in seconds.")] = 86_400,
) -> None:
    """Print a new token for an agent.

    Example: em-runner token --sub echo --secret-file disco.secret
    """
    secret = tokens.require_strong(tokens.read_secret_file(secret_file), str(secret_file))
    print(tokens.mint(secret, sub, ttl_s=ttl_s))


@cli.command(cls=_TakesText)
def query(
    text: Annotated[str, typer.Argument(help="The query.")],
    agent: Annotated[
        str | None, typer.Option(callback=_name, help="Ask this agent; needed when there are several.")
    ] = None,
    worker: Annotated[str | None, typer.Option(callback=_name, help="Ask this worker.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, max=86_400, help="How long to wait, in seconds.")] = 35.0,
    url: RunnerUrl = None,
    token_file: TokenFile = None,
    state_dir: StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Ask a running agent and print its results as JSON.

    Exit status: 0 answered, 1 no runner, no answer in time or refused (401, 403), 2 wrong query or no such agent,
    3 the handler failed, 4 no worker is up or it is busy.

    Example: em-runner query "what is new?" --agent echo
    """
    base = client.find(url, state_dir.expanduser())
    asked = {"query": text} | {name: value for name, value in (("agent", agent), ("worker", worker)) if value}
    late = "is the runner up? A query may take longer: --timeout-s"
    try:
        answer = client.call(base, "/agent/query", asked, token=_token(token_file), timeout_s=timeout_s, late=late)
    except client.NotText as exc:
        _leave(str(exc), 2)
    if answer.status == 200 and isinstance(answer.body, dict) and "results" in answer.body:
        _print_json(answer.body["results"])
        return
    if not client.is_refusal(answer):
        raise client.not_a_runner(base)
    who = f" ({answer.worker})" if answer.worker else ""
    _leave(f"{answer.status}: {answer.body['error']}{who}{client.advice(answer)}", client.exit_status(answer.status))


@cli.command("status")
def show_status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what GET /workers answers.")] = False,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two looks.")
    ] = 1.0,
    url: RunnerUrl = None,
    token_file: TokenFile = None,
    state_dir: StateDir = Path(DEFAULT_STATE_DIR),
) -> None:
    """Show the workers of a running runner, each with its state, its counts and its last error.

    Exit status: 0 when all workers are ready, 1 when not all are or there are none, 2 when no runner could be asked,
    or it refused.

    Example: em-runner status --watch
    """
    from runner import status

    if watch and as_json:
        raise typer.BadParameter("--watch is for people and --json for programs; give one of them")

    def where() -> tuple[str, str | None]:
        return client.find(url, state_dir.expanduser()), _token(token_file)

    if watch:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # not before the terminal is as it was
        with contextlib.suppress(KeyboardInterrupt):
            status.watch(_out, where, interval_s)
        return
    try:
        table = status.fetch(*where())
    except (StartError, TokenError, status.NotAnswered) as exc:
        _leave(str(exc), status.EXIT_NO_RUNNER)
    if as_json:
        _print_json(table)
    else:
        width = _out.width if _on_terminal else None
        _out.print(status.grid(table.workers, width), status.in_full(table.workers, width), sep="", end="")
        _out.print(status.summary(table.workers))
    raise typer.Exit(status.exit_status(table.workers))


def _token(file: Path | None) -> str | None:
    return None if file is None else tokens.read_secret_file(file)


def _overridden(config: Config, http: str | None, state_dir: Path | None) -> Config:
    """Return the configuration with what the command line says instead."""
    import msgspec

    if http is not None:
        address = parse_http_address(http, "--http")
        if not address.loopback and config.http_token is None:
            raise ConfigError(f"--http: {http!r} can be reached from other machines; set runner.http_token_file first")
        config = msgspec.structs.replace(config, http=address)
    if state_dir is not None:
        config = msgspec.structs.replace(config, state_dir=state_dir.expanduser().absolute())
    return config


def _print_json(value: Any) -> None:
    import msgspec

    print(logs.printable_json(msgspec.json.format(msgspec.json.encode(value)).decode()))


def _welcome(http: HttpAddress, nodes_at: list[str]) -> None:
    nodes = ", ".join(f"http://{node}" for node in nodes_at)
    text = f"""
The demo is up. Ctrl-C ends it.

  status    http://{http}/
  nodes     {nodes}

Ask the agent directly:

  curl -s http://{http}/agent/query -H 'content-type: application/json' -d '{{"query":"hello"}}'

Ask all agents at the first node:

  curl -s http://{nodes_at[0]}/query -H 'content-type: application/json' -d '{{"query":"hello"}}'
"""
    try:
        print(text, flush=True)
    except OSError:  # whoever started this has closed its output; the demo goes on, and starts its workers
        _give_up_output()
