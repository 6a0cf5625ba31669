"""What must not be said: secrets, and the text of queries, taken out of the words of others.

Libraries, nodes and handlers quote what they were given: whole, cut, in other letters, or as a part of a URL. So what
is looked for are not the texts alone, but every longer run of characters that the words have in common with one. What
that takes is bounded, whatever a peer sends: words are cut first, and of a long query both ends are looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Final
from urllib.parse import quote, quote_plus

from shared.logs import shortened

SECRET_RUN_CHARS: Final = 12
"""So much of a secret in a row is taken out: it is no accident."""

QUERY_RUN_CHARS: Final = 16
"""The same for a query's text, in which ordinary words may stand; there, a run begins where a word does."""

LONGEST_WORDS: Final = 8192
"""Words that are longer are cut in their middle."""

SEARCHED_CHARS: Final = 32_768
"""In so much of a query, from either end, parts are looked for: in the whole of any that comes over HTTP."""

_ESCAPED_CHARS: Final = 2048
"""The same for those ways to write it that make several characters of one."""

_SHORTEST_QUOTE: Final = 3
_UNMISTAKABLE: Final = 8
"""What is shorter than this is in every other word."""

_QUOTED: Final = re.compile(r"(?<!\w)(b?['\"])([^'\"\n]{3,200})(['\"])(?!\w)")
_MARK: Final = "(the query)"


def redact(text: str, *secrets: str | None) -> str:
    """Return `text` without any of `secrets`, nor a longer part of one: each is replaced by `***`."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
        text = _without_runs(text, [_lowered(secret)], SECRET_RUN_CHARS, "***", within_words=True)
    return text


class Discretion:
    """Leaves the text of one query out of what is said of it."""

    def __init__(self, body: str) -> None:
        self._body = body

    def __call__(self, words: str, *, quoted: bool = True) -> str:
        """Return words, at most some thousand characters of them, without what they quote of the query.

        With `quoted`, what stands in quotation marks is data: of the query, a word of it is enough.
        """
        words = shortened(words, LONGEST_WORDS)
        if len(self._body) < _SHORTEST_QUOTE:
            return words
        for text in self._forms:
            # A short word is only taken out where it stands alone: it may be part of any other.
            if len(text) < _UNMISTAKABLE and text.isascii() and text.isalnum():
                words = re.sub(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])", _MARK, words)
            elif len(text) <= len(words):
                words = words.replace(text, _MARK)
        words = _without_runs(words, self._lowered_forms, QUERY_RUN_CHARS, _MARK)
        if not quoted:
            return words
        return _QUOTED.sub(lambda found: f"{found[1]}{_MARK}{found[3]}" if self._has(found[2]) else found[0], words)

    @cached_property
    def _forms(self) -> list[str]:
        """How the query, or either end of it, may be written; the longest first."""
        forms = {self._body} if len(self._body) <= LONGEST_WORDS else set()
        forms |= _ends(self._body, SEARCHED_CHARS)
        for end in _ends(self._body, _ESCAPED_CHARS):
            escaped = (repr(end), json.dumps(end), ascii(end))
            forms |= {end, *(each[1:-1] for each in escaped), str(end.encode())[2:-1]}
            forms |= {quote(end), quote(end, safe=""), quote_plus(end)}
        found = {form for each in forms for form in (each, each.strip()) if len(form) >= _SHORTEST_QUOTE}
        return sorted(found, key=len, reverse=True)

    @cached_property
    def _lowered_forms(self) -> list[str]:
        return [_lowered(form) for form in self._forms]

    def _has(self, text: str) -> bool:
        """Return whether a text is some whole words of the query, in whatever letters."""
        text = _lowered(text)
        for form in self._lowered_forms:
            at = form.find(text)
            while at >= 0:
                end = at + len(text)
                if not (form[at - 1 : at].isalnum() and text[0].isalnum()) and not (
                    form[end : end + 1].isalnum() and text[-1].isalnum()
                ):
                    return True
                at = form.find(text, end)
        return False


def _ends(text: str, chars: int) -> set[str]:
    return {text} if len(text) <= chars else {text[:chars], text[-chars:]}


def _without_runs(text: str, forms: Iterable[str], least: int, mark: str, *, within_words: bool = False) -> str:
    """Return a text without the runs of `least` characters and more that it shares with a form in small letters."""
    lower = _lowered(text)
    there = {lower[at : at + least] for at in range(len(lower) - least + 1)}
    runs: set[str] = set()
    for form in forms:
        runs |= there.intersection(form[at : at + least] for at in range(len(form) - least + 1))
    if not runs:
        return text
    parts: list[str] = []
    at = kept = 0
    while at <= len(text) - least:
        begins = within_words or at == 0 or not (text[at - 1].isalnum() and text[at].isalnum())
        if not begins or lower[at : at + least] not in runs:
            at += 1
            continue
        parts += (text[kept:at], mark)
        at += least
        while at < len(text) and lower[at - least + 1 : at + 1] in runs:
            at += 1
        kept = at
    return "".join((*parts, text[kept:]))


def _lowered(text: str) -> str:
    """Return a text in small letters, each in its place: some have no small one of the same length."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(s if len(s := each.lower()) == 1 else each for each in text)
