"""What `em-runner new` writes: an agent of one's own to begin with, with its test and its configuration."""

from __future__ import annotations

import keyword
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from shared.errors import ConfigError, StartError
from shared.handlers import OUR_PACKAGES

HANDLER: Final = '''\
"""The agent `{name}`: counts the words that it is asked about."""

from __future__ import annotations

from typing import Any


def handle(body: str, memory: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answer one query. `memory` is what the query before returned, `{{}}` at first."""
    words = body.split()
    known = memory.get("words", 0) + len(words)
    result = [{{"type": "{name}", "properties": {{"title": body, "words": len(words), "words_so_far": known}}}}]
    return result, {{"words": known}}
'''

TEST: Final = '''\
"""Tests of the agent `{name}`, at an embedded node. Run them with pytest, in this folder."""

from __future__ import annotations

from worker.pytest_plugin import RunAgent


def test_it_counts_words_from_query_to_query(run_agent: RunAgent) -> None:
    """The second answer knows of the first."""
    agent = run_agent("{name}.py:handle")
    [first] = agent.ask("red fish")
    [second] = agent.ask("blue fish")
    assert first["properties"]["words"] == 2
    assert second["properties"]["words_so_far"] == 4
    assert agent.memory == {{"words": 4}}
'''

CONFIG: Final = """\
# em-runner check -c em-runner.toml    does it fit together?
# em-runner run -c em-runner.toml      runs it, until Ctrl-C

[[agent]]
name = "{name}"
handler = "{name}.py:handle"
memory = "ram"                  # "disk" survives a restart, "none" forgets each query
nodes = ["localhost:8080"]      # a node to try it at: em-runner disco --port 8080 --no-auth
# jwt_token_file = "{name}.jwt" # a node that asks for tokens: em-runner token --sub {name} --secret-file FILE
"""

FILES: Final = {"{name}.py": HANDLER, "test_{name}.py": TEST, "em-runner.toml": CONFIG}


def write(name: str, parent: Path) -> list[Path]:
    """Write a new agent into a folder of its name, and return the files.

    Raises:
        ConfigError: when the name cannot be one.
        StartError: when there is such a folder, or it cannot be made.
    """
    if not name.isidentifier() or not name.isascii() or len(name) > 64:
        raise ConfigError(f"found {name!r}, expected a name of letters, digits and _, such as weather_report")
    if keyword.iskeyword(name):
        raise ConfigError(f"{name} is a word of Python's own; choose another name, such as {name}_report")
    if name in OUR_PACKAGES:
        raise ConfigError(f"{name} is the name of one of em-runner's own packages; choose another")
    if name in sys.stdlib_module_names or _is_installed(name):
        # The test beside it, and all that it uses, would import the one for the other.
        raise ConfigError(f"{name} is the name of a Python module that is there already; choose another, {name}_agent")
    folder = parent / name
    try:
        folder.mkdir()
        written = []
        for file, text in FILES.items():
            path = folder / file.format(name=name)
            path.write_text(text.format(name=name))
            written.append(path)
    except FileExistsError:
        raise StartError(f"{folder} is there already; choose another name, or move it") from None
    except OSError as exc:
        raise StartError(f"{folder} cannot be written: {exc.strerror}") from None
    return written


def _is_installed(name: str) -> bool:
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None  # a folder in the current one has no origin
