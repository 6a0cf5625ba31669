"""What must not be said: secrets, and the text of queries, taken out of the words of others.

Libraries, nodes and handlers quote what they were given: whole, cut, in other letters, or as a part of a URL. So what
is looked for are not the texts alone, but every longer run of characters that the words have in common with one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import quote, quote_plus

SECRET_RUN_CHARS: Final = 12
"""So much of a secret in a row is taken out: it is no accident."""

QUERY_RUN_CHARS: Final = 16
"""The same for a query's text, in which ordinary words may stand; there, a run begins where a word does."""

SEARCHED_CHARS: Final = 8192
"""In so much of a long query, from its begin on, parts are looked for; the whole of it is found at any length."""

MOST_CHARS: Final = 100_000
"""Of words that are longer only the begin is kept: they quote a whole book."""

_FEW_CHARS: Final = 512
"""In so few, it is cheaper to look for each run than to take a long query apart."""

_SHORTEST_QUOTE: Final = 3
_UNMISTAKABLE: Final = 8
"""What is shorter than this is in every other word."""

_QUOTED: Final = re.compile(r"(?<!\w)(b?['\"])(.{3,}?)(['\"])(?!\w)")


def redact(text: str, *secrets: str | None) -> str:
    """Return `text` without any of `secrets`, nor a longer part of one: each is replaced by `***`."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
        text = _without_runs(text, [secret], SECRET_RUN_CHARS, "***", within_words=True)
    return text


def without_query(words: str, body: str) -> str:
    """Return what an exception says, without the text of the query that many of them quote."""
    if len(body) < _SHORTEST_QUOTE:
        return words
    mark = "(the query)"
    if len(words) > MOST_CHARS:
        kept = SEARCHED_CHARS // 2
        words = f"{words[:kept]} [... {len(words) - kept} more characters]"
    whole = _forms(body) if len(body.strip()) <= len(words) else ()  # what is longer than the words is not in them
    for text in sorted(whole, key=len, reverse=True):
        # A short word is only taken out where it stands alone: it may be part of any other.
        if len(text) < _UNMISTAKABLE and text.isascii() and text.isalnum():
            words = re.sub(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])", mark, words)
        else:
            words = words.replace(text, mark)
    begin = body[:SEARCHED_CHARS]
    words = _without_runs(words, _forms(begin), QUERY_RUN_CHARS, mark)
    # What stands in quotation marks is data: of a query, a word of it is enough.
    return _QUOTED.sub(lambda found: f"{found[1]}{mark}{found[3]}" if _is_part(found[2], begin) else found[0], words)


def _forms(body: str) -> set[str]:
    """Return how a text may be written."""
    escaped = (repr(body), json.dumps(body), ascii(body))
    whole = {body, *(each[1:-1] for each in escaped), str(body.encode())[2:-1]}
    whole |= {quote(body), quote(body, safe=""), quote_plus(body)}
    return {form for each in whole for form in (each, each.strip()) if len(form) >= _SHORTEST_QUOTE}


def _is_part(text: str, body: str) -> bool:
    """Return whether a text is some whole words of a body, in whatever letters."""
    return re.search(rf"(?<![^\W_]){re.escape(text)}(?![^\W_])", body, re.IGNORECASE) is not None


def _without_runs(text: str, forms: Iterable[str], least: int, mark: str, *, within_words: bool = False) -> str:
    """Return a text without the runs of `least` characters and more that it shares with a form, in whatever letters."""
    lower, forms = _lowered(text), [_lowered(form) for form in forms]
    known: Callable[[str], bool]
    if len(text) < _FEW_CHARS:
        known = _in_one_of(forms)
    else:
        known = {form[at : at + least] for form in forms for at in range(len(form) - least + 1)}.__contains__
    parts: list[str] = []
    at = kept = 0
    while at <= len(text) - least:
        begins = within_words or at == 0 or not (text[at - 1].isalnum() and text[at].isalnum())
        if not begins or not known(lower[at : at + least]):
            at += 1
            continue
        parts += (text[kept:at], mark)
        at += least
        while at < len(text) and known(lower[at - least + 1 : at + 1]):
            at += 1
        kept = at
    return "".join((*parts, text[kept:]))


def _in_one_of(forms: list[str]) -> Callable[[str], bool]:
    return lambda run: any(run in form for form in forms)


def _lowered(text: str) -> str:
    """Return a text in small letters, each in its place: some have no small one of the same length."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(s if len(s := each.lower()) == 1 else each for each in text)
