"""No behaviour depends on the text of a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import reworded

# Tests of the modules that make decisions. `python -m tests.reworded` runs any other tests.
DECISIONS = (
    "tests/unit/runner",
    "tests/unit/worker/node",
    "tests/unit/worker/dispatching",
    "tests/unit/test_limits.py",
    "tests/unit/test_reloader.py",
    "tests/unit/test_state_log.py",
    "tests/integration/test_http.py",
)


@pytest.mark.message_text  # so that the copy does not run it again
@pytest.mark.timeout(300)
def test_behaviour_does_not_depend_on_the_text_of_a_message(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    messages = reworded.copy(copy)
    assert len(messages) > 400
    assert "the worker is not up" in messages
    result = reworded.run(["-q", "-x", "-p", "no:cacheprovider", *DECISIONS], copy, quiet=True)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.parametrize(
    ("source", "after"),
    [
        (
            'raise StartError(f"no answer from {base}; try again")',
            "raise StartError(f'on rewsna morf {base}; yrt niaga')",
        ),
        (
            'Refusal(code, "use --token-file or agent.name")',
            "Refusal(code, 'esu --token-file ro agent.name')",
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
