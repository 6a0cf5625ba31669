"""Parses the addresses of em_disco nodes, and finds an agent's nodes.

The rules are those of em_filter, so that its configuration works unchanged: the agent's own list,
else `EM_DISCO_HOST` and `EM_DISCO_PORT`, else `emergence.conf`, else `localhost:8080`.
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from shared.errors import ConfigError

LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
OWN_NODES: Final = "nodes"
"""The origin of the nodes in an agent's own list."""

DEFAULT_HOST: Final = "127.0.0.1"
"""Where an embedded node listens."""

DEFAULT_PORT: Final = 8080
"""em_disco's port: that of a node on a loopback host, and of an embedded node."""

_DEFAULT_NODE: Final = f"localhost:{DEFAULT_PORT}"
_PLAIN_PORT: Final = 80
_TLS_PORT: Final = 443
# Labels of at most 63 characters (RFC 1035, 2.3.4), with `_`, which container networks use.
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")
_SCOPE_ID = re.compile(r"[A-Za-z0-9_.-]+")
_FORMS = "HOST, HOST:PORT, [IPv6]:PORT, ws://HOST:PORT or wss://HOST:PORT"


class NodeAddress(msgspec.Struct, frozen=True, order=True):
    """The address of one em_disco node.

    Attributes:
        host: a name in lower case, or an IP address; IPv6 without brackets.
        port: 1 to 65535.
        tls: whether the connection uses TLS.
    """

    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        """`host:port`, with IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address of the WebSocket without its token: `ws://host:port/ws`."""
        return f"{self}/ws"

    def __str__(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}"


def is_ip_address(host: str) -> bool:
    """Return whether a host is an IP address, which needs no name resolution."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class NodeList(NamedTuple):
    """An agent's nodes, and where they were found, for messages."""

    nodes: tuple[NodeAddress, ...]
    origin: str


def parse_node(text: str) -> NodeAddress:
    """Return the node that `text` names.

    A scheme decides whether the node uses TLS. Without a scheme, port 443 means TLS, except at a
    loopback host. With neither scheme nor port, the port of a loopback host is 8080, and that of
    any other host is 443, with TLS.

    Raises:
        ValueError: if it has another form; the text says what is wrong.
    """
    rest = text.strip()
    # Checked first, and without a quotation of the text: a token follows the `?`.
    if "?" in rest:
        raise ValueError("it has a part after '?'; set a token with jwt_token_file")
    scheme, separator, after = rest.partition("://")
    if separator:
        rest = after.removesuffix("/").removesuffix("/ws")
        if scheme.lower() not in ("ws", "wss"):
            raise ValueError(f"the scheme is {scheme!r}, expected ws or wss")
    if "@" in rest:
        raise ValueError("it holds a user or password, which em_disco does not take; use a token")
    host, port = _split_port(rest)
    if separator:
        tls = scheme.lower() == "wss"
        default = _TLS_PORT if tls else _PLAIN_PORT
    else:
        loopback = host in LOOPBACK_HOSTS
        tls = port in (None, _TLS_PORT) and not loopback
        default = DEFAULT_PORT if loopback else _TLS_PORT
    return NodeAddress(host, port or default, tls)


def resolve_nodes(
    own: Iterable[str] | None,
    *,
    environ: Mapping[str, str] = os.environ,
    emergence_conf: Path | None = None,
) -> NodeList:
    """Return an agent's nodes from the first source that names any.

    Args:
        own: the agent's own list, or None.
        environ: the environment with `EM_DISCO_HOST` and `EM_DISCO_PORT`.
        emergence_conf: the file to read instead of the user's `emergence.conf`.

    Raises:
        ConfigError: for an invalid address, an empty list, a node that is named twice, or a file
            that cannot be read.
    """
    if own is not None:
        return _parse_all(own, OWN_NODES)
    host = environ.get("EM_DISCO_HOST", "").strip()
    port = environ.get("EM_DISCO_PORT", "").strip()
    if host or port:
        variables = {"EM_DISCO_HOST": host, "EM_DISCO_PORT": port}
        origin = "/".join(name for name, value in variables.items() if value)
        return _parse_all([_join(host or "localhost", port)], origin)
    path = emergence_conf or emergence_conf_path(environ)
    listed = _read_emergence_conf(path)
    if listed is not None:
        return _parse_all(listed, str(path))
    return _parse_all([_DEFAULT_NODE], "the default")


def emergence_conf_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of this user's `emergence.conf`, which may not exist."""
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    return home / ".config" / "emergence" / "emergence.conf"


def _split_port(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        address, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ValueError(f"expected {_FORMS}")
        return _check_ipv6(address), _check_port(port[1:]) if port else None
    if text.count(":") > 1:
        if text == "::1":  # em_filter accepts this address without brackets
            return text, None
        raise ValueError("an IPv6 address goes in brackets, as in [::1]:9000")
    host, colon, port = text.partition(":")
    return _check_host(host), _check_port(port) if colon else None


def _check_ipv6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None
    if address.scope_id is not None and not _SCOPE_ID.fullmatch(address.scope_id):
        raise ValueError(f"{text!r} has a zone that names no network interface")
    return str(address)


def _check_host(text: str) -> str:
    host = text.lower()
    if not host:
        raise ValueError(f"the host is empty, expected {_FORMS}")
    if len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{text!r} is not a host name, expected {_FORMS}")
    return host


def _check_port(text: str) -> int:
    # `isdigit` also accepts digits of other scripts.
    is_number = text.isascii() and text.isdigit()
    if not is_number or not 1 <= int(text) <= 65535:
        raise ValueError(f"the port is {text!r}, expected a whole number from 1 to 65535")
    return int(text)


def _join(host: str, port: str) -> str:
    # These settings have the host and the port apart, so an IPv6 address needs no brackets there.
    if ":" in host and not host.startswith("[") and "://" not in host:
        host = f"[{host}]"
    return f"{host}:{port}" if port else host


def _parse_all(texts: Iterable[str], origin: str) -> NodeList:
    nodes: list[NodeAddress] = []
    for text in texts:
        try:
            node = parse_node(text)
        except ValueError as exc:
            shown = _without_secrets(text)
            raise ConfigError(f"{origin}: {shown} is not a node's address: {exc}") from None
        if node in nodes:
            raise ConfigError(
                f"{origin}: the node {node} is named twice; an agent has one worker for each node"
            )
        nodes.append(node)
    if not nodes:
        raise ConfigError(
            f"{origin}: the list is empty, expected at least one node, such as {_DEFAULT_NODE!r}"
        )
    return NodeList(tuple(nodes), origin)


def _without_secrets(text: str) -> str:
    """Return an invalid address for a message, without the two parts in which users put secrets."""
    address, mark, _ = text.partition("?")  # after it, a token
    _, at, host = address.rpartition("@")  # before it, a user and a password
    if at:
        address = f"...@{host}"
    return repr(address) + ("?..." if mark else "")


def _read_emergence_conf(path: Path) -> list[str] | None:
    """Return the nodes in the section `[em_disco]`, or None if no file or no setting exists."""
    parser = configparser.ConfigParser(
        interpolation=None,
        strict=False,
        inline_comment_prefixes=("#", ";"),
    )
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except configparser.Error as exc:
        # The number of the line, but not its text: the file may contain a token. The attribute that
        # holds the number depends on the kind of error.
        numbers = [number for number, _ in getattr(exc, "errors", ())]
        line = getattr(exc, "lineno", None) or next(iter(numbers), None)
        where = f" (line {line})" if line else ""
        raise ConfigError(f"{path}: is not an INI file{where}") from None
    section = "em_disco"
    listed = parser.get(section, "nodes", fallback="").strip()
    if listed:
        items = [item.strip() for item in listed.replace("\n", ",").split(",")]
        return [item for item in items if item]
    host = parser.get(section, "host", fallback="").strip()
    port = parser.get(section, "port", fallback="").strip()
    if host or port:
        return [_join(host or "localhost", port)]
    return None
