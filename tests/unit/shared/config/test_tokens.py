"""`shared.config.tokens`: the sources and claims of tokens, and their secrecy."""

from __future__ import annotations

import base64
import copy
import hmac
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.config.tokens import (
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
from shared.errors import ConfigError

SECRET = "a-secret-of-more-than-thirty-two-bytes"
HIDDEN = "this-must-not-be-shown"


# --- Secret ---


@pytest.mark.parametrize(
    "show",
    [
        repr,
        str,
        format,
        "{0!r} {0!s} {0}".format,
        lambda secret: f"{secret} {[secret]} { ({'k': secret}) }",
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031 - the old format must hide it too
        lambda secret: repr(TokenSource(token=secret)),
        lambda secret: str(vars(Secret)) + str(dir(secret)),
        lambda secret: TokenSource(token=secret).describe(),
    ],
)
def test_secret_is_never_shown(show: Any) -> None:
    assert HIDDEN not in show(Secret(HIDDEN))


def test_secret_with_a_format_spec_is_refused_without_being_shown() -> None:
    with pytest.raises(TypeError) as caught:
        format(Secret(HIDDEN), ">40")
    assert HIDDEN not in str(caught.value)


def test_secret_survives_pickling_and_copying() -> None:
    secret = Secret(HIDDEN)
    for restored in (pickle.loads(pickle.dumps(secret)), copy.deepcopy(secret)):
        assert restored == secret
        assert hash(restored) == hash(secret)
        assert restored.reveal() == HIDDEN


def test_secret_equals_only_a_secret_with_the_same_text() -> None:
    assert Secret(HIDDEN) == Secret(HIDDEN)
    assert Secret(HIDDEN) != Secret("another")
    assert Secret(HIDDEN) != HIDDEN


def test_secret_has_no_further_attributes() -> None:
    with pytest.raises(AttributeError):
        Secret(HIDDEN).value = "x"  # type: ignore[attr-defined]


# --- sources ---


def test_token_is_read_from_the_configured_source(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("\n from-file \n")
    environ = {"V": " from-variable\n"}
    assert TokenSource(token=Secret("itself")).read("a", environ) == "itself"
    assert TokenSource(token_file=file).read("a", environ) == "from-file"
    assert TokenSource(variable="V").read("a", environ) == "from-variable"
    assert TokenSource().read("a", environ) is None


def test_token_file_is_read_again_each_time(tmp_path: Path) -> None:
    file = tmp_path / "token"
    source = TokenSource(token_file=file)
    for text in ("first", "second"):
        file.write_text(text)
        assert source.read("a") == text


def test_minted_token_names_the_agent_and_is_valid_for_an_hour(tmp_path: Path) -> None:
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


UNAVAILABLE = [
    (None, "cannot read .*: No such file"),
    (b" \n", "is empty"),
    (b"\xff\xfe", "is not a text file"),
]


@pytest.mark.parametrize("content", [content for content, _ in UNAVAILABLE])
def test_error_for_an_unavailable_token_names_the_file(
    content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    for source in (TokenSource(token_file=file), TokenSource(secret_file=file)):
        with pytest.raises(TokenError) as caught:
            source.read("a")
        assert str(file) in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("content", "message"), UNAVAILABLE)
def test_message_for_an_unavailable_token_has_the_reason(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    for source in (TokenSource(token_file=file), TokenSource(secret_file=file)):
        with pytest.raises(TokenError, match=message):
            source.read("a")


def test_folder_in_place_of_a_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="Is a directory"):
        read_secret_file(tmp_path)


def test_error_for_a_missing_variable_names_it() -> None:
    with pytest.raises(TokenError, match="AGENT_TOKEN"):
        TokenSource(variable="AGENT_TOKEN").read("a", {"AGENT_TOKEN": " "})


@pytest.mark.message_text
def test_message_for_a_missing_variable_names_the_environment() -> None:
    with pytest.raises(TokenError, match="environment variable V is no longer set"):
        TokenSource(variable="V").read("a", {"V": " "})


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TokenSource(token=Secret(HIDDEN)), "configured"),
        (TokenSource(token_file=Path("/t")), "file /t"),
        (TokenSource(secret_file=Path("/s")), "minted with /s"),
        (TokenSource(variable="V"), "environment V"),
        (TokenSource(), "none"),
    ],
)
def test_token_source_describes_where_its_token_comes_from(
    source: TokenSource, expected: str
) -> None:
    assert source.describe() == expected


# --- claims ---


def test_minted_token_has_the_claims_it_was_minted_with() -> None:
    token = mint(SECRET, "echo", ttl_s=60, now=1_000_000.9)
    assert inspect(token) == TokenClaims("echo", 1_000_000, 1_000_060)


def test_valid_token_has_no_problems() -> None:
    assert inspect(mint(SECRET, "echo", ttl_s=60)).problems("echo") == []


def test_token_for_another_agent_has_one_problem() -> None:
    assert len(inspect(mint(SECRET, "other", ttl_s=60)).problems("echo")) == 1


@pytest.mark.message_text
def test_problem_of_a_token_for_another_agent_names_both_agents() -> None:
    (problem,) = inspect(mint(SECRET, "other", ttl_s=60)).problems("echo")
    assert problem == "the token's sub is 'other', not the agent's name 'echo'"


def test_token_has_a_problem_from_its_expiry_on() -> None:
    claims = inspect(mint(SECRET, "echo", ttl_s=10, now=5000))
    assert claims.problems("echo", now=5009.9) == []
    assert len(claims.problems("echo", now=5010)) == 1


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("ago_s", "expected"),
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
def test_problem_of_an_expired_token_gives_the_time_since_expiry(
    ago_s: float, expected: str
) -> None:
    claims = inspect(mint(SECRET, "echo", ttl_s=10, now=5000))
    assert claims.problems("echo", now=5010 + ago_s) == [f"the token expired {expected} ago"]


def test_token_has_a_problem_for_each_missing_claim() -> None:
    token = jwt.encode({}, SECRET, algorithm="HS256")
    assert len(inspect(token).problems("echo")) == 2


@pytest.mark.message_text
def test_problems_of_a_token_without_claims_name_each_missing_claim() -> None:
    token = jwt.encode({}, SECRET, algorithm="HS256")
    assert inspect(token).problems("echo") == [
        "the token has no 'sub' claim",
        "the token has no 'exp' claim",
    ]


def test_verification_returns_the_claims() -> None:
    assert verify(mint(SECRET, "echo", ttl_s=60), SECRET).subject == "echo"


REFUSED = [
    (mint(SECRET + "x", "echo", ttl_s=60), "Signature verification failed"),
    (mint(SECRET, "echo", ttl_s=-1), "expired"),
    (jwt.encode({"sub": "echo"}, SECRET, algorithm="HS256"), "exp"),
    (jwt.encode({"exp": 9e9}, SECRET, algorithm="HS256"), "sub"),
    (jwt.encode({"sub": "echo", "exp": 9e9}, SECRET * 2, algorithm="HS512"), "alg"),
    (jwt.encode({"sub": "echo", "exp": 9e9}, "", algorithm="none"), "alg"),
    ("", "Not enough segments"),
    ("a.b.c", "not a valid token"),
]


@pytest.mark.parametrize("token", [token for token, _ in REFUSED])
def test_token_that_em_disco_would_refuse_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(TokenError) as caught:
        verify(token, SECRET)
    assert SECRET not in str(caught.value)
    assert not token or token not in str(caught.value)


@pytest.mark.message_text
@pytest.mark.parametrize(("token", "message"), REFUSED)
def test_message_for_a_refused_token_has_the_reason(token: str, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        verify(token, SECRET)


def test_token_issued_in_the_future_is_accepted_as_by_em_disco() -> None:
    assert verify(mint(SECRET, "echo", ttl_s=9e9, now=4e9), SECRET).subject == "echo"


@pytest.mark.parametrize(
    "secret",
    ["ssh-rsa AAAAB3NzaC1yc2E", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----"],
)
def test_asymmetric_key_is_refused_as_a_secret(secret: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(secret)
    with pytest.raises(TokenError) as caught:
        TokenSource(secret_file=tmp_path / "secret").read("echo")
    assert secret not in str(caught.value)


@pytest.mark.message_text
def test_message_for_an_asymmetric_key_says_that_it_cannot_sign(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("ssh-rsa AAAAB3NzaC1yc2E")
    with pytest.raises(TokenError, match="no token can be signed with this secret"):
        TokenSource(secret_file=tmp_path / "secret").read("echo")


def test_short_secret_signs_without_padding_and_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("default")
        token = mint("short", "echo", ttl_s=60)
        assert verify(token, "short").subject == "echo"
    assert caught == []
    signed, _, signature = token.rpartition(".")
    expected = hmac.digest(b"short", signed.encode(), "sha256")
    assert base64.urlsafe_b64decode(signature + "=") == expected


@pytest.mark.parametrize("secret", ["x" * 32, "\u00e9" * 16], ids=["ascii", "two bytes each"])
def test_secret_of_32_bytes_is_accepted(secret: str) -> None:
    assert require_strong(secret, "here") == secret


@pytest.mark.parametrize("secret", ["s3cr3t", "x" * 31])
def test_shorter_secret_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(ConfigError, match="here") as caught:
        require_strong(secret, "here")
    assert secret not in str(caught.value)


@pytest.mark.message_text
def test_message_for_a_short_secret_gives_both_lengths() -> None:
    message = "here: the secret has 5 bytes, at least 32 are needed"
    with pytest.raises(ConfigError, match=message):
        require_strong("short", "here")


# --- arbitrary texts ---


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
claims = st.dictionaries(
    st.sampled_from(["sub", "exp", "iat", "nbf", "aud", "iss", "jti"]), json_values
)
headers = st.dictionaries(
    st.sampled_from(["alg", "typ", "kid", "b64", "crit"]), json_values
) | st.just({"alg": "HS256"})
texts = st.one_of(
    st.text(),
    st.text(alphabet="abcXYZ019-_.="),
    st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")),
    st.builds(
        "{}.{}.{}".format, headers.map(segment), claims.map(segment), st.binary().map(segment)
    ),
    st.builds("{}.{}.{}".format, *[st.binary().map(segment)] * 3),
    claims.map(
        lambda found: jwt.encode({**found}, SECRET, algorithm="HS256") if "iss" not in found else ""
    ),
)


def signed(payload: str) -> str:
    """Return a token with a valid signature and this payload."""
    return jwt.api_jws.encode(payload.encode(), SECRET, algorithm="HS256")


@given(texts)
@example(signed('{"sub":"echo","exp":NaN}'))
@example(signed('{"sub":"echo","exp":-Infinity}'))
@example(signed('{"sub":"echo","exp":1' + "0" * 400 + "}"))
@example(signed('{"sub":"echo","exp":' + "[" * 5000 + "]" * 5000 + "}"))
@example(signed('{"sub":["echo"],"exp":9999999999}'))
@example(signed('"sub"'))
@example(signed("null"))
def test_any_text_is_a_token_or_an_error_without_secrets(token: str) -> None:
    for read in (inspect, lambda text: verify(text, SECRET)):
        try:
            found = read(token)
        except TokenError as exc:
            message = str(exc)
            assert SECRET not in message
            assert not any(part in message for part in token.split(".") if len(part) > 16)
        else:
            assert all(isinstance(problem, str) for problem in found.problems("echo", now=1e9))
