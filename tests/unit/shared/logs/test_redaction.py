"""`shared.logs.redaction`: secrets and parts of them are removed from texts."""

from __future__ import annotations

from shared.config.tokens import mint
from shared.logs.redaction import redact

SECRET = "0123456789abcdef0123456789abcdef"


def test_redacted_text_contains_no_secret() -> None:
    assert redact("a=tok b=tok c=key", "tok", "key", None, "") == "a=*** b=*** c=***"


def test_part_of_a_token_is_redacted_like_the_whole_token() -> None:
    token = mint(SECRET, "echo", ttl_s=60)
    for part in (token[-100:], token[40:], *token.split("."), token[30:45]):
        assert redact(f"?token={part}", token) == "?token=***"
    assert redact(f"{token[:20]} and {token[-20:]}", token) == "*** and ***"
    assert redact("no secret here", token) == "no secret here"
