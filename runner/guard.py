"""Who may ask the runner: its own user's programs, or whoever has the token. Never a web page.

Without a token the runner listens on loopback only, but a browser on this machine can reach that
too, on behalf of any page: by a name that its owner points at 127.0.0.1 (DNS rebinding), or by a
cross-site form or fetch. The first shows in `Host`, the second in `Origin`.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from runner.answers import error
from shared.config import HttpAddress
from shared.tokens import Secret

_OPEN_PATH: Final = "/health"


class BearerToken:
    """Asks every request but those to /health for `Authorization: Bearer`, compared in constant time."""

    def __init__(self, app: ASGIApp, token: Secret) -> None:
        self._app = app
        self._expected = b"Bearer " + token.reveal().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and scope["path"] != _OPEN_PATH:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = error(401, "a bearer token is needed: Authorization: Bearer TOKEN", www_authenticate="Bearer")
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LocalOnly:
    """Refuses requests that a web page had a browser make: a `Host` that is not ours, an `Origin` that is not `Host`.

    Args:
        app: what is guarded.
        address: where the runner listens; its name is one of ours.
    """

    def __init__(self, app: ASGIApp, address: HttpAddress) -> None:
        self._app = app
        self._names = frozenset({"localhost", address.host.lower()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http" and (words := self._objection(scope)):
            await error(403, words)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self, scope: Scope) -> str:
        """Return why a request is refused, or an empty text."""
        host = origin = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
        if not self._is_ours(host):
            return "the Host of this request is not this runner's; ask by address, such as 127.0.0.1, or use a token"
        if origin and origin.partition(b"://")[2] != host:
            return "requests on behalf of other sites' pages are refused"
        return ""

    def _is_ours(self, host: bytes) -> bool:
        # HTTP/1.0 clients may send none; browsers always do.
        if not host:
            return True
        text = host.decode("latin-1").lower()
        name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
        return name in self._names or _is_address(name)


def _is_address(text: str) -> bool:
    """Return whether a host is an IP address: nobody can point that elsewhere."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
