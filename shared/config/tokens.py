"""Reads, signs and checks JWTs.

em_disco issues HS256 tokens with the claims `sub` (the agent's name), `iat` and `exp`. They are
valid for a day, and a worker runs for months. So a token is read from its source on every
connection attempt. Functions here do not log, and no error text contains a token or a secret.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jwt
import msgspec

from shared.errors import ConfigError

MIN_SECRET_BYTES: Final = 32
"""RFC 7518, section 3.2: an HS256 key must have at least the size of the hash."""

_ALGORITHM: Final = "HS256"

# em_disco checks a token only at the WebSocket upgrade, so an hour is more than enough for one
# connection attempt. It also covers a node whose clock is some minutes ahead.
_MINTED_TTL_S: Final = 3600


class Secret:
    """A string that a repr, a log line or a traceback with local variables does not show."""

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


class TokenError(Exception):
    """A token is unavailable or invalid. The text has the source and the reason, not the token."""


class TokenSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where an agent's token comes from. At most one field is set.

    Attributes:
        token: the token.
        token_file: a file that contains the token.
        secret_file: a file that contains the secret with which a token is signed.
        variable: the environment variable that contains the token.
    """

    token: Secret | None = None
    token_file: Path | None = None
    secret_file: Path | None = None
    variable: str | None = None

    def describe(self) -> str:
        """Return where the token comes from, for a table or a log."""
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
        """Return the token for a connection attempt, or None if no token is configured.

        Args:
            subject: the agent's name. A minted token has it as `sub`.
            environ: the environment with `variable`.

        Raises:
            TokenError: if a file cannot be read or is empty, or the variable is not set.
        """
        if self.token is not None:
            return self.token.reveal()
        if self.token_file is not None:
            return read_secret_file(self.token_file)
        if self.secret_file is not None:
            return mint(read_secret_file(self.secret_file), subject, ttl_s=_MINTED_TTL_S)
        if self.variable is None:
            return None
        token = environ.get(self.variable, "").strip()
        if not token:
            raise TokenError(f"the environment variable {self.variable} is no longer set")
        return token


class TokenClaims(msgspec.Struct, frozen=True):
    """The claims of a token. `issued_at` and `expires_at` are Unix seconds."""

    subject: str | None
    issued_at: float | None
    expires_at: float | None

    def problems(self, subject: str, now: float | None = None) -> list[str]:
        """Return the reasons for which em_disco would refuse this token from agent `subject`."""
        now = time.time() if now is None else now
        found = []
        if self.subject is None:
            found.append("the token has no 'sub' claim")
        elif self.subject != subject:
            found.append(f"the token's sub is {self.subject!r}, not the agent's name {subject!r}")
        if self.expires_at is None:
            found.append("the token has no 'exp' claim")
        elif self.expires_at <= now:
            found.append(f"the token expired {_duration(now - self.expires_at)} ago")
        return found


def read_secret_file(path: Path) -> str:
    """Return the token or secret in a file, without the white space around it.

    Raises:
        TokenError: if the file cannot be read, is empty, is not text, or other users can read it.
    """
    try:
        with path.open("rb") as file:
            # The mode of the open file: the path could name another file a moment later.
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
    """Check that only its owner can read a file with a secret. `mode` is the file's `st_mode`.

    Raises:
        TokenError: if the file's group or others can read it.
    """
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        shown = f"mode {stat.S_IMODE(mode):04o}"
        raise TokenError(f"others can read {path} ({shown}); run: chmod 600 {path}")


def mint(
    secret: str,
    subject: str,
    *,
    ttl_s: float,
    now: float | None = None,
) -> str:
    """Return a signed token for `subject`, valid for `ttl_s` seconds from `now` (Unix seconds).

    Raises:
        TokenError: if the secret is a key of a key pair, which must not be used with HS256.
    """
    now = time.time() if now is None else now
    claims = {"sub": subject, "iat": int(now), "exp": int(now + ttl_s)}
    try:
        return jwt.encode(claims, _hmac_key(secret), algorithm=_ALGORITHM)
    except jwt.PyJWTError as exc:
        raise TokenError(f"no token can be signed with this secret: {exc}") from None


def inspect(token: str) -> TokenClaims:
    """Return a token's claims without checking its signature: only em_disco has the secret.

    Raises:
        TokenError: if it is not a JWT, or its claims have the wrong types.
    """
    # Without the signature PyJWT checks no claim either, unless an option asks for it.
    return _claims(token, options={"verify_signature": False})


def verify(token: str, secret: str) -> TokenClaims:
    """Return the claims of a token after the checks that an embedded node makes.

    Raises:
        TokenError: if it is malformed, has another signature, is expired, or lacks `sub` or `exp`.
    """
    return _claims(
        token,
        key=_hmac_key(secret),
        algorithms=[_ALGORITHM],
        options={"require": ["sub", "exp"], "verify_iat": False},
    )


def _hmac_key(secret: str) -> bytes:
    """Return the key for a secret, with at least `MIN_SECRET_BYTES`.

    PyJWT writes a warning to standard error for each use of a shorter key. `em-runner check`
    reports a short secret instead.
    """
    # HMAC itself pads a key with zeros to its block size of 64 bytes (RFC 2104, section 2), so
    # zeros at the end do not change the signature.
    return secret.encode().ljust(MIN_SECRET_BYTES, b"\0")


def _claims(token: str, **decoding: Any) -> TokenClaims:
    try:
        claims = jwt.decode(token, **decoding)
        found = msgspec.convert(
            {
                "subject": claims.get("sub"),
                "issued_at": claims.get("iat"),
                "expires_at": claims.get("exp"),
            },
            TokenClaims,
        )
    except (jwt.PyJWTError, msgspec.ValidationError) as exc:
        raise TokenError(f"not a valid token: {exc}") from None
    except (ValueError, TypeError, OverflowError, RecursionError):
        # Fuzzing found these for claims of unexpected shapes. Their texts may quote the token.
        raise TokenError("not a valid token: its claims cannot be read") from None
    # Python's JSON parser accepts infinity and NaN. A token with such an `exp` would never expire.
    times = (found.issued_at, found.expires_at)
    if not all(math.isfinite(at) for at in times if at is not None):
        raise TokenError("not a valid token: 'iat' and 'exp' must be numbers of seconds")
    return found


def require_strong(secret: str, where: str) -> str:
    """Return `secret` if it is long enough to sign with.

    Raises:
        ConfigError: if it has fewer than `MIN_SECRET_BYTES`.
    """
    size = len(secret.encode())
    if size < MIN_SECRET_BYTES:
        raise ConfigError(
            f"{where}: the secret has {size} bytes, at least {MIN_SECRET_BYTES} are needed; "
            "make one with: openssl rand -hex 32"
        )
    return secret


def _duration(seconds: float) -> str:
    units = (
        (86_400, "day"),
        (3600, "hour"),
        (60, "minute"),
    )
    for size, unit in units:
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{int(seconds)} s"
