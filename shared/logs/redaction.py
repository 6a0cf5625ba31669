"""Removes secrets from texts of libraries, nodes and handlers.

Such a text may quote a secret that its author received: all of it, truncated, or in a URL. So each
run of at least 12 characters that the text has in common with a secret is removed too.
"""

from __future__ import annotations

from typing import Final

_MIN_RUN_CHARS: Final = 12
"""A text and a secret may have a shorter run in common by coincidence."""

_MARK: Final = "***"


def redact(text: str, *secrets: str | None) -> str:
    """Return `text` with `***` for each of `secrets` and for parts of at least 12 characters."""
    for secret in filter(None, secrets):
        text = _without_runs(text.replace(secret, _MARK), secret)
    return text


def _without_runs(text: str, secret: str) -> str:
    """Replace each run of at least `_MIN_RUN_CHARS` characters that also occurs in `secret`.

    Upper and lower case count as equal, because some libraries change the case of a host.
    """
    lower = _lowered(text)
    secret = _lowered(secret)
    starts = range(len(secret) - _MIN_RUN_CHARS + 1)
    runs = {secret[at : at + _MIN_RUN_CHARS] for at in starts}
    parts: list[str] = []
    # A window of `_MIN_RUN_CHARS` characters moves over the text, so the time is linear in its
    # length.
    at = kept = 0
    while at <= len(text) - _MIN_RUN_CHARS:
        if lower[at : at + _MIN_RUN_CHARS] not in runs:
            at += 1
            continue
        parts += (text[kept:at], _MARK)
        at += _MIN_RUN_CHARS
        # The run may be longer than the window: extend it while its last characters still match.
        while at < len(text) and lower[at - _MIN_RUN_CHARS + 1 : at + 1] in runs:
            at += 1
        kept = at
    return "".join((*parts, text[kept:]))


def _lowered(text: str) -> str:
    """Return a text in lower case with each character at the same index.

    `str.lower` returns two characters for some letters, such as U+0130.
    """
    parts = []
    for char in text:
        lower = char.lower()
        parts.append(lower if len(lower) == 1 else char)
    return "".join(parts)
