"""Parses a page of Markdown into the steps that its reader takes.

A step is a file to write, a command to run or a server to stop. A comment above a fenced block adds
what a reader knows and a program does not:

    <!-- run: not: it needs systemd -->   run none of its commands, for this reason
    <!-- run: background until "ready" -->   its last command is a server, which keeps running
    <!-- run: terminal 2 -->              change to this terminal; a page begins in terminal 1
    <!-- run: until it matches -->        repeat it until it prints and exits as shown
    <!-- run: numbers vary -->            accept any number where the text shows one
    <!-- run: status 1 -->                expect this exit status instead of 0

Semicolons separate several instructions in a comment. Two instructions have no block: at
`<!-- run: in a checkout -->` the reader changes to a checkout, and at
`<!-- run: stop em-runner run -->` the reader presses Ctrl-C where that command is running.

A part that a page includes from another page has no blocks there: they are run in the other page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "deploy" / "README.md",
        *(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
    ]
)

_INSTRUCTIONS = re.compile(r"<!-- run: (.*) -->")
_INCLUDED = re.compile(r"^<!-- included: .*?^<!-- /included -->$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"(`{3,})\s*(\S*)(?:\s.*)?")
_FILE = re.compile(r"# (~?[\w./-]+\.(?:py|toml|conf))(?:,.*)?")


@dataclass
class Command:
    """A command in a console block, with the output that the page shows for it."""

    text: str
    shown: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A fenced block, or an instruction without a block.

    Attributes:
        language: the block's language; `stop` or `checkout` for an instruction without a block.
        lines: the lines between the fences; for `stop`, the start of the command to stop.
        instructions: those of the comment above the block.
    """

    page: Path
    line: int
    language: str
    lines: list[str]
    instructions: list[str]

    @property
    def where(self) -> str:
        """The page and the line of the block, for error messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def not_run(self) -> str | None:
        """The reason why the block is not run, or None."""
        return self._instruction("not: ")

    @property
    def file(self) -> str | None:
        """The file that the block is written to, from its first line."""
        if not self.lines or self.language == "console":
            return None
        found = _FILE.fullmatch(self.lines[0])
        return None if found is None else found[1]

    @property
    def ready_text(self) -> str | None:
        """The text that the server in the last command prints when it is ready."""
        found = self._instruction("background until ")
        return None if found is None else found.strip('"')

    @property
    def status(self) -> int:
        return int(self._instruction("status ") or 0)

    @property
    def terminal(self) -> str | None:
        """The terminal to change to, or None."""
        return self._instruction("terminal ")

    @property
    def repeats(self) -> bool:
        return "until it matches" in self.instructions

    @property
    def numbers_vary(self) -> bool:
        return "numbers vary" in self.instructions

    @property
    def commands(self) -> list[Command]:
        """The commands of a console block. Other blocks have none."""
        if self.language != "console":
            return []
        found: list[Command] = []
        for line in self.lines:
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            elif found and found[-1].text.endswith("\\"):
                found[-1].text += "\n" + line
            elif line.strip():
                assert found, f"{self.where}: {line!r} stands above the first command"
                found[-1].shown.append(line)
        return found

    def _instruction(self, start: str) -> str | None:
        """Return the rest of the instruction that starts with `start`, or None."""
        found = [each for each in self.instructions if each.startswith(start)]
        return found[0].removeprefix(start) if found else None


def own_text(page: Path) -> str:
    """Return a page's text. Parts from other pages are replaced by as many empty lines."""
    return _INCLUDED.sub(lambda found: "\n" * found[0].count("\n"), page.read_text())


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks and its instructions without a block, in order."""
    found: list[Block] = []
    instructions: list[str] = []
    fence = ""
    for number, line in enumerate(own_text(page).splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                found[-1].lines.append(line)
        elif match := _INSTRUCTIONS.fullmatch(line.strip()):
            instructions = [each.strip() for each in match[1].split(";")]
            if instructions[0].startswith("stop "):
                command = instructions[0].removeprefix("stop ")
                found.append(Block(page, number, "stop", [command], []))
                instructions = []
            elif instructions == ["in a checkout"]:
                found.append(Block(page, number, "checkout", [], []))
                instructions = []
        elif match := _FENCE.fullmatch(line):
            fence = match[1]
            found.append(Block(page, number, match[2], [], instructions))
            instructions = []
        elif line.strip():
            assert not instructions, (
                f"{page.name}:{number}: no fence follows the instructions {instructions}"
            )
    assert not fence, f"{page}: a fence is not closed"
    return found
