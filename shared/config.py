"""The configuration: a TOML file and the environment in, frozen Structs out, or one clear error.

Outside data becomes typed here, and past this module nobody checks it again. `load` reads a file;
`worker_specs` turns the result into one `WorkerSpec` for each (agent, node).
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from shared.errors import ConfigError
from shared.handlers import HandlerRef, parse_handler
from shared.nodes import LOOPBACK_HOSTS, OWN_NODES, NodeAddress, resolve_nodes
from shared.paths import absolute, existing
from shared.schema import (
    DEFAULT_STATE_DIR,
    AgentSection,
    ConnectionSection,
    LogFormat,
    LogLevel,
    MemoryKind,
    RunnerSection,
    SupervisionSection,
    check_keys,
    read_section,
    show,
)
from shared.tokens import Secret, TokenError, TokenSource, read_secret_file, require_private

_AGENT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_TRACING_NEEDS = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
_TOKEN_KEYS = ("jwt_token", "jwt_token_file", "jwt_secret_file")


class Connection(msgspec.Struct, frozen=True, kw_only=True):
    """How one worker reaches its node; times in milliseconds."""

    reconnect_interval_ms: int = 5000
    connect_timeout_ms: int = 5000
    upgrade_timeout_ms: int = 5000
    ping_interval_ms: int = 20_000
    max_frame_bytes: int = 16 * 1024 * 1024
    tls_ca_file: Path | None = None


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """One agent, fully resolved. `capabilities` is None where the handler's own hold."""

    name: str
    handler: HandlerRef
    nodes: tuple[NodeAddress, ...]
    nodes_origin: str = OWN_NODES
    capabilities: tuple[str, ...] | None = None
    memory: MemoryKind = "ram"
    concurrency: int = 1
    connection: Connection = Connection()
    token: TokenSource = TokenSource()
    handler_timeout_ms: int = 30_000
    max_queries: int | None = None
    max_rss_mb: int | None = None


class HttpAddress(msgspec.Struct, frozen=True):
    """Where the runner listens; port 0 asks for any free one."""

    host: str
    port: int

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host in LOOPBACK_HOSTS:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean any address: 127.example.com too
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """Restart intensity (`max_restarts` in `restart_window_s`), and how long a drain and a silence may take."""

    max_restarts: int = 10
    restart_window_s: int = 60
    shutdown_timeout_ms: int = 5000
    liveness_timeout_ms: int = 10_000


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the runner was told, checked."""

    agents: tuple[Agent, ...]
    http: HttpAddress = HttpAddress("127.0.0.1", 9600)
    http_token: Secret | None = None
    state_dir: Path = Path(DEFAULT_STATE_DIR)
    query_timeout_ms: int = 30_000
    max_in_flight: int = 1024
    max_in_flight_total: int = 16_384
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    tracing: bool = False
    supervision: Supervision = Supervision()


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker process is: an agent at one node. `index` counts the agent's nodes from 1."""

    name: str
    agent: Agent
    node: NodeAddress
    index: int
    state_dir: Path = Path(DEFAULT_STATE_DIR)
    shutdown_timeout_ms: int = 5000
    liveness_timeout_ms: int = 10_000
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    tracing: bool = False


def worker_name(agent: str, index: int) -> str:
    """Return the name of an agent's worker for its `index`-th node, counted from 1, as em_filter_sup does."""
    return f"{agent}_server" if index == 1 else f"{agent}_server_{index}"


def worker_specs(config: Config) -> tuple[WorkerSpec, ...]:
    """Return one spec for each (agent, node), agents and nodes in the order of the file.

    Its agent has that node alone: what becomes of the others is no change to this worker.
    """
    return tuple(
        WorkerSpec(
            name=worker_name(agent.name, index),
            agent=msgspec.structs.replace(agent, nodes=(node,)),
            node=node,
            index=index,
            state_dir=config.state_dir,
            shutdown_timeout_ms=config.supervision.shutdown_timeout_ms,
            liveness_timeout_ms=config.supervision.liveness_timeout_ms,
            log_level=config.log_level,
            log_format=config.log_format,
            tracing=config.tracing,
        )
        for agent in config.agents
        for index, node in enumerate(agent.nodes, start=1)
    )


def load(path: Path, *, environ: Mapping[str, str] = os.environ, emergence_conf: Path | None = None) -> Config:
    """Return the configuration of a TOML file.

    Args:
        path: the file; relative paths in it are relative to its folder.
        environ: where the other SDKs' variables are looked up.
        emergence_conf: read instead of the user's `emergence.conf`.

    Raises:
        ConfigError: one line that names the file, the key, what was found and what is expected.
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
    """Return the configuration that an already parsed TOML table holds; see `load`."""
    check_keys(table, ("runner", "connection", "supervision", "agent"), "")
    runner = read_section(table.get("runner", {}), RunnerSection, "runner")
    connection = read_section(table.get("connection", {}), ConnectionSection, "connection")
    supervision = read_section(table.get("supervision", {}), SupervisionSection, "supervision")
    set_keys = frozenset(table.get("connection", {}))
    agents = tuple(
        _agent(section, key, connection, set_keys, supervision, folder, environ, emergence_conf)
        for key, section in _agent_sections(table)
    )
    _check_names(agents)
    http = parse_http_address(runner.http)
    http_token = _http_token(runner, folder)
    if not http.loopback and http_token is None:
        raise ConfigError(
            f"runner.http: {runner.http!r} can be reached from other machines and there is no token; "
            "set runner.http_token_file, or listen on 127.0.0.1"
        )
    return Config(
        agents=agents,
        http=http,
        http_token=http_token,
        state_dir=absolute(runner.state_dir, folder, "runner.state_dir"),
        query_timeout_ms=runner.query_timeout_ms,
        max_in_flight=runner.max_in_flight,
        max_in_flight_total=runner.max_in_flight_total,
        log_level=runner.log_level,
        log_format=runner.log_format,
        tracing=_tracing(runner),
        supervision=Supervision(
            max_restarts=supervision.max_restarts,
            restart_window_s=supervision.restart_window_s,
            shutdown_timeout_ms=supervision.shutdown_timeout_ms,
            liveness_timeout_ms=supervision.liveness_timeout_ms,
        ),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name one with -c, or copy em-runner.example.toml") from None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {exc.start})") from None
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: is not TOML: {exc}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def _check_private(path: Path, table: Mapping[str, Any]) -> None:
    """Refuse a file that holds a token itself when others can read it."""
    sections = [table.get("runner"), table.get("connection")]
    sections += agents if isinstance(agents := table.get("agent"), list) else []
    holds = [key for key in ("http_token", "jwt_token") for part in sections if isinstance(part, dict) and key in part]
    if holds:
        try:
            require_private(path, path.stat().st_mode)
        except (TokenError, OSError) as exc:
            raise ConfigError(f"{path}: it holds {holds[0]}, and {exc}; or name a file with {holds[0]}_file") from None


def _agent_sections(table: Mapping[str, Any]) -> Iterator[tuple[str, AgentSection]]:
    sections = table.get("agent", [])
    if isinstance(sections, dict):
        raise ConfigError("agent: found one table, expected an array of tables; write [[agent]] with two brackets")
    if not isinstance(sections, list) or not sections:
        raise ConfigError("agent: found none, expected at least one [[agent]] with a name and a handler")
    for number, section in enumerate(sections):
        name = section.get("name") if isinstance(section, dict) else None
        key = f"agent[{number}]" + (f" ({name})" if isinstance(name, str) and _AGENT_NAME.fullmatch(name) else "")
        yield key, read_section(section, AgentSection, key)


def _agent(
    section: AgentSection,
    key: str,
    defaults: ConnectionSection,
    default_keys: frozenset[str],
    supervision: SupervisionSection,
    folder: Path,
    environ: Mapping[str, str],
    emergence_conf: Path | None,
) -> Agent:
    if not _AGENT_NAME.fullmatch(section.name):
        raise ConfigError(
            f"{key}.name: found {section.name!r}, expected 1 to 64 letters, digits, '_', '-' or '.', "
            "the first of them no '-' or '.'"
        )
    if section.concurrency > 1 and section.memory != "none":
        raise ConfigError(
            f"{key}.concurrency: found {section.concurrency}, expected 1, because queries that share a memory run "
            'one after the other; set memory = "none" to run several at once'
        )
    try:
        nodes, origin = resolve_nodes(
            None if section.nodes is UNSET else section.nodes, environ=environ, emergence_conf=emergence_conf
        )
    except ConfigError as exc:
        raise ConfigError(f"{key}.{exc}" if section.nodes is not UNSET else str(exc)) from None
    return Agent(
        name=section.name,
        handler=parse_handler(section.handler, folder, f"{key}.handler"),
        nodes=nodes,
        nodes_origin=origin,
        capabilities=None if section.capabilities is UNSET else tuple(section.capabilities),
        memory=section.memory,
        concurrency=section.concurrency,
        connection=_connection(section, key, defaults, default_keys, folder, environ),
        token=_token_source(section, key, defaults, folder, environ),
        handler_timeout_ms=(
            supervision.handler_timeout_ms if section.handler_timeout_ms is UNSET else section.handler_timeout_ms
        ),
        max_queries=None if section.max_queries is UNSET else section.max_queries,
        max_rss_mb=None if section.max_rss_mb is UNSET else section.max_rss_mb,
    )


def _connection(
    section: AgentSection,
    key: str,
    defaults: ConnectionSection,
    default_keys: frozenset[str],
    folder: Path,
    environ: Mapping[str, str],
) -> Connection:
    values: dict[str, Any] = {}
    for name in Connection.__struct_fields__:
        own = getattr(section, name)
        values[name] = getattr(defaults, name) if own is UNSET else own
    if section.reconnect_interval_ms is UNSET and "reconnect_interval_ms" not in default_keys:
        values["reconnect_interval_ms"] = _reconnect_from(environ, values["reconnect_interval_ms"])
    if values["tls_ca_file"] is not None:
        where = key if section.tls_ca_file is not UNSET else "connection"
        values["tls_ca_file"] = existing(values["tls_ca_file"], folder, f"{where}.tls_ca_file")
    return Connection(**values)


def _reconnect_from(environ: Mapping[str, str], default: int) -> int:
    text = environ.get("EM_FILTER_RECONNECT_MS", "").strip()
    if not text:
        return default
    if not (re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= 86_400_000):
        raise ConfigError(
            f"EM_FILTER_RECONNECT_MS (environment): found {show(text)}, expected a whole number from 1 to 86400000"
        )
    return int(text)


def _token_source(
    section: AgentSection, key: str, defaults: ConnectionSection, folder: Path, environ: Mapping[str, str]
) -> TokenSource:
    for where, source in ((key, section), ("connection", defaults)):
        given = {name: value for name in _TOKEN_KEYS if (value := getattr(source, name)) not in (None, UNSET)}
        if len(given) > 1:
            raise ConfigError(f"{where}: found {' and '.join(given)}, expected only one of them")
        if "jwt_token" in given:
            if not given["jwt_token"].reveal().strip():
                raise ConfigError(f"{where}.jwt_token: found an empty text, expected a token")
            return TokenSource(token=Secret(given["jwt_token"].reveal().strip()))
        if "jwt_token_file" in given:
            return TokenSource(token_file=absolute(given["jwt_token_file"], folder, f"{where}.jwt_token_file"))
        if "jwt_secret_file" in given:
            return TokenSource(secret_file=existing(given["jwt_secret_file"], folder, f"{where}.jwt_secret_file"))
    if environ.get("EM_FILTER_JWT_TOKEN", "").strip():
        return TokenSource(variable="EM_FILTER_JWT_TOKEN")
    return TokenSource()


def _check_names(agents: tuple[Agent, ...]) -> None:
    seen: set[str] = set()
    for number, agent in enumerate(agents):
        if agent.name in seen:
            raise ConfigError(f"agent[{number}].name: there are two agents named {agent.name!r}; rename one")
        seen.add(agent.name)


def parse_http_address(text: str, key: str = "runner.http") -> HttpAddress:
    """Return the address that `HOST:PORT` names; `key` is how an error names the setting.

    Raises:
        ConfigError: when it has another form.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s/]+)):([0-9]{1,5})", text)
    if not match or int(match[3]) > 65535:
        raise ConfigError(f"{key}: found {text!r}, expected HOST:PORT with a port from 0 to 65535")
    return HttpAddress(match[1] or match[2], int(match[3]))


def _http_token(runner: RunnerSection, folder: Path) -> Secret | None:
    if runner.http_token is not None and runner.http_token_file is not None:
        raise ConfigError("runner: found http_token and http_token_file, expected only one of them")
    if runner.http_token_file is not None:
        try:
            token = read_secret_file(absolute(runner.http_token_file, folder, "runner.http_token_file"))
        except TokenError as exc:
            raise ConfigError(f"runner.http_token_file: {exc}") from None
        _require_header("runner.http_token_file", token)
        return Secret(token)
    if runner.http_token is None:
        return None
    token = runner.http_token.reveal()
    if not token.strip():
        raise ConfigError("runner.http_token: found an empty text, expected a token")
    _require_header("runner.http_token", token)
    return runner.http_token


def _require_header(key: str, token: str) -> None:
    """See that a token can be sent as a header, as its holders must."""
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ConfigError(
            f"{key}: found a token with characters that no HTTP header can hold, or blanks at an end; "
            "make one with: openssl rand -hex 32"
        )


def _tracing(runner: RunnerSection) -> bool:
    """Return whether queries are traced, which an optional extra does."""
    if runner.tracing and not all(map(_is_installed, _TRACING_NEEDS)):
        raise ConfigError(
            "runner.tracing: it is true, and OpenTelemetry is not installed; pip install 'em-runner[otel]', "
            "or set it to false"
        )
    return runner.tracing


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a package that it is in is not there
        return False
