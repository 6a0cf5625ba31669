"""Who may ask the runner: its own user's programs, or whoever has the token. Never another site's web page.

Without a token the runner listens on loopback only, but a browser on this machine can reach that
too, on behalf of any page: by a name that its owner points at 127.0.0.1 (DNS rebinding), or by a
cross-site form or fetch. The first shows in `Host`, the second in `Origin`.

With a token a person's browser gives it as the password of HTTP's Basic scheme, which it asks for
itself. As it then sends it along whoever's page makes the request, `Origin` counts there too.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from runner.answers import Refusal
from runner.dashboard import PATHS
from shared.config import HttpAddress
from shared.logs import Folded, get_logger
from shared.nodes import is_address
from shared.tokens import Secret

OPEN_PATH: Final = "/health"
_MOST_HOSTS: Final = 64
_HOST: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]@]*?)\.?)(?::\d*)?")
_NO_TOKEN: Final = Refusal(
    401, "a bearer token is needed: Authorization: Bearer TOKEN", (("www-authenticate", "Bearer"),)
)
_NO_PASSWORD: Final = Refusal(
    401,
    "a token is needed: as a password in a browser, or Authorization: Bearer TOKEN",
    (("www-authenticate", 'Basic realm="em-runner: the token is the password", charset="UTF-8"'),),
)
_NOT_OURS: Final = Refusal(
    403, "the Host of this request is not this runner's; ask by address, such as 127.0.0.1, or use a token"
)
_ELSEWHERE: Final = Refusal(403, "requests on behalf of other sites' pages are refused")

Headers = Sequence[tuple[bytes, bytes]]
"""A request's headers, their names in lower case."""


class Guard(Protocol):
    """What decides about a request by its headers."""

    def objection(self, headers: Headers, path: str = "") -> Refusal | None:
        """Return why a request is refused, or None. `path` is empty where no path is open to all."""


class BearerToken:
    """Asks every request but those to /health for the token, compared in constant time.

    Programs send `Authorization: Bearer`, browsers `Basic` with the token as the password and any name.
    """

    def __init__(self, token: Secret) -> None:
        self._expected = token.reveal().encode()

    def objection(self, headers: Headers, path: str = "") -> Refusal | None:
        """Return why a request is refused, or None."""
        if path == OPEN_PATH:
            return None
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.strip().partition(b" ")
                if scheme.lower() == b"basic" and self._is_right(_password(given)):
                    host, origin = _host_and_origin(headers)
                    # Before us may stand a proxy that speaks TLS.
                    ours = not origin or origin in (b"http://" + host, b"https://" + host)
                    return None if ours else _ELSEWHERE
                right = self._is_right(given.strip())
                if right and scheme.lower() == b"bearer":
                    return None
                break
        return _NO_PASSWORD if path in PATHS else _NO_TOKEN

    def _is_right(self, given: bytes) -> bool:
        return hmac.compare_digest(given, self._expected)


def _password(credentials: bytes) -> bytes:
    """Return the password of RFC 7617's credentials, or nothing."""
    try:
        return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


class LocalOnly:
    """Refuses requests that a web page had a browser make: a `Host` that is not ours, an `Origin` that is not `Host`.

    Args:
        address: where the runner listens; its name is one of ours.
    """

    def __init__(self, address: HttpAddress) -> None:
        self._names = frozenset({"localhost", address.host.lower()})
        self._known: set[bytes] = set()

    def objection(self, headers: Headers, path: str = "") -> Refusal | None:
        """Return why a request is refused, or None."""
        host, origin = _host_and_origin(headers)
        if host not in self._known:
            if not self._is_ours(host):
                return _NOT_OURS
            if len(self._known) < _MOST_HOSTS:  # any address will do, and there are many
                self._known.add(host)
        if origin and origin != b"http://" + host:
            return _ELSEWHERE
        return None

    def _is_ours(self, host: bytes) -> bool:
        # HTTP/1.0 clients may send none; browsers always do.
        if not host:
            return True
        found = _HOST.fullmatch(host.decode("latin-1").lower())
        if found is None:
            return False
        name = found[1] or found[2]
        return name in self._names or is_address(name)  # nobody can point an address elsewhere


def _host_and_origin(headers: Headers) -> tuple[bytes, bytes]:
    host = origin = b""
    for name, value in headers:
        if name == b"host":
            host = value.strip()
        elif name == b"origin":
            origin = value.strip()
    return host, origin


class Refusals:
    """Requests that were refused before any worker was asked: counted by status, and intruders told of in the log."""

    def __init__(self) -> None:
        self.by_status: Counter[int] = Counter()
        self._folded = Folded(what="request_refused")
        self._log = get_logger("http")

    def note(self, refusal: Refusal, client: Sequence[Any] | None) -> None:
        """Count a refusal; `client` is the address of who asked, where there is one."""
        self.by_status[refusal.status] += 1
        if refusal.status not in (401, 403):
            return
        host = str(client[0]) if client else "unknown"
        if (held := self._folded.admit(f"{refusal.status} {host}")) is not None:
            more = {"like_it_before": held} if held else {}
            self._log.warning("request_refused", status=refusal.status, client=host, why=refusal.message, **more)


class Guarded:
    """An ASGI application behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard, refusals: Refusals) -> None:
        self._app = app
        self._guard = guard
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and (refusal := self._guard.objection(scope["headers"], scope["path"])):
            self._refusals.note(refusal, scope.get("client"))
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
