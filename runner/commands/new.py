"""`em-runner new`: writes a first agent, with its test and its configuration."""

from __future__ import annotations

import keyword
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from shared.errors import CommandError, ConfigError

_HANDLER: Final = '''\
"""The agent `{name}`: counts the words of its queries."""

from __future__ import annotations

from typing import Any


def handle(body: str, memory: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer one query. `memory` is what the previous query returned, at first `{{}}`."""
    words = len(body.split())
    total = memory.get("words", 0) + words
    properties = {{"title": body, "words": words, "words_so_far": total}}
    return [{{"type": "{name}", "properties": properties}}], {{"words": total}}
'''

_TEST: Final = '''\
"""Tests of the agent `{name}` at an embedded node. Run pytest in this folder."""

from __future__ import annotations

from em_runner.testing import RunAgent


def test_it_counts_words_from_query_to_query(run_agent: RunAgent) -> None:
    """The second result includes the words of the first query."""
    agent = run_agent("{name}.py:handle")
    [first] = agent.ask("red fish")
    [second] = agent.ask("blue fish")
    assert first["properties"]["words"] == 2
    assert second["properties"]["words_so_far"] == 4
    assert agent.memory == {{"words": 4}}
'''

_CONFIG: Final = """\
# em-runner check -c em-runner.toml    checks it
# em-runner run -c em-runner.toml      runs it until Ctrl-C

[[agent]]
name = "{name}"
handler = "{name}.py:handle"
memory = "ram"                  # "disk" survives a restart, "none" keeps nothing
nodes = ["localhost:8080"]      # start one with: em-runner disco --port 8080 --no-auth
# For a node that requires tokens: em-runner token --sub {name} --secret-file FILE > {name}.jwt
# jwt_token_file = "{name}.jwt"
"""

_FILES: Final = {
    "{name}.py": _HANDLER,
    "test_{name}.py": _TEST,
    "em-runner.toml": _CONFIG,
}


def write(name: str, parent: Path) -> list[Path]:
    """Write a new agent into a folder with its name. Return the files.

    Raises:
        ConfigError: if the name is not usable.
        CommandError: if the folder exists, or cannot be created.
    """
    valid = name.isidentifier() and name.isascii() and len(name) <= 64
    if not valid or keyword.iskeyword(name):
        raise ConfigError(
            f"found {name!r}, expected a name of letters, digits and _ that is not a Python "
            "keyword, such as weather_report"
        )
    if _is_installed(name):
        # The agent's module would hide the installed one from its test and from all libraries that
        # the test imports, or the other way round.
        raise ConfigError(
            f"the Python module {name} exists already; use another, such as {name}_agent"
        )
    folder = parent / name
    try:
        folder.mkdir()
        written = []
        for file, text in _FILES.items():
            path = folder / file.format(name=name)
            path.write_text(text.format(name=name))
            written.append(path)
    except FileExistsError:
        raise CommandError(f"{folder} exists already; choose another name, or move it") from None
    except OSError as exc:
        raise CommandError(f"{folder} cannot be written: {exc.strerror}") from None
    return written


def _is_installed(name: str) -> bool:
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        return False
    # A folder without Python files, such as one in the current folder, has no origin. It does not
    # hide a module.
    return found is not None and found.origin is not None
