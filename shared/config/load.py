"""Reads the configuration from a TOML file and the environment.

The result is frozen Structs, or one clear error. The modules of this folder check the values, and
the code that uses them does not check them again. `load` reads a file; `worker_specs` returns one
`WorkerSpec` for each agent and node.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shared.config._paths import absolute, existing
from shared.config.handlers import HandlerRef, parse_handler
from shared.config.nodes import LOOPBACK_HOSTS, OWN_NODES, NodeAddress, resolve_nodes
from shared.config.schema import (
    HIDDEN_KEYS,
    AgentOptions,
    AgentSection,
    ConnectionSection,
    Milliseconds,
    RunnerOptions,
    RunnerSection,
    SupervisionOptions,
    SupervisionSection,
    check_keys,
    expected,
    read_section,
    show,
)
from shared.config.tokens import Secret, TokenError, TokenSource, read_secret_file, require_private
from shared.errors import ConfigError

_AGENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
# The modules that `shared.tracing` imports from the extra.
_TRACING_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_TOKEN_KEYS = ("jwt_token", "jwt_token_file", "jwt_secret_file")
_TOKEN_VARIABLE = "EM_FILTER_JWT_TOKEN"
_CONNECTION_KEYS = ConnectionSection.__struct_fields__


class Agent(AgentOptions, frozen=True, kw_only=True):
    """One agent: its section's keys, what these refer to, and what other sections define for it.

    It is not an `AgentSection`, because that one has the names of a handler and of nodes, and None
    for what other sections or the environment define.

    Attributes:
        handler: where its handler is.
        nodes: at least one node.
        nodes_origin: where the nodes were found, for messages.
        connection: `[connection]` with the agent's own keys, without the tokens.
        supervision: `[supervision]` with the agent's own key.
        token: where its token comes from.
    """

    handler: HandlerRef
    nodes: tuple[NodeAddress, ...]
    nodes_origin: str = OWN_NODES
    connection: ConnectionSection = ConnectionSection()
    supervision: SupervisionOptions = SupervisionOptions()
    token: TokenSource = TokenSource()


class HttpAddress(msgspec.Struct, frozen=True):
    """Where the runner listens. Port 0 means any free port."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host in LOOPBACK_HOSTS:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            # A name may resolve to any address: 127.example.com is not a loopback address.
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A checked configuration. Paths are absolute, and `runner.http_token` contains the token."""

    agents: tuple[Agent, ...]
    runner: RunnerSection = RunnerSection()
    supervision: SupervisionSection = SupervisionSection()

    @property
    def http(self) -> HttpAddress:
        """The address of the runner's HTTP server."""
        return parse_http_address(self.runner.http)


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that one worker process depends on.

    A reload replaces exactly the workers whose spec has changed. So a value that a worker does not
    use must not be in here: a change of it would restart the worker for nothing.
    """

    name: str
    agent: Agent
    node: NodeAddress
    runner: RunnerOptions = RunnerOptions()


def worker_name(agent: str, index: int) -> str:
    """Return the name of the worker for an agent's node number `index`, as em_filter_sup does."""
    return f"{agent}_server" if index == 1 else f"{agent}_server_{index}"


def worker_specs(config: Config) -> tuple[WorkerSpec, ...]:
    """Return one spec for each agent and node, in the order of the file."""
    runner = RunnerOptions(**_values_of(config.runner, RunnerOptions))
    return tuple(
        WorkerSpec(
            name=worker_name(agent.name, index),
            # Without the other nodes, and without where they were found: a change of these must not
            # change the spec.
            agent=msgspec.structs.replace(agent, nodes=(node,), nodes_origin=OWN_NODES),
            node=node,
            runner=runner,
        )
        for agent in config.agents
        for index, node in enumerate(agent.nodes, start=1)
    )


def _values_of(section: msgspec.Struct, base: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the values of a section's keys that are defined in a base of its Struct."""
    return {name: getattr(section, name) for name in base.__struct_fields__}


def load(
    path: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    emergence_conf: Path | None = None,
) -> Config:
    """Return the configuration of a TOML file.

    Args:
        path: the file. Relative paths in it are relative to its folder.
        environ: the environment with the variables of the other SDKs.
        emergence_conf: the file to read instead of the user's `emergence.conf`.

    Raises:
        ConfigError: one line that names the file, the key, the value found and what is expected.
    """
    table = _read_toml(path)
    _check_private(path, table)
    try:
        return parse(table, path.absolute().parent, environ=environ, emergence_conf=emergence_conf)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None


def parse(
    table: Mapping[str, Any],
    folder: Path,
    *,
    environ: Mapping[str, str] = os.environ,
    emergence_conf: Path | None = None,
) -> Config:
    """Return the configuration in a parsed TOML table; see `load`."""
    check_keys(table, ("runner", "connection", "supervision", "agent"), "")
    runner = read_section(table.get("runner", {}), RunnerSection, "runner")
    connection = read_section(table.get("connection", {}), ConnectionSection, "connection")
    supervision = read_section(table.get("supervision", {}), SupervisionSection, "supervision")
    defaults = _Defaults(
        connection,
        frozenset(table.get("connection", {})),
        supervision,
        folder,
        environ,
        emergence_conf,
    )
    agents = tuple(_agent(section, key, defaults) for key, section in _agent_tables(table))
    # A name identifies an agent's workers, its memory files and its route.
    _check_names(agents)
    return Config(agents=agents, runner=_runner(runner, folder), supervision=supervision)


def _runner(section: RunnerSection, folder: Path) -> RunnerSection:
    """Return `[runner]` with absolute paths, and with the token in `http_token`."""
    token = _http_token(section, folder)
    # A loopback address needs no token: only processes of this machine reach it, and the guard of
    # the routes refuses what a web page makes a browser send. At any other address, anyone in the
    # network could query the agents.
    if not parse_http_address(section.http).loopback and token is None:
        raise ConfigError(
            f"runner.http: {section.http!r} can be reached from other machines and there is no "
            "token; set runner.http_token_file, or listen on 127.0.0.1"
        )
    _check_tracing(section)
    state_dir = absolute(section.state_dir, folder, "runner.state_dir")
    return msgspec.structs.replace(
        section,
        http_token=token,
        http_token_file=None,
        state_dir=state_dir,
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # Some editors write a byte order mark, which TOML does not allow.
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; name one with -c, or copy em-runner.example.toml"
        ) from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start})") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: is not TOML: {exc}") from None
    except RecursionError:  # tomllib calls itself for each nested array
        raise ConfigError(f"{path}: is nested too deeply") from None


def _check_private(path: Path, table: Mapping[str, Any]) -> None:
    """Refuse a file that contains a token and that other users can read."""
    # The file is not yet known to have the right form, so any part of it may be of any type.
    agents = table.get("agent")
    sections = [table.get("runner"), table.get("connection")]
    sections += agents if isinstance(agents, list) else []
    keys = {key for section in sections if isinstance(section, dict) for key in section}
    secret_keys = sorted(HIDDEN_KEYS & keys)
    if not secret_keys:
        return
    try:
        require_private(path, path.stat().st_mode)
    except (TokenError, OSError) as exc:
        key = secret_keys[0]
        raise ConfigError(
            f"{path}: it holds {key}, and {exc}; or name a file with {key}_file"
        ) from None


def _agent_tables(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the key path and the value of each `[[agent]]`."""
    sections = table.get("agent", [])
    if isinstance(sections, dict):
        raise ConfigError(
            "agent: found one table, expected an array of tables; write [[agent]] with two brackets"
        )
    if not isinstance(sections, list) or not sections:
        raise ConfigError(
            "agent: found none, expected at least one [[agent]] with a name and a handler"
        )
    for number, section in enumerate(sections):
        key = f"agent[{number}]"
        name = section.get("name") if isinstance(section, dict) else None
        if isinstance(name, str) and _AGENT_NAME.fullmatch(name):
            key += f" ({name})"
        yield key, section


class _Defaults(NamedTuple):
    """The values for keys that an agent does not set, and where its files and variables are."""

    connection: ConnectionSection
    connection_keys: frozenset[str]
    supervision: SupervisionSection
    folder: Path
    environ: Mapping[str, str]
    emergence_conf: Path | None


def _agent(table: Any, key: str, defaults: _Defaults) -> Agent:
    # An `[[agent]]` contains keys of two sections. Each section reads only its own keys.
    agent_table = _without(_CONNECTION_KEYS, table)
    section = read_section(agent_table, AgentSection, key, also_known=_CONNECTION_KEYS)
    _check_agent(section, key)
    connection_table = _without(section.__struct_fields__, table)
    connection = read_section(connection_table, ConnectionSection, key)
    nodes, origin = _nodes(section, key, defaults)
    return Agent(
        **_values_of(section, AgentOptions),
        handler=parse_handler(section.handler, defaults.folder, f"{key}.handler"),
        nodes=nodes,
        nodes_origin=origin,
        connection=_connection(connection, frozenset(connection_table), key, defaults),
        supervision=_supervision(section, defaults.supervision),
        token=_token_source(connection, key, defaults),
    )


def _supervision(agent: AgentSection, supervision: SupervisionSection) -> SupervisionOptions:
    """Return `[supervision]`, overridden by the agent's own key."""
    values = _values_of(supervision, SupervisionOptions)
    if agent.handler_timeout_ms is not None:
        values["handler_timeout_ms"] = agent.handler_timeout_ms
    return SupervisionOptions(**values)


def _check_agent(section: AgentSection, key: str) -> None:
    if not _AGENT_NAME.fullmatch(section.name):
        raise ConfigError(
            f"{key}.name: found {section.name!r}, expected 1 to 64 letters, digits, '_', '-' or "
            "'.', of which the first is not '-' or '.'"
        )
    if section.concurrency > 1 and section.memory != "none":
        raise ConfigError(
            f"{key}.concurrency: found {section.concurrency}, expected 1, because queries that "
            'share a memory run one after the other; set memory = "none" to run several at once'
        )


def _without(keys: Iterable[str], table: Any) -> Any:
    """Return a table without some keys. `read_section` refuses a value that is not a table."""
    if not isinstance(table, dict):
        return table
    return {name: value for name, value in table.items() if name not in keys}


def _nodes(
    section: AgentSection,
    key: str,
    defaults: _Defaults,
) -> tuple[tuple[NodeAddress, ...], str]:
    try:
        return resolve_nodes(
            section.nodes,
            environ=defaults.environ,
            emergence_conf=defaults.emergence_conf,
        )
    except ConfigError as exc:
        # The error of an agent's own list starts with `nodes`, and lacks the path of this key. All
        # other errors start with the variable or the file.
        raise ConfigError(str(exc) if section.nodes is None else f"{key}.{exc}") from None


def _connection(
    own: ConnectionSection,
    own_keys: frozenset[str],
    key: str,
    defaults: _Defaults,
) -> ConnectionSection:
    """Return `[connection]`, overridden by the agent's own keys, without the tokens."""
    values = {name: getattr(own, name) for name in own_keys}
    # The variable is a default of the environment: any key in the configuration overrides it.
    if "reconnect_interval_ms" not in own_keys | defaults.connection_keys:
        interval_ms = _reconnect_interval_ms(defaults.environ, own.reconnect_interval_ms)
        values["reconnect_interval_ms"] = interval_ms
    # `Agent.token` has the token. A copy here would be sent to the worker too.
    values |= dict.fromkeys(_TOKEN_KEYS)
    merged = msgspec.structs.replace(defaults.connection, **values)
    if merged.tls_ca_file is None:
        return merged
    where = key if "tls_ca_file" in own_keys else "connection"
    file = existing(merged.tls_ca_file, defaults.folder, f"{where}.tls_ca_file")
    return msgspec.structs.replace(merged, tls_ca_file=file)


def _reconnect_interval_ms(environ: Mapping[str, str], default: int) -> int:
    text = environ.get("EM_FILTER_RECONNECT_MS", "").strip()
    if not text:
        return default
    # Digits only: `int` accepts signs and underscores, too.
    value = int(text) if re.fullmatch("[0-9]{1,9}", text) else text
    try:
        return msgspec.convert(value, Milliseconds)
    except msgspec.ValidationError:
        raise ConfigError(
            f"EM_FILTER_RECONNECT_MS (environment): found {show(text)}, "
            f"expected {expected(Milliseconds)}"
        ) from None


def _token_source(own: ConnectionSection, key: str, defaults: _Defaults) -> TokenSource:
    """Return the source of an agent's token: its own keys, `[connection]`, the environment."""
    folder = defaults.folder
    for where, section in ((key, own), ("connection", defaults.connection)):
        given = [name for name in _TOKEN_KEYS if getattr(section, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{where}: found {' and '.join(given)}, expected only one of them")
        if section.jwt_token is not None:
            token = section.jwt_token.reveal().strip()
            if not token:
                raise ConfigError(f"{where}.jwt_token: found an empty text, expected a token")
            return TokenSource(token=Secret(token))
        if section.jwt_token_file is not None:
            # The file need not exist yet: it is read on every connection attempt.
            file = absolute(section.jwt_token_file, folder, f"{where}.jwt_token_file")
            return TokenSource(token_file=file)
        if section.jwt_secret_file is not None:
            file = existing(section.jwt_secret_file, folder, f"{where}.jwt_secret_file")
            return TokenSource(secret_file=file)
    if defaults.environ.get(_TOKEN_VARIABLE, "").strip():
        return TokenSource(variable=_TOKEN_VARIABLE)
    return TokenSource()


def _check_names(agents: tuple[Agent, ...]) -> None:
    seen: set[str] = set()
    for number, agent in enumerate(agents):
        if agent.name in seen:
            raise ConfigError(
                f"agent[{number}].name: there are two agents named {agent.name!r}; rename one"
            )
        seen.add(agent.name)


def parse_http_address(text: str, key: str = "runner.http") -> HttpAddress:
    """Return the address `HOST:PORT`. `key` is the setting, for the error.

    Raises:
        ConfigError: if the text has another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s/]+)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ConfigError(f"{key}: found {text!r}, expected HOST:PORT with a port from 0 to 65535")
    return HttpAddress(match[1] or match[2], int(match[3]))


def _http_token(runner: RunnerSection, folder: Path) -> Secret | None:
    """Return the token of `http_token` or of the file `http_token_file`."""
    if runner.http_token is not None and runner.http_token_file is not None:
        raise ConfigError("runner: found http_token and http_token_file, expected only one of them")
    if runner.http_token_file is not None:
        key = "runner.http_token_file"
        try:
            token = read_secret_file(absolute(runner.http_token_file, folder, key))
        except TokenError as exc:
            raise ConfigError(f"{key}: {exc}") from None
    elif runner.http_token is not None:
        key = "runner.http_token"
        token = runner.http_token.reveal()
        if not token.strip():
            raise ConfigError(f"{key}: found an empty text, expected a token")
    else:
        return None
    _check_header_value(token, key)
    return Secret(token)


def _check_header_value(token: str, key: str) -> None:
    """Refuse a token that its holders could not send as a header."""
    # RFC 9110, 5.5: a field value is visible ASCII, and the white space around it is dropped.
    is_field_value = token.isascii() and token.isprintable() and token == token.strip()
    if not is_field_value:
        raise ConfigError(
            f"{key}: found a token with characters that no HTTP header can hold, or blanks at an "
            "end; make one with: openssl rand -hex 32"
        )


def _check_tracing(runner: RunnerSection) -> None:
    if runner.tracing and not all(map(_is_installed, _TRACING_NEEDS)):
        raise ConfigError(
            "runner.tracing: it is true, and OpenTelemetry is not installed; "
            "pip install 'em-runner[otel]', or set it to false"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package around the module is missing
        return False
