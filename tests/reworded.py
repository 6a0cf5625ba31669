"""Runs tests against a copy of the program whose messages are all worded differently.

    python -m tests.reworded [PYTEST ARGUMENT ...]

No behaviour may depend on the text of a message. So every test must pass against the copy, except
tests of the texts themselves, which are marked `message_text` and left out.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PROGRAM: Final = ("runner", "worker", "shared", "disco", "em_runner")

_LEFT_OUT: Final = (
    ".git",
    ".venv",
    "__pycache__",
    "_build",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
)

# A message has two words in a row. Names, keys, paths and header fields do not.
_PROSE: Final = re.compile(r"[A-Za-z,:;']{2,} (?:an? )?[A-Za-z]{2,}|^ [a-z]{2,}|[a-z]{2,}[:;]? $")
_NOT_PROSE: Final = re.compile(
    r"[\n\r<{\\]|realm=|charset|no-cache|text/|'none'"  # templates, patterns, header fields
    r"|^CREATE |^PRAGMA |^bold |^You asked"  # SQL, a style, the answer of the demo's agent
)

# A word that is not part of an option, a key, a path, a URL or a quoted name.
_WORD: Final = re.compile(r"(?<![\w./='`%$-])[A-Za-z]{2,}(?![\w./=(_'`-])")

# Calls whose literals stay as they are. Most of them search: a search for a message then fails. The
# literals of the others belong to a protocol or a library.
_NO_MESSAGES: Final = frozenset(
    {"startswith", "endswith", "partition", "rpartition", "split", "find", "index", "count"}
    | {"replace", "removeprefix", "removesuffix"}
    | {"compile", "match", "search", "fullmatch", "sub"}
    | {"get", "pop", "encode", "execute", "filterwarnings"}
)


def reworded(text: str) -> str:
    """Return a text with each of its words written backwards."""
    return _WORD.sub(lambda word: word[0][::-1], text)


def is_message(text: str) -> bool:
    """Return whether a literal is text for people."""
    return _PROSE.search(text) is not None and _NOT_PROSE.search(text) is None


class Rewording(ast.NodeTransformer):
    """Rewords the messages in a module.

    Attributes:
        messages: the original text of each literal that was reworded.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """Keep docstrings: those of the schema and of the metrics are data."""
        return node if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Keep both sides of a comparison, so that a comparison with a message fails."""
        return node

    def visit_match_case(self, node: ast.match_case) -> ast.AST:
        """Keep patterns, for the same reason."""
        node.body = [self.visit(each) for each in node.body]
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        """Keep keys and types."""
        node.value = self.visit(node.value)
        if not isinstance(node.slice, ast.Constant):
            node.slice = self.visit(node.slice)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Keep the literals of the calls in `_NO_MESSAGES`."""
        if isinstance(node.func, ast.Attribute):
            node.func.value = self.visit(node.func.value)
            if node.func.attr in _NO_MESSAGES:
                return node
        node.args = [self.visit(each) for each in node.args]
        node.keywords = [self.visit(each) for each in node.keywords]
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """Keep keys."""
        node.values = [self.visit(each) for each in node.values]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Reword a literal."""
        if isinstance(node.value, str):
            return ast.copy_location(ast.Constant(self._reworded(node.value)), node)
        if isinstance(node.value, bytes) and node.value.isascii():
            text = self._reworded(node.value.decode())
            return ast.copy_location(ast.Constant(text.encode()), node)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """Reword the literal parts of an f-string, but not its format specifiers."""
        texts = [each.value if isinstance(each, ast.Constant) else "X" for each in node.values]
        whole = "".join(texts)
        if is_message(whole):
            self.messages.append(whole)
        for each in node.values:
            if isinstance(each, ast.FormattedValue):
                each.value = self.visit(each.value)
            elif isinstance(each, ast.Constant) and is_message(whole):
                each.value = reworded(each.value)
        return node

    def _reworded(self, text: str) -> str:
        if not is_message(text):
            return text
        self.messages.append(text)
        return reworded(text)


def reword(source: str) -> tuple[str, list[str]]:
    """Return a module's source with its messages reworded, and the original messages."""
    rewording = Rewording()
    module = rewording.visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(module)), rewording.messages


def copy(folder: Path) -> list[str]:
    """Copy the project to a new folder, reword all messages, and return the original ones."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    messages: list[str] = []
    for name in PROGRAM:
        for file in sorted((folder / name).rglob("*.py")):
            source, originals = reword(file.read_text())
            file.write_text(source + "\n")
            messages += originals
    return messages


def run(
    arguments: list[str], folder: Path, *, quiet: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run pytest in the copy; if `quiet`, keep its output in the result."""
    command = [sys.executable, "-m", "pytest", "-m", "not message_text", *arguments]
    # If pytest runs this function, its own settings must not reach the other pytest.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST")
    }
    # A fork server does not get pytest's import path. Without this variable, it would import the
    # installed program, whose messages are not reworded.
    environment["PYTHONPATH"] = str(folder)
    output = subprocess.PIPE if quiet else None
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=output, stderr=output, text=True, check=False
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="em-reworded-") as parent:
        copied = Path(parent) / "copy"
        copy(copied)
        sys.exit(run(sys.argv[1:], copied).returncode)
