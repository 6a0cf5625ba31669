"""`runner.web._guard`: which requests are refused."""

from __future__ import annotations

import base64

import pytest

from runner.web._guard import LocalGuard, TokenGuard
from shared.config.load import HttpAddress
from shared.config.tokens import Secret

LOCAL = LocalGuard(HttpAddress("runner.example", 9600))
TOKEN = TokenGuard(Secret("sekrit"))


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
def test_host_may_be_a_name_of_the_runner_or_an_ip_address(host: bytes) -> None:
    # Twice, because the second check uses the cached result of the first.
    for _ in range(2):
        assert LOCAL.check([(b"host", host)]) is None


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
def test_other_host_names_are_refused(host: bytes) -> None:
    refusal = LOCAL.check([(b"host", host)])
    assert refusal is not None
    assert refusal.status == 403


def test_origin_must_be_absent_or_this_runner() -> None:
    host = (b"host", b"localhost:9600")
    assert LOCAL.check([host, (b"origin", b"http://localhost:9600")]) is None
    for origin in (
        b"http://evil.example",
        b"https://localhost:9600",
        b"x://localhost:9600",
        b"null",
        b"localhost:9600",
    ):
        assert LOCAL.check([host, (b"origin", origin)]) is not None


@pytest.mark.parametrize(
    "value", [b"Bearer sekrit", b"bearer sekrit", b"Bearer  sekrit ", b" Bearer sekrit"]
)
def test_token_is_accepted_in_every_form_that_http_allows(value: bytes) -> None:
    assert TOKEN.check([(b"host", b"x"), (b"authorization", value)]) is None


def test_several_authorization_headers_are_refused() -> None:
    right = (b"authorization", b"Bearer sekrit")
    wrong = (b"authorization", b"Bearer wrong")
    assert TOKEN.check([right]) is None
    for headers in ([right, wrong], [wrong, right], [right, right]):
        assert TOKEN.check(headers) is not None


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
def test_other_credentials_are_refused(value: bytes) -> None:
    refusal = TOKEN.check([(b"authorization", value)], "/workers")
    assert refusal is not None
    assert refusal.status == 401


def test_health_needs_no_token() -> None:
    assert TOKEN.check([], "/health") is None
    assert TOKEN.check([], "/workers") is not None


def test_browser_may_send_the_token_as_a_password() -> None:
    for name in (b"", b"ada", b"\xc3\xa4"):
        value = b"Basic " + base64.b64encode(name + b":sekrit")
        assert TOKEN.check([(b"host", b"x"), (b"authorization", value)], "/") is None


def test_page_asks_browsers_for_a_password() -> None:
    for path, scheme in (
        ("/", "Basic"),
        ("/events", "Basic"),
        ("/assets/dashboard.js", "Basic"),
        ("/workers", "Bearer"),
    ):
        refusal = TOKEN.check([(b"host", b"x")], path)
        assert refusal is not None
        ((name, value),) = refusal.headers
        assert (name, value.split()[0]) == ("www-authenticate", scheme)


def test_password_from_another_sites_page_is_refused() -> None:
    password = (b"authorization", b"Basic " + base64.b64encode(b":sekrit"))
    host = (b"host", b"runner.example:9600")
    for own in (b"http://runner.example:9600", b"https://runner.example:9600"):
        assert TOKEN.check([host, (b"origin", own), password]) is None
    for other in (
        b"http://evil.example",
        b"null",
        b"http://runner.example",
        b"runner.example:9600",
    ):
        for headers in ([host, (b"origin", other), password], [password, host, (b"origin", other)]):
            refusal = TOKEN.check(headers)
            assert refusal is not None
            assert refusal.status == 403
