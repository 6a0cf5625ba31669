"""No behaviour depends on the text of a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reworded

# All tests of modules, and those of whole processes that depend most on errors. The others would
# take too long in each run; `python -m tests.reworded` runs them.
REWORDED = (
    ("tests/unit",),
    ("tests/disco", "tests/integration/test_http.py", "tests/integration/test_supervision.py"),
)


@pytest.mark.message_text  # so that the copy does not run it again
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paths", REWORDED, ids=" ".join)
def test_behaviour_does_not_depend_on_the_text_of_a_message(
    tmp_path: Path, paths: tuple[str, ...]
) -> None:
    copy = tmp_path / "copy"
    messages = reworded.copy(copy)
    assert len(messages) > 400
    assert "the worker is not up" in messages
    result = reworded.run(["-q", "-x", "-p", "no:cacheprovider", *paths], copy, quiet=True)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.parametrize(
    ("source", "after"),
    [
        (
            'raise CommandError(f"no answer from {base}; try again")',
            "raise CommandError(f'on rewsna morf {base}; yrt niaga')",
        ),
        (
            'ErrorResponse(code, "use --token-file or agent.name")',
            "ErrorResponse(code, 'esu --token-file ro agent.name')",
        ),
        ('reply(b"the worker is not up")', "reply(b'eht rekrow si ton pu')"),
        ('"too many" in text', "'too many' in text"),
        ('text.startswith("killed by")', "text.startswith('killed by')"),
        ('hints = {"not a key": "not a text"}', "hints = {'not a key': 'ton a txet'}"),
        ('log.warning("request_refused")', "log.warning('request_refused')"),
        (
            'database.execute("SELECT data FROM memory")',
            "database.execute('SELECT data FROM memory')",
        ),
    ],
)
def test_messages_are_reworded_and_search_texts_are_not(source: str, after: str) -> None:
    assert reworded.reword(source)[0] == after
