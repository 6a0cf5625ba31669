"""The head of an HTTP request (RFC 9112, 2 and 3).

The parser checks the syntax. This module has the checks that the parser does not make.
"""

from __future__ import annotations

import msgspec

Headers = list[tuple[bytes, bytes]]
"""A request's headers in the order in which they arrived. Their names are in lower case."""


class BadHead(Exception):
    """A head that gets a 400 response with this text."""


class RequestHead(msgspec.Struct, frozen=True):
    """The request line and the headers of one request, without trailers.

    Attributes:
        method: the method, such as b"GET".
        url: the path and the query string, as the client wrote them.
        version: the version of HTTP, such as "1.1".
        headers: all headers.
        keep_alive: whether the client may send another request on this connection.
        client: the client's address and port, None if unknown.
    """

    method: bytes
    url: bytes
    version: str
    headers: Headers
    keep_alive: bool
    client: tuple[str, int] | None

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for `100 Continue` before it sends the body."""
        # RFC 9110, 10.1.1: the value is case-insensitive, and a server ignores it in HTTP/1.0.
        for name, value in self.headers:
            if name == b"expect" and value.lower() == b"100-continue":
                return self.version == "1.1"
        return False


def resolve_target(url: bytes, version: str, headers: Headers) -> tuple[bytes, Headers]:
    """Return the path and query of a request's target, and the headers with the true Host.

    A target may also be a whole URL. Its host then replaces that of the Host header.

    Raises:
        BadHead: if an HTTP/1.1 request has no Host header, or any request has several.
    """
    # RFC 9112, 3.2: a server must reject these with 400. With several hosts, this server and a
    # proxy in front of it could take different ones, and a client could bypass the check of allowed
    # hosts.
    hosts = [name for name, _ in headers].count(b"host")
    if hosts > 1 or (hosts == 0 and version != "1.0"):
        raise BadHead("a request must have exactly one Host header")
    if url.startswith(b"/") or b"://" not in url:
        return url, headers

    # RFC 9112, 3.2.2: the host of a target in absolute form replaces the Host header.
    authority, slash, rest = url.partition(b"://")[2].partition(b"/")
    mark = query = b""
    if not slash:
        # RFC 9110, 4.2.3: an empty path equals "/", also before a query (`http://host?query`).
        authority, mark, query = authority.partition(b"?")
    others = [(name, value) for name, value in headers if name != b"host"]
    return b"/" + rest + mark + query, [*others, (b"host", authority)]


def offers_websocket(headers: Headers) -> bool:
    """Return whether a request offers to switch to the WebSocket protocol."""
    # RFC 9110, 7.8: Upgrade counts only if Connection names it. A proxy that does not know the
    # header forwards it, but drops what Connection names.
    options: list[bytes] = []
    upgrade = b""
    for name, value in headers:
        if name == b"connection":
            options += [option.strip().lower() for option in value.split(b",")]
        elif name == b"upgrade":
            upgrade = value.lower()
    return upgrade == b"websocket" and b"upgrade" in options


def declares_more_than(limit_bytes: int, content_length: bytes) -> bool:
    """Return whether a Content-Length is larger than a limit. An invalid one is not."""
    digits = content_length.strip().lstrip(b"0")
    if not digits.isdigit():
        return False
    # The number of digits first: Python raises ValueError for very long numbers, and the conversion
    # takes quadratic time.
    return len(digits) > len(str(limit_bytes)) or int(digits) > limit_bytes
