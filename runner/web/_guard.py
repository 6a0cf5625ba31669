"""Decides which clients may send requests: programs of this machine, or programs with the token.

Without a token the runner listens on loopback only. A browser on this machine can reach that too,
and any web page can use the browser for this:

- With DNS rebinding, a page's owner points the page's name at 127.0.0.1. `Host` has that name.
- With a form or `fetch`, a page sends a request to another site. `Origin` has the page's site.

With a token, a browser asks its user for it as the password of HTTP's Basic scheme. It then adds
the password to the requests of any page. So `Origin` is checked for Basic, too.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol

from runner.web.answers import ErrorResponse
from runner.web.dashboard import PATHS
from shared.config.load import HttpAddress
from shared.config.nodes import is_ip_address
from shared.config.tokens import Secret
from shared.http.errors import ErrorCode
from shared.logs.logger import LogThrottle, get_logger

_OPEN_PATH: Final = "/health"
"""Monitoring asks for it without a token. It reveals only that the process runs."""

_CACHED_HOSTS: Final = 64

_HOST: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]@]*?)\.?)(?::\d*)?")
"""An IPv6 address in brackets, or a name or IPv4 address; then a port (RFC 9110, 7.2)."""

_NO_TOKEN: Final = ErrorResponse(
    ErrorCode.UNAUTHORIZED,
    "a bearer token is needed: Authorization: Bearer TOKEN",
    (("www-authenticate", "Bearer"),),
)
_NO_PASSWORD: Final = ErrorResponse(
    ErrorCode.UNAUTHORIZED,
    "a token is needed: as a password in a browser, or Authorization: Bearer TOKEN",
    (
        (
            "www-authenticate",
            'Basic realm="em-runner: the token is the password", charset="UTF-8"',
        ),
    ),
)
_FOREIGN_HOST: Final = ErrorResponse(
    ErrorCode.FOREIGN_HOST,
    "the Host of this request is not this runner's; "
    "ask by address, such as 127.0.0.1, or use a token",
)
_FOREIGN_ORIGIN: Final = ErrorResponse(
    ErrorCode.FOREIGN_ORIGIN,
    "requests on behalf of other sites' pages are refused",
)

_Headers = Sequence[tuple[bytes, bytes]]
"""A request's headers. Their names are in lower case."""


class Guard(Protocol):
    """Decides by a request's headers whether it is refused."""

    def check(self, headers: _Headers, path: str = "") -> ErrorResponse | None:
        """Return why a request is refused, or None. A direct query has an empty `path`."""


class TokenGuard:
    """Requires the token in every request except for /health.

    Programs send `Authorization: Bearer`, browsers `Basic` with the token as the password and any
    user name.
    """

    def __init__(self, token: Secret) -> None:
        self._expected = token.reveal().encode()

    def check(self, headers: _Headers, path: str = "") -> ErrorResponse | None:
        """Return why a request is refused, or None."""
        if path == _OPEN_PATH:
            return None
        # HTTP allows one such header (RFC 9110, 5.3). If there are several, a proxy in front of the
        # runner may have checked another one than the runner would.
        given = [value for name, value in headers if name == b"authorization"]
        authorization = given[0].strip() if len(given) == 1 else b""
        scheme, _, credentials = authorization.partition(b" ")
        # RFC 9110, 11.1: the name of a scheme is case-insensitive.
        scheme = scheme.lower()
        if scheme == b"bearer" and self._is_right(credentials.strip()):
            # A page cannot make a browser send this header across sites without a preflight
            # request, which the runner never permits.
            return None
        if scheme == b"basic" and self._is_right(_password(credentials)):
            host, origin = _host_and_origin(headers)
            # The URL's scheme may be another one: a proxy in front of it may add TLS.
            if origin in (b"", b"http://" + host, b"https://" + host):
                return None
            return _FOREIGN_ORIGIN
        # Browsers ask their user for the token only on the status page's own paths. Programs get
        # the scheme that is meant for them.
        return _NO_PASSWORD if path in PATHS else _NO_TOKEN

    def _is_right(self, given: bytes) -> bool:
        # In constant time. Otherwise, a client could find the token byte by byte.
        return hmac.compare_digest(given, self._expected)


def _password(credentials: bytes) -> bytes:
    """Return the password of Basic credentials (RFC 7617, 2), or nothing if they are invalid."""
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True)
    except ValueError:
        return b""
    # A user name has no colon, but a password may have some.
    return decoded.partition(b":")[2]


class LocalGuard:
    """Refuses requests that a web page caused: a foreign `Host`, or an `Origin` other than `Host`.

    Args:
        address: where the runner listens. Its name is accepted as a `Host`.
    """

    def __init__(self, address: HttpAddress) -> None:
        self._names = frozenset({"localhost", address.host.lower()})
        # Direct queries have to be fast, and usually have the same host. The cache is bounded,
        # because a client can send any number of hosts.
        self._is_trusted_host = lru_cache(_CACHED_HOSTS)(self._check_host)

    def check(self, headers: _Headers, path: str = "") -> ErrorResponse | None:
        """Return why a request is refused, or None."""
        host, origin = _host_and_origin(headers)
        if not self._is_trusted_host(host):
            return _FOREIGN_HOST
        if origin not in (b"", b"http://" + host):
            return _FOREIGN_ORIGIN
        return None

    def _check_host(self, host: bytes) -> bool:
        # HTTP/1.0 clients may send no Host. Browsers always send one.
        if not host:
            return True
        found = _HOST.fullmatch(host.decode("latin-1").lower())
        if found is None:
            return False
        name = found[1] or found[2]
        # An address is safe: after DNS rebinding, `Host` is the name of the page's site.
        return name in self._names or is_ip_address(name)


def _host_and_origin(headers: _Headers) -> tuple[bytes, bytes]:
    # The server rejects a request with several Host headers (RFC 9112, 3.2), and a browser sends
    # at most one Origin.
    found = dict(headers)
    host = found.get(b"host", b"")
    origin = found.get(b"origin", b"")
    return host.strip(), origin.strip()


class Refusals:
    """Counts requests that were refused before a worker was chosen.

    Attributes:
        by_status: how many were refused with each status.
    """

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self._throttle = LogThrottle("request_refused")
        self._log = get_logger()

    def record(self, refusal: ErrorResponse, client: Sequence[Any] | None) -> None:
        """Count a refusal, and log it if it may be an attack.

        Args:
            refusal: the response to the request.
            client: its address and port, None if unknown.
        """
        self.by_status[refusal.status] += 1
        # Other statuses are mistakes of clients. A log line for each would hide the attacks.
        if refusal.status not in (401, 403):
            return
        host = str(client[0]) if client else "unknown"
        # For each client separately, so that a flood of one does not hide another.
        suppressed = self._throttle.admit(f"{refusal.status} {host}")
        if suppressed is not None:
            self._log.warning(
                "request_refused",
                reason=refusal.message,
                status=refusal.status,
                client=host,
                **suppressed,
            )
