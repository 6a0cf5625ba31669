"""Commands that a sentence names, in a page or in a comment of the unit: there are such, with such options.

What stands in blocks of its own is run by `test_pages_run`; these are for the reader's own files and machines.
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
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")),
    ROOT / "deploy" / "em-runner.service",
    ROOT / "em-runner.example.toml",
]
INLINE = re.compile(r"`((?:em-runner|(?:\./)?scripts/\w+\.sh|python -m benchmarks)\b[^`\n]*)`")
IN_COMMENT = re.compile(r"^#  +((?:em-runner|scripts/\w+\.sh) .*?)(?:  +#.*)?$", re.MULTILINE)
OPTION = re.compile(r"--?[a-z][\w-]*")
COMMAND = typer.main.get_command(cli)


def commands(file: Path) -> list[str]:
    text = file.read_text()
    return INLINE.findall(text) if file.suffix == ".md" else [*INLINE.findall(text), *IN_COMMENT.findall(text)]


def objection(command: str) -> str:
    """Return why nobody can type a command, or an empty text."""
    program, *words = shlex.split(command)
    options = {word for word in words if OPTION.fullmatch(word)}
    if program == "python":
        return "" if (ROOT / f"{words[1].replace('.', '/')}.py").exists() else "there is no such module"
    if program.endswith(".sh"):
        script = ROOT / program
        if not script.exists():
            return "there is no such script"
        unknown = {each for each in options if each not in script.read_text() + _asked_by(script)}
    else:
        subcommand, known = COMMAND, {"--help", "--install-completion", "--show-completion"}
        if words and not words[0].startswith("-"):
            found = COMMAND.get_command(COMMAND.make_context("em-runner", [], resilient_parsing=True), words[0])  # type: ignore[attr-defined]
            if found is None:
                return f"there is no command {words[0]}"
            subcommand = found
        known |= {name for parameter in subcommand.params for name in parameter.opts}
        unknown = options - known
    return f"there is no option {', '.join(sorted(unknown))}" if unknown else ""


def _asked_by(script: Path) -> str:
    """What a script hands its arguments to."""
    called = re.findall(r"-m (benchmarks|tests\.chaos\.soak|runner\.cli)\b", script.read_text())
    files = [ROOT / f"{name.replace('.', '/')}.py" for name in called] + [
        ROOT / name.replace(".", "/") / "__main__.py" for name in called
    ]
    return "".join(file.read_text() for file in files if file.exists())


@pytest.mark.parametrize(
    "file", [file for file in FILES if commands(file)], ids=lambda file: str(file.relative_to(ROOT))
)
def test_command_that_is_named_can_be_typed(file: Path) -> None:
    for command in commands(file):
        if command not in ("em-runner.toml", "em-runner.service", "em-runner.example.toml", "em-runner/.venv"):
            assert objection(command) == "", command


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("em-runner chek", "there is no command chek"),
        ("em-runner status --wach", "there is no option --wach"),
        ("scripts/sok.sh", "there is no such script"),
        ("scripts/bench.sh --onyl ws", "there is no option --onyl"),
        ("python -m benchmarks.count", "there is no such module"),
    ],
)
def test_command_that_nobody_can_type_is_found(command: str, why: str) -> None:
    assert objection(command) == why
