"""Commands in the sentences of a page, or in a comment, exist and have the options they use.

`test_pages_run` runs the commands in blocks. The commands here use a reader's own files and
machines, so they are only checked.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from runner.cli import cli
from tests.docs.markdown import PAGES, ROOT

FILES = [
    *PAGES,
    *(
        ROOT / name
        for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
    ),
    ROOT / "deploy" / "em-runner.service",
    ROOT / "em-runner.example.toml",
]
INLINE = re.compile(r"`((?:em-runner|(?:\./)?scripts/\w+\.sh|python -m benchmarks)\b[^`\n]*)`")
IN_COMMENT = re.compile(r"^#  +((?:em-runner|scripts/\w+\.sh) .*?)(?:  +#.*)?$", re.MULTILINE)
OPTION = re.compile(r"--?[a-z][\w-]*")
COMMAND = typer.main.get_command(cli)


NOT_COMMANDS = {
    "em-runner.toml",
    "em-runner.service",
    "em-runner.example.toml",
    "em-runner/.venv",
}


def commands(file: Path) -> list[str]:
    text = file.read_text()
    found = INLINE.findall(text)
    if file.suffix != ".md":
        found += IN_COMMENT.findall(text)
    return [command for command in found if command not in NOT_COMMANDS]


def objection(command: str) -> str:
    """Return why a command cannot be run, or an empty text."""
    program, *words = shlex.split(command)
    if program == "python":
        module = ROOT / f"{words[1].replace('.', '/')}.py"
        return "" if module.exists() else "there is no such module"
    if program.endswith(".sh"):
        script = ROOT / program
        if not script.exists():
            return "there is no such script"
        # The options of a script are in its text or in that of the modules it runs.
        sources = script.read_text() + _modules_of(script)
        unknown = [option for option in _options(words) if option not in sources]
    else:
        subcommand = COMMAND
        known = {"--help", "--install-completion", "--show-completion"}
        if words and not words[0].startswith("-"):
            context = COMMAND.make_context("em-runner", [], resilient_parsing=True)
            subcommand = COMMAND.get_command(context, words[0])  # type: ignore[attr-defined]
            if subcommand is None:
                return f"there is no command {words[0]}"
        known |= {name for parameter in subcommand.params for name in parameter.opts}
        unknown = [option for option in _options(words) if option not in known]
    return f"there is no option {', '.join(unknown)}" if unknown else ""


def _options(words: list[str]) -> list[str]:
    return sorted({word for word in words if OPTION.fullmatch(word)})


def _modules_of(script: Path) -> str:
    """Return the source of the modules that receive a script's arguments."""
    runs = re.findall(r"-m (benchmarks|tests\.chaos\.soak|runner\.cli)\b", script.read_text())
    paths = [ROOT / name.replace(".", "/") for name in runs]
    files = [path.with_suffix(".py") for path in paths]
    files += [path / "__main__.py" for path in paths]
    return "".join(file.read_text() for file in files if file.exists())


@pytest.mark.parametrize(
    "file", [file for file in FILES if commands(file)], ids=lambda file: str(file.relative_to(ROOT))
)
def test_command_in_a_sentence_can_be_run(file: Path) -> None:
    for command in commands(file):
        assert objection(command) == "", command


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("em-runner chek", "there is no command chek"),
        ("em-runner status --wach", "there is no option --wach"),
        ("scripts/sok.sh", "there is no such script"),
        ("scripts/bench.sh --onyl ws", "there is no option --onyl"),
        ("python -m benchmarks.count", "there is no such module"),
    ],
)
def test_command_that_cannot_be_run_is_found(command: str, reason: str) -> None:
    assert objection(command) == reason
