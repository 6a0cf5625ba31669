"""Who may open a WebSocket: the path, the rate and the token of an upgrade request (PROTOCOL.md, 1)."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs

import msgspec

from shared.tokens import Secret, TokenError, verify

PATH: Final = "/ws"


class Admit(msgspec.Struct, frozen=True):
    """Go on with the upgrade. `subject` is the token's `sub`, None without authentication."""

    subject: str | None


class Reject(msgspec.Struct, frozen=True):
    """Answer `status` with `{"error": error}`; `why` is for the log."""

    status: int
    error: str
    why: str


def is_agent_path(target: str) -> bool:
    """Return whether a request target is the one that agents connect to."""
    return target.partition("?")[0] == PATH


def authenticate(target: str, secret: Secret | None) -> Admit | Reject:
    """Return whether the token in the query of a request target is good.

    Args:
        target: the request target, such as `/ws?token=...`.
        secret: what tokens are signed with; None admits everybody.
    """
    if secret is None:
        return Admit(None)
    tokens = parse_qs(target.partition("?")[2]).get("token")
    if not tokens:
        return Reject(401, "unauthorized", "no token")
    try:
        return Admit(verify(tokens[0], secret.reveal()).subject)
    except TokenError as exc:
        return Reject(401, "unauthorized", str(exc))
