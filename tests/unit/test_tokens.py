"""`shared.tokens`: where a token comes from, what it says, and that nobody sees it."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.tokens import (
    Secret,
    TokenClaims,
    TokenError,
    TokenSource,
    inspect,
    mint,
    read_secret_file,
    require_strong,
    verify,
)

SECRET = "a-secret-of-more-than-thirty-two-bytes"
HIDDEN = "nobody-may-see-this"


# --- Secret ---


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        "{0!r} {0!s} {0}".format,
        lambda secret: f"{secret} {[secret]} { ({'k': secret}) }",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - this form too
        lambda secret: repr(TokenSource(token=secret)),
        lambda secret: str(vars(Secret)) + str(dir(secret)),
        lambda secret: TokenSource(token=secret).describe(),
    ],
)
def test_secret_is_never_shown(show: Any) -> None:
    assert HIDDEN not in show(Secret(HIDDEN))


def test_secret_of_an_odd_format_is_refused_without_being_shown() -> None:
    with pytest.raises(TypeError) as caught:
        format(Secret(HIDDEN), ">40")
    assert HIDDEN not in str(caught.value)


def test_secret_reaches_a_child_process_and_is_the_same_there() -> None:
    secret = Secret(HIDDEN)
    for again in (pickle.loads(pickle.dumps(secret)), copy.deepcopy(secret)):
        assert again == secret
        assert hash(again) == hash(secret)
        assert again.reveal() == HIDDEN
    assert secret != Secret("another")
    assert secret != HIDDEN
    with pytest.raises(AttributeError):
        secret.value = "x"  # type: ignore[attr-defined]


# --- where it comes from ---


def test_token_source_reads_the_one_place_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("\n from-file \n")
    environ = {"V": " from-variable\n"}
    assert TokenSource(token=Secret("itself")).read("a", environ) == "itself"
    assert TokenSource(token_file=file).read("a", environ) == "from-file"
    assert TokenSource(variable="V").read("a", environ) == "from-variable"
    assert TokenSource().read("a", environ) is None


def test_token_file_is_read_afresh_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    source = TokenSource(token_file=file)
    for text in ("first", "second"):
        file.write_text(text)
        assert source.read("a") == text


def test_minted_token_is_for_the_agent_and_lives_an_hour(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    token = TokenSource(secret_file=file).read("echo")
    assert token is not None
    claims = verify(token, SECRET)
    assert claims.subject == "echo"
    assert claims.expires_at is not None
    assert claims.issued_at is not None
    assert claims.expires_at - claims.issued_at == 3600
    assert jwt.get_unverified_header(token)["alg"] == "HS256"


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot read .*: No such file"), (b" \n", "is empty"), (b"\xff\xfe", "is not a text file")],
)
def test_token_that_cannot_be_had_says_where_and_why(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    for source in (TokenSource(token_file=file), TokenSource(secret_file=file)):
        with pytest.raises(TokenError, match=says) as caught:
            source.read("a")
        assert str(file) in str(caught.value)
    with pytest.raises(TokenError, match=r"cannot read .*: Is a directory"):
        read_secret_file(tmp_path)


def test_variable_that_went_away_is_told_by_name() -> None:
    with pytest.raises(TokenError, match="environment variable V is not set"):
        TokenSource(variable="V").read("a", {"V": " "})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TokenSource(token=Secret(HIDDEN)), "configured"),
        (TokenSource(token_file=Path("/t")), "file /t"),
        (TokenSource(secret_file=Path("/s")), "minted with /s"),
        (TokenSource(variable="V"), "environment V"),
        (TokenSource(), "none"),
    ],
)
def test_token_source_describes_itself_without_the_token(source: TokenSource, words: str) -> None:
    assert source.describe() == words


# --- what it says ---


def test_minted_token_says_what_it_was_minted_with() -> None:
    token = mint(SECRET, "echo", ttl_s=60, now=1_000_000.9)
    assert inspect(token) == TokenClaims("echo", 1_000_000, 1_000_060)


def test_good_token_has_no_problems() -> None:
    assert inspect(mint(SECRET, "echo", ttl_s=60)).problems("echo") == []


def test_token_of_another_agent_names_both() -> None:
    (problem,) = inspect(mint(SECRET, "other", ttl_s=60)).problems("echo")
    assert problem == "the token's sub is 'other', not the agent's name 'echo'"


@pytest.mark.parametrize(
    ("ago_s", "words"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (60, "1 minute"),
        (7199, "1 hour"),
        (7200, "2 hours"),
        (86_400, "1 day"),
        (1e6, "11 days"),
    ],
)
def test_expired_token_says_for_how_long(ago_s: float, words: str) -> None:
    claims = inspect(mint(SECRET, "echo", ttl_s=10, now=5000))
    assert claims.problems("echo", now=5010 + ago_s) == [f"the token expired {words} ago"]
    assert claims.problems("echo", now=5009.9) == []


def test_token_without_claims_says_each_that_is_missing() -> None:
    token = jwt.encode({}, SECRET, algorithm="HS256")
    assert inspect(token).problems("echo") == ["the token has no 'sub' claim", "the token has no 'exp' claim"]


def test_verified_token_gives_its_claims() -> None:
    assert verify(mint(SECRET, "echo", ttl_s=60), SECRET).subject == "echo"


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (mint(SECRET + "x", "echo", ttl_s=60), "Signature verification failed"),
        (mint(SECRET, "echo", ttl_s=-1), "expired"),
        (jwt.encode({"sub": "echo"}, SECRET, algorithm="HS256"), "exp"),
        (jwt.encode({"exp": 9e9}, SECRET, algorithm="HS256"), "sub"),
        (jwt.encode({"sub": "echo", "exp": 9e9}, SECRET * 2, algorithm="HS512"), "alg"),
        (jwt.encode({"sub": "echo", "exp": 9e9}, "", algorithm="none"), "alg"),
        ("", "Not enough segments"),
        ("a.b.c", "not a valid token"),
    ],
)
def test_token_that_em_disco_would_refuse_is_refused_and_says_why(token: str, says: str) -> None:
    with pytest.raises(TokenError, match=says) as caught:
        verify(token, SECRET)
    assert SECRET not in str(caught.value)
    assert not token or token not in str(caught.value)


def test_token_issued_in_the_future_is_taken_as_em_disco_takes_it() -> None:
    assert verify(mint(SECRET, "echo", ttl_s=9e9, now=4e9), SECRET).subject == "echo"


@pytest.mark.parametrize(
    "secret", ["ssh-rsa AAAAB3NzaC1yc2E", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"]
)
def test_half_of_a_key_pair_is_no_secret(secret: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(secret)
    with pytest.raises(TokenError, match="no token can be signed with this secret") as caught:
        TokenSource(secret_file=tmp_path / "secret").read("echo")
    assert secret not in str(caught.value)


def test_short_secret_still_signs_and_prints_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("default")
        warnings.filterwarnings("ignore", message="The HMAC key is", category=UserWarning)  # as `shared.tokens` does
        assert verify(mint("short", "echo", ttl_s=60), "short").subject == "echo"
    assert caught == []


def test_short_secret_is_refused_where_strength_matters() -> None:
    assert require_strong("x" * 32, "here") == "x" * 32
    assert require_strong("\u00e9" * 16, "here"), "bytes count, not letters"
    with pytest.raises(ConfigError, match="here: the secret has 5 bytes, at least 32 are needed") as caught:
        require_strong("short", "here")
    assert "short;" not in str(caught.value)


# --- whatever comes ---


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
claims = st.dictionaries(st.sampled_from(["sub", "exp", "iat", "nbf", "aud", "iss", "jti"]), json_values)
headers = st.dictionaries(st.sampled_from(["alg", "typ", "kid", "b64", "crit"]), json_values) | st.just(
    {"alg": "HS256"}
)
texts = st.one_of(
    st.text(),
    st.text(alphabet="abcXYZ019-_.="),
    st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.builds("{}.{}.{}".format, headers.map(segment), claims.map(segment), st.binary().map(segment)),
    st.builds("{}.{}.{}".format, *[st.binary().map(segment)] * 3),
    claims.map(lambda found: jwt.encode({**found}, SECRET, algorithm="HS256") if "iss" not in found else ""),
)


def signed(payload: str) -> str:
    """Return a token whose signature holds and whose payload is whatever text."""
    return jwt.api_jws.encode(payload.encode(), SECRET, algorithm="HS256")


@given(texts)
@example(signed('{"sub":"echo","exp":NaN}'))
@example(signed('{"sub":"echo","exp":-Infinity}'))
@example(signed('{"sub":"echo","exp":1' + "0" * 400 + "}"))
@example(signed('{"sub":"echo","exp":' + "[" * 5000 + "]" * 5000 + "}"))
@example(signed('{"sub":["echo"],"exp":9999999999}'))
@example(signed('"sub"'))
@example(signed("null"))
def test_any_text_is_a_token_or_a_token_error_that_holds_neither_token_nor_secret(token: str) -> None:
    for read in (inspect, lambda text: verify(text, SECRET)):
        try:
            found = read(token)
        except TokenError as exc:
            told = str(exc)
            assert SECRET not in told
            assert not any(part in told for part in token.split(".") if len(part) > 16)
        else:
            assert all(isinstance(problem, str) for problem in found.problems("echo", now=1e9))
