"""JWTs: read, mint, inspect, verify.

em_disco asks for an HS256 token whose `sub` is the agent's name (claims `sub`, `iat`, `exp`). A
token is read afresh at each connect, because em_disco issues them for a day and a worker lives
for months. No function here logs, and no error text holds a token or a secret.
"""

from __future__ import annotations

import math
import os
import stat
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec

from shared.errors import ConfigError

ALGORITHM: Final = "HS256"
MINTED_TTL_S: Final = 3600
"""How long a token minted for one connect is valid. em_disco checks it at the upgrade only."""

MIN_SECRET_BYTES: Final = 32
"""RFC 7518, 3.2: a key of the hash's size or larger must be used with HS256."""

# PyJWT would tell of a short secret on standard error; `em-runner check` does so in words of ours.
warnings.filterwarnings("ignore", message="The HMAC key is", category=UserWarning)


class Secret:
    """A string that shows itself to nobody: not in a repr, a log line, or a traceback's locals."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret text. Call it where the text is used, and keep no reference."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self._value,)


class TokenError(Exception):
    """A token cannot be had, or is refused; the text says which and why, never the token."""


class TokenSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where one agent's token comes from; at most one of the fields is set.

    `token` is the token itself, `token_file` a file that holds it, `secret_file` a file with the
    secret from which a short-lived one is minted, `variable` the environment variable that holds it.
    """

    token: Secret | None = None
    token_file: Path | None = None
    secret_file: Path | None = None
    variable: str | None = None

    def describe(self) -> str:
        """Return where the token comes from, in words fit for a table or a log."""
        if self.token is not None:
            return "configured"
        if self.token_file is not None:
            return f"file {self.token_file}"
        if self.secret_file is not None:
            return f"minted with {self.secret_file}"
        if self.variable is not None:
            return f"environment {self.variable}"
        return "none"

    def read(self, subject: str, environ: Mapping[str, str] = os.environ) -> str | None:
        """Return the token to send now, or None when none is configured.

        Args:
            subject: the agent's name, which a minted token carries as `sub`.
            environ: the environment that `variable` is looked up in.

        Raises:
            TokenError: when a file cannot be read or is empty, or the variable is not set.
        """
        if self.token is not None:
            return self.token.reveal()
        if self.token_file is not None:
            return read_secret_file(self.token_file)
        if self.secret_file is not None:
            return mint(read_secret_file(self.secret_file), subject, ttl_s=MINTED_TTL_S)
        if self.variable is not None:
            token = environ.get(self.variable, "").strip()
            if not token:
                raise TokenError(f"the environment variable {self.variable} is not set any more")
            return token
        return None


class TokenClaims(msgspec.Struct, frozen=True):
    """What a token says of itself. `issued_at` and `expires_at` are Unix seconds."""

    subject: str | None
    issued_at: float | None
    expires_at: float | None

    def problems(self, subject: str, now: float | None = None) -> list[str]:
        """Return why em_disco would refuse this token for `subject`; an empty list means it would not."""
        now = time.time() if now is None else now
        found = []
        if self.subject is None:
            found.append("the token has no 'sub' claim")
        elif self.subject != subject:
            found.append(f"the token's sub is {self.subject!r}, not the agent's name {subject!r}")
        if self.expires_at is None:
            found.append("the token has no 'exp' claim")
        elif self.expires_at <= now:
            found.append(f"the token expired {_ago(now - self.expires_at)} ago")
        return found


def read_secret_file(path: Path) -> str:
    """Return the text of a file that holds one token or secret, without the white space around it.

    Raises:
        TokenError: when it cannot be read, is empty, is not text, or others can read it too.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise TokenError(f"{path} is not a text file") from None
    except OSError as exc:
        raise TokenError(f"cannot read {path}: {exc.strerror}") from None
    require_private(path, mode)
    if not text:
        raise TokenError(f"{path} is empty")
    return text


def require_private(path: Path, mode: int) -> None:
    """Check that nobody but its owner can read a file that holds a secret; `mode` is its `st_mode`.

    Raises:
        TokenError: when its group or others can.
    """
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise TokenError(f"others can read {path} (mode {stat.S_IMODE(mode):04o}); run: chmod 600 {path}")


def mint(secret: str, subject: str, *, ttl_s: float, now: float | None = None) -> str:
    """Return a signed token for `subject`, valid for `ttl_s` seconds from `now` (Unix seconds).

    Raises:
        TokenError: when the secret is one half of a key pair, which HS256 must not be used with.
    """
    now = time.time() if now is None else now
    claims = {"sub": subject, "iat": int(now), "exp": int(now + ttl_s)}
    try:
        return jwt.encode(claims, secret, algorithm=ALGORITHM)
    except jwt.PyJWTError as exc:
        raise TokenError(f"no token can be signed with this secret: {exc}") from None


def inspect(token: str) -> TokenClaims:
    """Return a token's claims without checking its signature (only em_disco holds the secret).

    Raises:
        TokenError: when it is not a JWT, or its claims have the wrong types.
    """
    return _claims(
        lambda: jwt.decode(
            token,
            options={"verify_signature": False, "verify_exp": False, "verify_iat": False, "verify_sub": False},
        )
    )


def verify(token: str, secret: str) -> TokenClaims:
    """Return the claims of a token whose signature and expiry hold, as em_disco checks them.

    Raises:
        TokenError: when it is malformed, signed with another secret, expired, or lacks `sub` or `exp`.
    """
    return _claims(
        lambda: jwt.decode(
            token, secret, algorithms=[ALGORITHM], options={"require": ["sub", "exp"], "verify_iat": False}
        )
    )


def _claims(decode: Callable[[], dict[str, Any]]) -> TokenClaims:
    try:
        claims = decode()
        found = msgspec.convert(
            {"subject": claims.get("sub"), "issued_at": claims.get("iat"), "expires_at": claims.get("exp")}, TokenClaims
        )
    except (jwt.PyJWTError, msgspec.ValidationError) as exc:
        raise TokenError(f"not a valid token: {exc}") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        # Seen by fuzzing the decoder with claims of absurd shapes; the text could hold parts of the token.
        raise TokenError("not a valid token: its claims cannot be read") from None
    if not all(math.isfinite(at) for at in (found.issued_at, found.expires_at) if at is not None):
        raise TokenError("not a valid token: 'iat' and 'exp' must be numbers of seconds")
    return found


def require_strong(secret: str, where: str) -> str:
    """Return `secret` when it is long enough to sign with.

    Raises:
        ConfigError: when it is shorter than RFC 7518 asks of HS256.
    """
    if len(secret.encode()) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where}: the secret has {len(secret.encode())} bytes, at least {MIN_SECRET_BYTES} are needed; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{int(seconds)} s"
