"""`shared.redaction`: what must not be said is found, however it is quoted; all else stays."""

from __future__ import annotations

import json
import time
from urllib.parse import quote, quote_plus, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.redaction import QUERY_RUN_CHARS, Discretion, redact
from shared.tokens import mint

SECRET = "0123456789abcdef0123456789abcdef"
QUERY = "Zebra|divorce lawyer in Ulm"


def without_query(words: str, body: str) -> str:
    return Discretion(body)(words)


def test_redacted_text_holds_none_of_the_secrets() -> None:
    assert redact("a=tok b=tok c=key", "tok", "key", None, "") == "a=*** b=*** c=***"


def test_part_of_a_token_is_redacted_as_the_whole_is() -> None:
    token = mint(SECRET, "echo", ttl_s=60)
    for part in (token[-100:], token[40:], *token.split("."), token[30:45]):
        assert redact(f"?token={part}", token) == "?token=***"
    assert redact(f"{token[:20]} and {token[-20:]}", token) == "*** and ***"
    assert redact("an honest word", token) == "an honest word"


@pytest.mark.parametrize(
    "words",
    [
        f"Client error '404' for url 'http://h/?{urlencode({'q': QUERY})}'",
        f"no answer from http://h/{quote(QUERY)}/1",
        f"no answer from http://h/{quote(QUERY, safe='')}/1",
        f"q={quote_plus(QUERY)}&page=1",
        f"no such thing: {QUERY.lower()}",
        f"no such thing: {QUERY.upper().strip()}",
        f"no such thing: {QUERY.split('|')[1]}",
        f"no such thing: {QUERY[:20]}...",
        json.dumps({"q": QUERY}),
        "KeyError: 'Zebra'",
        "KeyError: 'zebra'",
        'no "lawyer" is known',
    ],
)
def test_query_is_found_whole_or_in_part(words: str) -> None:
    left = without_query(words, QUERY)
    assert "(the query)" in left
    for part in ("zebra", "divorce", "lawyer"):
        assert part not in left.lower()


def test_number_that_python_cuts_itself_is_found() -> None:
    body = "card 4111 1111 of " + "x" * 400
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int(body)
    assert "4111" not in without_query(str(caught.value), body)


def test_book_that_is_quoted_whole_or_in_part_is_not_told() -> None:
    book = " ".join(f"word{number}" for number in range(500_000))
    for quoted in (book, book[1:], book.upper(), book[:3000], book[-3000:], book[7000:]):
        left = without_query(f"no such thing: {quoted}", book)
        assert "no such thing: " in left
        assert "word" not in left.lower().replace("characters", "")


@pytest.mark.parametrize(
    ("words", "body"),
    [
        ("KeyError: 'title'", "subtitles"),
        ("cannot connect to 10.0.0.7:443: refused", "why does it not connect to a database"),
        ("No module named 'js'", "javascript"),
        ("it's not what's wanted", "so it is: s not what they say"),
        ("nothing", ""),
    ],
)
def test_words_that_are_no_quote_stay(words: str, body: str) -> None:
    assert without_query(words, body) == words


@given(before=st.text(max_size=20), body=st.text(min_size=QUERY_RUN_CHARS, max_size=60), data=st.data())
def test_no_longer_part_of_any_query_is_left(before: str, body: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(body) - QUERY_RUN_CHARS))
    part = body[at : at + QUERY_RUN_CHARS]
    assert part not in without_query(f"{before} {part}", body)


def test_names_of_the_program_are_no_quotes_of_a_query() -> None:
    words = "'NoneType' object has no attribute 'get'"
    assert Discretion("get me the weather")(words, quoted=False) == words


@pytest.mark.parametrize(
    ("words", "body"),
    [
        ("unknown command " + "a" * 8192 + " 'a" * 18_600, "/" + "a" * 8192 + " 'a" * 18_600),
        ("bad input", "\u79d8\u5bc6\u3067\U0001f600" * 16_000),
        ("'a' " * 15_000, "a " * 30_000),
        ("<a href='x'>" * 18_000, "b" * 60_000),
        ("a" * 1_000_000, "a" * 1_000_000),
        ("'" * 60_000, "'" * 60_000),
    ],
    ids=["words in quotes", "no letters", "many quotes", "a page", "all alike", "quotes alone"],
)
def test_no_words_and_no_query_take_long(words: str, body: str) -> None:
    began_s = time.process_time()
    Discretion(body)(words)
    assert time.process_time() - began_s < 1, "it was ten seconds and more"
