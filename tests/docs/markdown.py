"""A page of Markdown as the steps that its reader takes: files to write, commands to run, servers to end.

What a reader knows and a machine does not is said in a comment before a fence:

    <!-- run: not: it needs systemd -->            none of its commands is run
    <!-- run: background until "The demo is up" -->   the last command is a server; it goes on meanwhile
    <!-- run: terminal 2 -->                       from here on; the page begins in terminal 1
    <!-- run: until it is so -->                   run again until it ends and prints as shown
    <!-- run: numbers vary -->                     any number will do where one is shown
    <!-- run: status 1 -->                         how it ends; 0 otherwise

Several of them are parted by a semicolon. Two stand alone: `<!-- run: in a checkout -->` has the page begin
there, and `<!-- run: stop em-runner run -->` is Ctrl-C in the terminal where that was started.
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
        *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
    ]
)

_DIRECTIVE = re.compile(r"<!-- run: (.*) -->")
_FENCE = re.compile(r"(`{3,})\s*(\S*)(?:\s.*)?")
_FILE = re.compile(r"# (~?[\w./-]+\.(?:py|toml|conf))(?:,.*)?")


@dataclass
class Command:
    """One command of a console block, and what is shown below it."""

    text: str
    shown: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A fenced block, or a directive that stands alone (language `stop` or `checkout`)."""

    page: Path
    line: int
    language: str
    lines: list[str]
    directives: list[str]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    @property
    def not_run(self) -> str | None:
        """Why it is not run."""
        return self._after("not: ")

    @property
    def file(self) -> str | None:
        """The file that a reader makes of it: its first line says so."""
        found = _FILE.fullmatch(self.lines[0]) if self.lines and self.language != "console" else None
        return None if found is None else found[1]

    @property
    def until(self) -> str | None:
        """What a server prints when it is up."""
        found = self._after("background until ")
        return None if found is None else found.strip('"')

    @property
    def status(self) -> int:
        return int(self._after("status ") or 0)

    @property
    def terminal(self) -> str | None:
        """The one that it is typed into, when that is another than before."""
        return self._after("terminal ")

    @property
    def again(self) -> bool:
        return "until it is so" in self.directives

    @property
    def numbers_vary(self) -> bool:
        return "numbers vary" in self.directives

    @property
    def commands(self) -> list[Command]:
        found: list[Command] = []
        for line in self.lines:
            if line.startswith("$ "):
                found.append(Command(line[2:]))
            elif found and found[-1].text.endswith("\\"):
                found[-1].text += "\n" + line
            elif line.strip():
                assert found, f"{self.where}: a console block begins with a command, not with {line!r}"
                found[-1].shown.append(line)
        return found

    @property
    def commands_if_console(self) -> list[Command]:
        return self.commands if self.language == "console" else []

    def _after(self, start: str) -> str | None:
        return next((each.removeprefix(start) for each in self.directives if each.startswith(start)), None)


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks, in order."""
    found: list[Block] = []
    directives: list[str] = []
    fence = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence = ""
            else:
                found[-1].lines.append(line)
        elif match := _DIRECTIVE.fullmatch(line.strip()):
            directives = [each.strip() for each in match[1].split(";")]
            if directives[0].startswith("stop "):
                found.append(Block(page, number, "stop", [directives[0].removeprefix("stop ")], []))
                directives = []
            elif directives == ["in a checkout"]:
                found.append(Block(page, number, "checkout", [], []))
                directives = []
        elif match := _FENCE.fullmatch(line):
            fence = match[1]
            found.append(Block(page, number, match[2], [], directives))
            directives = []
        elif line.strip():
            assert not directives, f"{page.name}:{number}: a directive stands before a fence: {directives}"
    assert not fence, f"{page}: a fence is not closed"
    return found
