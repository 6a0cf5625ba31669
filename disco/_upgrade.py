"""Which upgrade requests may open a WebSocket: their path, rate and token."""

from __future__ import annotations

from urllib.parse import parse_qs

from disco._hub import Hub
from shared.config.tokens import TokenError, verify


class UpgradeRefused(Exception):
    """An upgrade request gets `status` with `{"error": error}`; `reason` is for the log."""

    def __init__(
        self,
        status: int,
        error: str,
        reason: str,
    ) -> None:
        self.status = status
        self.error = error
        self.reason = reason


def check_upgrade(target: str, hub: Hub) -> str | None:
    """Check the path, rate and token of an upgrade request, and return the `sub` of the token.

    Returns None if the node requires no token.

    Args:
        target: the request target, such as `/ws?token=...`.
        hub: the node.

    Raises:
        UpgradeRefused: if the request may not open a WebSocket.
    """
    path, _, query = target.partition("?")
    if path != "/ws":
        raise UpgradeRefused(404, "not_found", "agents connect to /ws only")
    # Before the token is checked: so the rate limit also bounds how many tokens a client can guess,
    # and how much time their checks cost.
    if not hub.admits_connection():
        raise UpgradeRefused(429, "rate_limited", "too many connections a second")
    secret = hub.settings.secret
    if secret is None:
        return None
    tokens = parse_qs(query).get("token")
    if not tokens:
        raise UpgradeRefused(401, "unauthorized", "no token")
    try:
        return verify(tokens[0], secret.reveal()).subject
    except TokenError as exc:
        # The client gets no detail: it could tell a forger which part of a token is still wrong.
        raise UpgradeRefused(401, "unauthorized", str(exc)) from None
