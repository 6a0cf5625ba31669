"""The sections of the configuration file as Structs.

A section's Struct defines its keys, their types and their defaults, and no other place does. The
same Struct is used from the TOML file to the worker's process. If a worker needs only some of the
keys, these are in a base of the Struct, such as `RunnerOptions`, and the worker gets the base.

The Struct's docstring has the meaning of each key under `Attributes:`; the documentation's
reference is made from it. The last sentence of a meaning may be `Default: ...`: what applies if the
key is not set. Keys that have a fixed default do not need it.

An error names the key's path, the value found, what is expected, and the nearest known key.
`shared.config.load` checks how the values fit together.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from shared.config.tokens import Secret
from shared.errors import ConfigError, with_hint
from shared.logs.logger import DEFAULT_FORMAT, DEFAULT_LEVEL, LogFormat, LogLevel

# At most a day: a larger number is a mistake of the unit.
_DAY_MS: Final = 86_400_000
Milliseconds = Annotated[int, Meta(ge=1, le=_DAY_MS)]
_FrameBytes = Annotated[int, Meta(ge=1024, le=1 << 30)]
MemoryKind = Literal["none", "ram", "disk"]

DEFAULT_STATE_DIR: Final = "~/.local/state/em-runner"
DEFAULT_HTTP: Final = "127.0.0.1:9600"
DEFAULT_MEMORY: Final[MemoryKind] = "ram"
HIDDEN_KEYS: Final = frozenset({"jwt_token", "http_token"})
"""The keys that contain a secret. No error shows their values."""

_Section = TypeVar("_Section", bound=msgspec.Struct)


class RunnerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[runner]` that its workers need, too."""

    state_dir: Path = Path(DEFAULT_STATE_DIR)
    log_level: LogLevel = DEFAULT_LEVEL
    log_format: LogFormat = DEFAULT_FORMAT
    tracing: bool = False


class RunnerSection(RunnerOptions, frozen=True, kw_only=True):
    """`[runner]`: the parent process.

    Attributes:
        http: the address on which the runner serves HTTP, as HOST:PORT. Port 0 takes any free
            port. An address that other machines can reach needs a token.
        http_token: a token that every route except /health requires, as `Authorization: Bearer`.
            Prefer `http_token_file`. A configuration file with this key must be readable only by
            its owner.
        http_token_file: a file that contains this token. Set at most one of the two keys.
        state_dir: the runner's folder for its lock, its private socket, its address, and memory on
            disk. Each runner needs a separate folder.
        query_timeout_ms: a direct query without an answer after this time is answered 504.
        max_in_flight: how many direct queries one worker may have in flight (received and not
            answered). Any more are answered 503.
        max_in_flight_total: the same for all workers together.
        log_level: the least severe level that is logged.
        log_format: `console` is for people, `json` is one JSON object per line. `auto` is `console`
            on a terminal, else `json`.
        tracing: send spans for every query to an OpenTelemetry collector. Needs `em-runner[otel]`.
    """

    http: str = DEFAULT_HTTP
    http_token: Secret | None = None
    http_token_file: Path | None = None
    query_timeout_ms: Milliseconds = 30_000
    max_in_flight: Annotated[int, Meta(ge=1, le=65_536)] = 1024
    max_in_flight_total: Annotated[int, Meta(ge=1, le=1 << 20)] = 16_384


class ConnectionSection(msgspec.Struct, frozen=True, kw_only=True):
    """`[connection]`: how workers reach their nodes. Every key may also be in an `[[agent]]`.

    Attributes:
        reconnect_interval_ms: the time between two connection attempts, minus a random part of up
            to a fifth. If it is not set, em-runner uses the variable `EM_FILTER_RECONNECT_MS`.
        connect_timeout_ms: how long TCP and TLS may take.
        upgrade_timeout_ms: how long a node may take to answer the WebSocket upgrade.
        ping_interval_ms: the time between two pings. em_disco closes a connection that is silent
            for 60 s.
        max_frame_bytes: a larger frame from a node closes the connection.
        tls_ca_file: a file of certificates (PEM) to trust instead of the system's. It is re-read on
            every connection attempt. Default: the system's.
        jwt_token: the token for the node. Prefer `jwt_token_file`. A configuration file with this
            key must be readable only by its owner.
        jwt_token_file: a file that contains the token. It is re-read on every connection attempt.
        jwt_secret_file: a file that contains the node's secret. Each connection attempt uses a new
            token, valid for one hour. Set at most one of the three keys. If none is set, em-runner
            uses the variable `EM_FILTER_JWT_TOKEN`.
    """

    reconnect_interval_ms: Milliseconds = 5000
    connect_timeout_ms: Milliseconds = 5000
    upgrade_timeout_ms: Milliseconds = 5000
    # em_disco closes a connection after 60 s of silence, so a ping may be 40 s late.
    ping_interval_ms: Milliseconds = 20_000
    # It bounds the memory that one message of a node takes. em_disco itself has no limit.
    max_frame_bytes: _FrameBytes = 16 * 1024 * 1024
    tls_ca_file: Path | None = None
    jwt_token: Secret | None = None
    jwt_token_file: Path | None = None
    jwt_secret_file: Path | None = None


class SupervisionOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[supervision]` that a worker needs."""

    shutdown_timeout_ms: Milliseconds = 5000
    liveness_timeout_ms: Annotated[int, Meta(ge=100, le=_DAY_MS)] = 10_000
    handler_timeout_ms: Milliseconds = 30_000


class SupervisionSection(SupervisionOptions, frozen=True, kw_only=True):
    """`[supervision]`: when a worker is restarted, and how long it may take to stop.

    Attributes:
        max_restarts: a worker that dies more often than this within `restart_window_s` is `failed`,
            and is tried again after 60 s.
        restart_window_s: the time within which deaths are counted.
        shutdown_timeout_ms: how long a worker may take to finish the queries in flight at shutdown.
            Then it is killed.
        liveness_timeout_ms: a worker that sends the runner nothing for this long is killed and
            restarted.
        handler_timeout_ms: a query that takes longer is answered 504, or `null` to the node. An
            `async def` is cancelled. A plain function that does not return ends together with its
            worker.
    """

    max_restarts: Annotated[int, Meta(ge=0, le=1000)] = 10
    restart_window_s: Annotated[int, Meta(ge=1, le=86_400)] = 60


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of `[[agent]]` that a worker uses as they are written."""

    name: str
    capabilities: tuple[str, ...] | None = None
    memory: MemoryKind = DEFAULT_MEMORY
    concurrency: Annotated[int, Meta(ge=1, le=1024)] = 1
    max_queries: Annotated[int, Meta(ge=1, le=1 << 53)] | None = None
    max_rss_mb: Annotated[int, Meta(ge=16, le=1 << 20)] | None = None


class AgentSection(AgentOptions, frozen=True, kw_only=True):
    """One `[[agent]]`. Keys of `[connection]` that are set here apply only to this agent.

    Attributes:
        name: the agent's name at its nodes, unique in the file. If it has a token, the
            token's `sub` must be this name. Letters, digits, `_`, `.` and `-`, at most 64.
        handler: `module:attribute`, searched beside the configuration first and then on the Python
            path, or `path/to/file.py:attribute`.
        capabilities: the capabilities that the agent announces to its nodes. Default: those that
            the handler names, else none.
        memory: `ram` is a dict in the worker, lost when it crashes; `disk` is written before each
            answer is sent; `none` gives every query `{}`.
        concurrency: how many queries run at once in a worker. More than 1 needs `memory = "none"`.
        handler_timeout_ms: as in `[supervision]`, for this agent only. Default: that of
            `[supervision]`.
        max_queries: a worker that has answered about this many queries is replaced gracefully.
            Default: no limit.
        max_rss_mb: a worker that uses about this much memory, in MB, is replaced gracefully.
            Default: no limit.
        nodes: one worker per node. A node is HOST, HOST:PORT, [IPv6]:PORT, ws://HOST:PORT or
            wss://HOST:PORT. Default: `EM_DISCO_HOST` and `EM_DISCO_PORT`, else
            `~/.config/emergence/emergence.conf`, else `localhost:8080`.
    """

    handler: str
    handler_timeout_ms: Milliseconds | None = None
    nodes: tuple[str, ...] | None = None


def read_section(
    table: Any,
    section: type[_Section],
    path: str,
    *,
    also_known: Iterable[str] = (),
) -> _Section:
    """Return `table` as a `section`.

    Args:
        table: the value in the TOML file, which may be of any type.
        section: the Struct whose fields are the known keys.
        path: the table's key path, for messages.
        also_known: keys of another section that messages name among the known ones.

    Raises:
        ConfigError: for a value that is not a table, an unknown key, a missing key, a wrong type or
            an invalid value.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: found {show(table)}, expected a table")
    # Messages list the known keys, the required ones first.
    fields = sorted(msgspec.structs.fields(section), key=lambda field: not field.required)
    check_keys(table, (*(field.name for field in fields), *also_known), path)
    values: dict[str, Any] = {}
    # Key by key, and not the whole table at once: the error of msgspec does not show the value.
    for field in fields:
        name = field.name
        key = f"{path}.{name}"
        if name in table:
            values[name] = _convert(table[name], field.type, key, name)
        elif field.required:
            raise ConfigError(f"{key}: is missing, expected {expected(field.type)}")
    return section(**values)


def check_keys(table: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Refuse an unknown key. `path` is the table's key path, empty for the whole file.

    Raises:
        ConfigError: it names the key, and the nearest known key or all known keys.
    """
    known = tuple(known)
    for key in table:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
        shown = key if key.isidentifier() else show(key)
        where = f"{path}.{shown}" if path else shown
        raise ConfigError(f"{where}: is not a known key; {advice}")


def show(value: Any) -> str:
    """Return a value for an error message: one line of at most 80 characters."""
    # A configuration may be written by a program, with values of any length.
    text = repr(value).replace("\n", " ")
    if len(text) > 80:
        text = text[:77] + "..."
    return text


def _convert(value: Any, annotation: Any, key: str, name: str) -> Any:
    try:
        return msgspec.convert(value, annotation, dec_hook=_from_text)
    except (msgspec.ValidationError, OverflowError):
        # A secret of the wrong type is still a secret, such as a password of digits alone.
        found = "a value that is not shown" if name in HIDDEN_KEYS else show(value)
        problem = f"{key}: found {found}, expected {expected(annotation)}"
        raise ConfigError(with_hint(problem, _near_choice(value, annotation))) from None


def _from_text(kind: type, value: Any) -> Any:
    """Convert a string to a type that TOML does not have. `msgspec` calls this for such types."""
    if not isinstance(value, str):
        raise msgspec.ValidationError("expected a string")
    # The file system refuses a path with a NUL byte, with an error that names no key.
    if kind is Path and (not value.strip() or "\0" in value):
        raise msgspec.ValidationError("expected a path")
    return kind(value)


def _near_choice(value: Any, annotation: Any) -> str | None:
    is_choice = typing.get_origin(annotation) is Literal
    if not is_choice or not isinstance(value, str):
        return None
    near = difflib.get_close_matches(value, typing.get_args(annotation), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def expected(annotation: Any) -> str:
    """Return a description of the values that a key of type `annotation` may have."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        bounds = arguments[1]
        return f"a whole number from {bounds.ge} to {bounds.le}"
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        return "a list of strings"
    if origin is not None:
        # A union with None: the key may be omitted, but TOML has no value that means None.
        (annotation,) = (part for part in arguments if part is not type(None))
        return expected(annotation)
    names = {
        str: "a string",
        Secret: "a string",
        Path: "a path",
        bool: "true or false",
    }
    return names.get(annotation, str(annotation))
