"""What a request's head must be before anybody acts on it (RFC 9112), past what the parser sees to."""

from __future__ import annotations

from typing import Final

Headers = list[tuple[bytes, bytes]]

# Between the client and a server that upgrades: nobody else's (RFC 9110, 7.6.1).
_OF_UPGRADES: Final = frozenset({b"upgrade", b"http2-settings"})


class BadHead(Exception):
    """The head is none that is answered; the text says what to do."""


def settled(url: bytes, version: str, headers: Headers) -> bytes:
    """Return the path and query that a request is for, and see that `headers` name its host once.

    A target in absolute form names the host itself, in place of the header (RFC 9112, 3.2.2).

    Raises:
        BadHead: without a host in HTTP/1.1, or with several.
    """
    hosts = [name for name, _ in headers].count(b"host")
    if hosts != 1 and (hosts or version != "1.0"):
        raise BadHead("a request has one Host header")
    if url.startswith(b"/") or b"://" not in url:
        return url
    authority, slash, rest = url.partition(b"://")[2].partition(b"/")
    authority, mark, query = authority.partition(b"?") if not slash else (authority, b"", b"")
    headers[:] = [*((name, value) for name, value in headers if name != b"host"), (b"host", authority)]
    return b"/" + rest + mark + query


def declares_more_than(limit_bytes: int, content_length: bytes) -> bool:
    """Return whether a Content-Length is larger; what is no number is none, whatever its length."""
    digits = content_length.strip().lstrip(b"0")
    return digits.isdigit() and (len(digits) > len(str(limit_bytes)) or int(digits) > limit_bytes)


def without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return the head of a request that asks for no upgrade, and else for the same."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            kept = [token for token in value.split(b",") if token.strip().lower() not in _OF_UPGRADES]
            if kept:
                lines.append(b"connection:" + b",".join(kept))
        elif name not in _OF_UPGRADES:
            lines.append(name + b": " + value)
    return b"\r\n".join([*lines, b"", b""])
