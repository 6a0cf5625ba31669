"""The configuration file's sections as typed data, read key by key.

One table and one Struct in, a Struct or one clear error out: an error names the key's path, what
was found, what is expected, and the nearest known key. What the values mean together is decided
in `shared.config`. What each key means is said under a Struct's `Attributes:`, and nowhere else:
`meanings` reads it, and the documentation's reference is made of it. `Default:` at the end says what holds
where a key without a value of its own is not set.
"""

from __future__ import annotations

import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from shared.errors import ConfigError
from shared.tokens import Secret

Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]
FrameBytes = Annotated[int, Meta(ge=1024, le=1 << 30)]
MemoryKind = Literal["none", "ram", "disk"]
LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

DEFAULT_STATE_DIR: Final = "~/.local/state/em-runner"
DEFAULT_HTTP: Final = "127.0.0.1:9600"
_HIDDEN_KEYS = frozenset({"jwt_token", "http_token"})

Section = TypeVar("Section", bound=msgspec.Struct)


class RunnerSection(msgspec.Struct, frozen=True, kw_only=True):
    """`[runner]`: the parent process.

    Attributes:
        http: where direct queries and the operators' routes are served, as HOST:PORT; port 0 takes any free one. An
            address that other machines can reach needs a token.
        http_token: a token that every route but /health asks for, as `Authorization: Bearer`. Better in a file of its
            own; the configuration that holds it must be readable by its owner alone.
        http_token_file: a file that holds this token. At most one of the two.
        state_dir: the runner's folder: its lock, its private socket, its address, and memory on disk. Each runner
            needs a folder of its own.
        query_timeout_ms: a direct query that has no answer by then is answered 504.
        max_in_flight: how many direct queries may wait for one worker; one more is answered 503.
        max_in_flight_total: the same for all workers together.
        log_level: the least severe level that is logged.
        log_format: `console` is for people, `json` one JSON object a line; `auto` is `console` on a terminal.
        tracing: send every query's spans to an OpenTelemetry collector. Needs `em-runner[otel]`.
    """

    http: str = DEFAULT_HTTP
    http_token: Secret | None = None
    http_token_file: Path | None = None
    state_dir: Path = Path(DEFAULT_STATE_DIR)
    query_timeout_ms: Milliseconds = 30_000
    max_in_flight: Annotated[int, Meta(ge=1, le=65_536)] = 1024
    max_in_flight_total: Annotated[int, Meta(ge=1, le=1 << 20)] = 16_384
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    tracing: bool = False


class ConnectionSection(msgspec.Struct, frozen=True, kw_only=True):
    """`[connection]`: how workers reach their nodes. Every key may also stand in an `[[agent]]`.

    Attributes:
        reconnect_interval_ms: the time between two attempts to connect, less a random part of up to a fifth. Where it
            is set nowhere, the variable `EM_FILTER_RECONNECT_MS` counts.
        connect_timeout_ms: how long TCP and TLS may take.
        upgrade_timeout_ms: how long a node may take to answer the WebSocket's upgrade.
        ping_interval_ms: the time between two pings; em_disco closes a connection on which it hears nothing for 60 s.
        max_frame_bytes: a larger frame from a node ends the connection.
        tls_ca_file: certificates, in PEM, to trust in place of the system's; the file is read again at each connect.
            Default: the system's.
        jwt_token: the token for the node. Better in a file of its own; the configuration that holds it must be readable
            by its owner alone.
        jwt_token_file: a file that holds the token, read again at each connect.
        jwt_secret_file: the file that holds the node's secret; a token of one hour is made with it at each connect.
            At most one of the three; where none is set, the variable `EM_FILTER_JWT_TOKEN` counts.
    """

    reconnect_interval_ms: Milliseconds = 5000
    connect_timeout_ms: Milliseconds = 5000
    upgrade_timeout_ms: Milliseconds = 5000
    ping_interval_ms: Milliseconds = 20_000
    max_frame_bytes: FrameBytes = 16 * 1024 * 1024
    tls_ca_file: Path | None = None
    jwt_token: Secret | None = None
    jwt_token_file: Path | None = None
    jwt_secret_file: Path | None = None


class SupervisionSection(msgspec.Struct, frozen=True, kw_only=True):
    """`[supervision]`: when a worker is started again, and how long it may take to leave.

    Attributes:
        max_restarts: a worker that dies more often than this within `restart_window_s` is `failed`, and tried again
            after 60 s.
        restart_window_s: the time within which deaths are counted.
        shutdown_timeout_ms: how long a worker may take to finish what is in flight at the end; then it is killed.
        liveness_timeout_ms: a worker that is silent for so long is killed and replaced.
        handler_timeout_ms: a query that takes longer ends with 504, and `null` to the node. An `async def` is
            cancelled; a plain function that goes on is ended with its worker.
    """

    max_restarts: Annotated[int, Meta(ge=0, le=1000)] = 10
    restart_window_s: Annotated[int, Meta(ge=1, le=86_400)] = 60
    shutdown_timeout_ms: Milliseconds = 5000
    liveness_timeout_ms: Annotated[int, Meta(ge=100, le=86_400_000)] = 10_000
    handler_timeout_ms: Milliseconds = 30_000


class AgentSection(msgspec.Struct, frozen=True, kw_only=True):
    """One `[[agent]]`. Keys of `[connection]` set here hold for this agent alone.

    Attributes:
        name: the agent's name at its nodes, unique in the file; with a token, its `sub` claim. Letters, digits, `_`,
            `.` and `-`, at most 64.
        handler: `module:attribute`, looked up beside the configuration first and then on the Python path, or
            `path/to/file.py:attribute`.
        capabilities: what the agent tells its nodes that it can do. Default: those that the handler names, else none.
        memory: `ram` is a dict in the worker, lost when it crashes; `disk` is written before each answer leaves; `none`
            gives every query `{}`.
        concurrency: how many queries run at once in a worker. More than 1 needs `memory = "none"`.
        handler_timeout_ms: as in `[supervision]`, for this agent alone. Default: that of `[supervision]`.
        max_queries: a worker that has answered about so many queries is replaced in good order. Default: no limit.
        max_rss_mb: a worker that holds about so much memory, in MB, is replaced in good order. Default: no limit.
        nodes: one worker for each: HOST, HOST:PORT, [IPv6]:PORT, ws://HOST:PORT or wss://HOST:PORT. Default:
            `EM_DISCO_HOST` and `EM_DISCO_PORT`, else `~/.config/emergence/emergence.conf`, else `localhost:8080`.
    """

    name: str
    handler: str
    capabilities: list[str] | UnsetType = UNSET
    memory: MemoryKind = "ram"
    concurrency: Annotated[int, Meta(ge=1, le=1024)] = 1
    handler_timeout_ms: Milliseconds | UnsetType = UNSET
    max_queries: Annotated[int, Meta(ge=1, le=1 << 53)] | UnsetType = UNSET
    max_rss_mb: Annotated[int, Meta(ge=16, le=1 << 20)] | UnsetType = UNSET
    nodes: list[str] | UnsetType = UNSET
    reconnect_interval_ms: Milliseconds | UnsetType = UNSET
    connect_timeout_ms: Milliseconds | UnsetType = UNSET
    upgrade_timeout_ms: Milliseconds | UnsetType = UNSET
    ping_interval_ms: Milliseconds | UnsetType = UNSET
    max_frame_bytes: FrameBytes | UnsetType = UNSET
    tls_ca_file: Path | UnsetType = UNSET
    jwt_token: Secret | UnsetType = UNSET
    jwt_token_file: Path | UnsetType = UNSET
    jwt_secret_file: Path | UnsetType = UNSET


def meanings(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return what each key of a section means, as its Struct's docstring says under `Attributes:`.

    A key that is missing there is missing here: one of `[connection]` in an `[[agent]]` is explained once.
    """
    found: dict[str, str] = {}
    key = ""
    for line in inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2].splitlines():
        if match := re.fullmatch(r"    (\w+): (.*)", line):
            key, found[match[1]] = match[1], match[2]
        elif key:
            found[key] += " " + line.strip()
    return found


def read_section(table: Any, section: type[Section], path: str) -> Section:
    """Return `table` as a `section`.

    Args:
        table: what the TOML parser found.
        section: the Struct whose fields are the known keys.
        path: the table's own key path, for messages.

    Raises:
        ConfigError: for something that is no table, an unknown key, a missing one, a wrong type or
            an impossible value.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: found {show(table)}, expected a table")
    hints = typing.get_type_hints(section, include_extras=True)
    check_keys(table, section.__struct_fields__, path)
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(section):
        key = f"{path}.{field.name}"
        if field.name in table:
            values[field.name] = _convert(table[field.name], hints[field.name], key, field.name)
        elif field.required:
            raise ConfigError(f"{key}: is missing, expected {expected(hints[field.name])}")
    return section(**values)


def check_keys(table: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Refuse a key that nobody reads.

    Raises:
        ConfigError: naming it, and the nearest known key or all of them.
    """
    known = tuple(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            shown = key if key.isidentifier() else show(key)
            raise ConfigError(f"{path + '.' if path else ''}{shown}: is not a known key; {advice}")


def show(value: Any) -> str:
    """Return a value as an error may quote it: one line, cut to a readable length."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else text[:77] + "..."


def _convert(value: Any, hint: Any, key: str, name: str) -> Any:
    try:
        return msgspec.convert(value, hint, dec_hook=_from_text)
    except (msgspec.ValidationError, OverflowError):
        found = f"a {type(value).__name__} (not shown)" if name in _HIDDEN_KEYS else show(value)
        raise ConfigError(f"{key}: found {found}, expected {expected(hint)}{_near_choice(value, hint)}") from None


def _from_text(kind: type, value: Any) -> Any:
    """Build the types that TOML does not have; `msgspec` calls this for those it does not know."""
    if not isinstance(value, str):
        raise msgspec.ValidationError("expected a string")
    if kind is Path and (not value.strip() or "\0" in value):
        raise msgspec.ValidationError("expected a path")
    return kind(value)


def _choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _near_choice(value: Any, hint: Any) -> str:
    near = difflib.get_close_matches(value, _choices(hint), n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def expected(hint: Any) -> str:
    """Return what a key of that type may be, in a user's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = arguments[1]
        return f"a whole number from {bounds.ge} to {bounds.le}"
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
    if origin is list:
        return "a list of strings"
    if origin is not None:  # a union with None or UNSET: the key may be left out
        return expected(next(part for part in arguments if part not in (type(None), UnsetType)))
    return {str: "a string", Secret: "a string", Path: "a path", bool: "true or false"}.get(hint, str(hint))
