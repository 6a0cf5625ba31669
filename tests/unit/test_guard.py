"""`runner.guard`: whose requests are answered."""

from __future__ import annotations

import base64

import pytest

from runner.guard import BearerToken, LocalOnly
from shared.config import HttpAddress
from shared.tokens import Secret

LOCAL = LocalOnly(HttpAddress("runner.example", 9600))
TOKEN = BearerToken(Secret("sekrit"))


@pytest.mark.parametrize(
    "host",
    [
        b"localhost",
        b"LOCALHOST:9600",
        b"localhost.",
        b"runner.example:9600",
        b"127.0.0.1",
        b" 127.0.0.1:9600 ",
        b"[::1]:9600",
        b"192.0.2.7:1",
        b"",
    ],
)
def test_own_names_and_any_address_are_ours(host: bytes) -> None:
    assert LOCAL.objection([(b"host", host)]) is None
    assert LOCAL.objection([(b"host", host)]) is None, "and still are the second time"


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"localhost.evil.example",
        b"127.0.0.1.evil.example",
        b"127.0.0.1:1:evil.com",
        b"127.0.0.1:@evil.com",
        b"127.0.0.1@evil.com",
        b"[::1]evil.com",
        b"[evil.com]",
        b"localhost:80:80",
        b"\xff\xfe",
    ],
)
def test_other_names_are_not(host: bytes) -> None:
    refusal = LOCAL.objection([(b"host", host)])
    assert refusal is not None
    assert refusal.status == 403


def test_origin_is_none_or_this_runner() -> None:
    host = (b"host", b"localhost:9600")
    assert LOCAL.objection([host, (b"origin", b"http://localhost:9600")]) is None
    for origin in (
        b"http://evil.example",
        b"https://localhost:9600",
        b"x://localhost:9600",
        b"null",
        b"localhost:9600",
    ):
        assert LOCAL.objection([host, (b"origin", origin)]) is not None


@pytest.mark.parametrize("value", [b"Bearer sekrit", b"bearer sekrit", b"Bearer  sekrit ", b" Bearer sekrit"])
def test_token_is_taken_as_http_lets_it_be_written(value: bytes) -> None:
    assert TOKEN.objection([(b"host", b"x"), (b"authorization", value)]) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer sekri",
        b"Bearer sekrit2",
        b"sekrit",
        b"Bearersekrit",
        b"Basic sekrit",
        b"Basic ",
        b"Basic \xff",
        b"Basic " + base64.b64encode(b"sekrit"),
        b"Basic " + base64.b64encode(b"sekrit:"),
        b"Basic " + base64.b64encode(b":sekrit2"),
        b"Bearer " + base64.b64encode(b":sekrit"),
        b"Digest " + base64.b64encode(b":sekrit"),
    ],
)
def test_anything_else_is_not(value: bytes) -> None:
    refusal = TOKEN.objection([(b"authorization", value)])
    assert refusal is not None
    assert refusal.status == 401
    assert TOKEN.objection([], "/health") is None
    assert TOKEN.objection([(b"authorization", value)], "/workers") is not None


def test_browser_gives_the_token_as_a_password() -> None:
    for name in (b"", b"ada", b"\xc3\xa4"):
        value = b"Basic " + base64.b64encode(name + b":sekrit")
        assert TOKEN.objection([(b"host", b"x"), (b"authorization", value)], "/") is None


def test_browser_is_asked_for_the_token_where_there_is_a_page() -> None:
    for path, scheme in (
        ("/", "Basic"),
        ("/events", "Basic"),
        ("/assets/dashboard.js", "Basic"),
        ("/workers", "Bearer"),
    ):
        refusal = TOKEN.objection([(b"host", b"x")], path)
        assert refusal is not None
        ((name, value),) = refusal.headers
        assert (name, value.split()[0]) == ("www-authenticate", scheme)


def test_what_a_browser_sends_along_for_another_sites_page_counts_for_nothing() -> None:
    password = (b"authorization", b"Basic " + base64.b64encode(b":sekrit"))
    host = (b"host", b"runner.example:9600")
    for ours in (b"http://runner.example:9600", b"https://runner.example:9600"):
        assert TOKEN.objection([host, (b"origin", ours), password]) is None
    for other in (b"http://evil.example", b"null", b"http://runner.example", b"runner.example:9600"):
        for headers in ([host, (b"origin", other), password], [password, host, (b"origin", other)]):
            refusal = TOKEN.objection(headers)
            assert refusal is not None
            assert refusal.status == 403
