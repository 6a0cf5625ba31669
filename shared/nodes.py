"""Addresses of em_disco nodes, and where they come from when an agent names none.

The rules are em_filter's, so that a configuration moves over unchanged: the agent's own list, then
`EM_DISCO_HOST` / `EM_DISCO_PORT`, then `emergence.conf`, then `localhost:8080`.
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from shared.errors import ConfigError

LOOPBACK_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
DEFAULT_NODE: Final = "localhost:8080"
OWN_NODES: Final = "nodes"
"""The origin of nodes that an agent names itself."""

_LOOPBACK_PORT: Final = 8080
_TLS_PORT: Final = 443
_HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*\.?")
_SCOPE_ID = re.compile(r"[A-Za-z0-9_.-]+")
_FORMS = "HOST, HOST:PORT, [IPv6]:PORT, ws://HOST:PORT or wss://HOST:PORT"


class NodeAddress(msgspec.Struct, frozen=True, order=True):
    """One em_disco node: a lower-case host (IPv6 without brackets), a port, and whether it speaks TLS."""

    host: str
    port: int
    tls: bool

    @property
    def authority(self) -> str:
        """`host:port`, IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The WebSocket's address without its token, as it may be shown: `ws://host:port/ws`."""
        return f"{self}/ws"

    def __str__(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}"


def is_address(host: str) -> bool:
    """Return whether a host is written as an IP address, and so needs no resolver."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class NodeList(NamedTuple):
    """An agent's nodes, and the place that named them, for messages."""

    nodes: tuple[NodeAddress, ...]
    origin: str


def parse_node(text: str) -> NodeAddress:
    """Return the node that `text` names.

    Without a port, a loopback host means 8080 over tcp and any other 443 over tls; with one,
    loopback hosts are tcp, 443 is tls and anything else tcp. A scheme decides the transport itself.

    Raises:
        ValueError: when it is none of the accepted forms; the text says what is wrong.
    """
    rest = text.strip()
    if "?" in rest:
        raise ValueError("what follows the '?' does not belong to it; a token goes into jwt_token_file")
    scheme, found, after = rest.partition("://")
    tls: bool | None = None
    if found:
        if scheme.lower() not in ("ws", "wss"):
            raise ValueError(f"the scheme is {scheme!r}, expected ws or wss")
        tls = scheme.lower() == "wss"
        rest = after.removesuffix("/").removesuffix("/ws")
    if "@" in rest:
        raise ValueError("it holds a user or password, which em_disco does not take; use a token")
    host, port = _split_port(rest)
    if tls is not None:
        return NodeAddress(host, port or (_TLS_PORT if tls else 80), tls)
    loopback = host in LOOPBACK_HOSTS
    if port is None:
        return NodeAddress(host, _LOOPBACK_PORT, False) if loopback else NodeAddress(host, _TLS_PORT, True)
    return NodeAddress(host, port, port == _TLS_PORT and not loopback)


def resolve_nodes(
    own: Iterable[str] | None,
    *,
    environ: Mapping[str, str] = os.environ,
    emergence_conf: Path | None = None,
) -> NodeList:
    """Return an agent's nodes from the first place that names any.

    Args:
        own: the agent's own list, or None when it has none.
        environ: where `EM_DISCO_HOST` and `EM_DISCO_PORT` are looked up.
        emergence_conf: the file to read instead of the user's own `emergence.conf`.

    Raises:
        ConfigError: for an address that cannot be one, an empty list, a node named twice, or a file
            that cannot be read.
    """
    if own is not None:
        return _parse_all(own, OWN_NODES)
    if host := environ.get("EM_DISCO_HOST", "").strip():
        port = environ.get("EM_DISCO_PORT", "").strip()
        return _parse_all([_join(host, port)], "EM_DISCO_HOST" + ("/EM_DISCO_PORT" if port else ""))
    if port := environ.get("EM_DISCO_PORT", "").strip():
        return _parse_all([_join("localhost", port)], "EM_DISCO_PORT")
    path = emergence_conf or emergence_conf_path(environ)
    if (listed := _read_emergence_conf(path)) is not None:
        return _parse_all(listed, str(path))
    return _parse_all([DEFAULT_NODE], "the default")


def emergence_conf_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where this user's `emergence.conf` is, whether or not it exists."""
    if sys.platform == "win32" and (appdata := environ.get("APPDATA")):
        return Path(appdata) / "emergence" / "emergence.conf"
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".config" / "emergence" / "emergence.conf"


def _split_port(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        address, closed, port = text[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ValueError(f"expected {_FORMS}")
        return _check_ipv6(address), _check_port(port[1:]) if port else None
    if text.count(":") > 1:
        if text == "::1":
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
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ValueError(f"the port is {text!r}, expected a whole number from 1 to 65535")
    return int(text)


def _join(host: str, port: str) -> str:
    if ":" in host and not host.startswith("[") and "://" not in host:
        host = f"[{host}]"
    return f"{host}:{port}" if port else host


def _parse_all(texts: Iterable[str], origin: str) -> NodeList:
    nodes: list[NodeAddress] = []
    for text in texts:
        try:
            node = parse_node(text)
        except ValueError as exc:
            address, query, _ = text.partition("?")  # where people paste a token
            address = f"...@{address.rpartition('@')[2]}" if "@" in address else address
            shown = repr(address) + ("?..." if query else "")
            raise ConfigError(f"{origin}: {shown} is not a node's address: {exc}") from None
        if node in nodes:
            raise ConfigError(f"{origin}: the node {node} is named twice; an agent keeps one worker for each node")
        nodes.append(node)
    if not nodes:
        raise ConfigError(f"{origin}: the list is empty, expected at least one node, such as {DEFAULT_NODE!r}")
    return NodeList(tuple(nodes), origin)


def _read_emergence_conf(path: Path) -> list[str] | None:
    """Return the `[em_disco]` section's nodes, or None when there is no such file or setting."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, inline_comment_prefixes=("#", ";"))
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except configparser.Error as exc:
        # Which line, and not its text: the file may hold a token.
        wrong = [getattr(exc, "lineno", None), *(number for number, _ in getattr(exc, "errors", ()))]
        line = next(filter(None, wrong), None)
        raise ConfigError(f"{path}: is not an INI file{f' (line {line})' if line else ''}") from None
    section = "em_disco"
    if listed := parser.get(section, "nodes", fallback="").strip():
        return [item.strip() for item in listed.replace("\n", ",").split(",") if item.strip()]
    host = parser.get(section, "host", fallback="").strip()
    port = parser.get(section, "port", fallback="").strip()
    if host or port:
        return [_join(host or "localhost", port)]
    return None
