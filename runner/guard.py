"""Who may ask the runner: its own user's programs, or whoever has the token. Never a web page.

Without a token the runner listens on loopback only, but a browser on this machine can reach that
too, on behalf of any page: by a name that its owner points at 127.0.0.1 (DNS rebinding), or by a
cross-site form or fetch. The first shows in `Host`, the second in `Origin`.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import Final, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from runner.answers import Refusal
from shared.config import HttpAddress
from shared.nodes import is_address
from shared.tokens import Secret

OPEN_PATH: Final = "/health"
_MOST_HOSTS: Final = 64
_HOST: Final = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]@]*?)\.?)(?::\d*)?")
_NO_TOKEN: Final = Refusal(
    401, "a bearer token is needed: Authorization: Bearer TOKEN", (("www-authenticate", "Bearer"),)
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
    """Asks every request but those to /health for `Authorization: Bearer`, compared in constant time."""

    def __init__(self, token: Secret) -> None:
        self._expected = token.reveal().encode()

    def objection(self, headers: Headers, path: str = "") -> Refusal | None:
        """Return why a request is refused, or None."""
        if path == OPEN_PATH:
            return None
        for name, value in headers:
            if name == b"authorization":
                scheme, _, given = value.strip().partition(b" ")
                right = hmac.compare_digest(given.strip(), self._expected)
                return None if right and scheme.lower() == b"bearer" else _NO_TOKEN
        return _NO_TOKEN


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
        host = origin = b""
        for name, value in headers:
            if name == b"host":
                host = value.strip()
            elif name == b"origin":
                origin = value.strip()
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


class Guarded:
    """An ASGI application behind a guard."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and (refusal := self._guard.objection(scope["headers"], scope["path"])):
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)
