"""Texts of the repository that are pages too, or parts of some: one text in one place, wherever its links lead.

A line `<!-- included: ../deploy/README.md, from "## How large" to "## What to watch" -->` in a page is replaced by that
part of the file, without the lines named; both ends may be left out. Links are turned to where they lead from the page;
one to a Markdown file that is no page is a download.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Final

if typing.TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS: Final = Path(__file__).resolve().parents[1]
PAGES: Final = {
    DOCS.parent / "README.md": DOCS / "index.md",
    DOCS.parent / "SECURITY.md": DOCS / "explanation" / "security.md",
    DOCS.parent / "deploy" / "README.md": DOCS / "how-to" / "systemd.md",
}
"""The pages in whose stead readers of the repository have another file."""

_MARK: Final = re.compile(r'^<!-- included: (\S+?)(?:,(?: from "([^"]*)")?(?: to "([^"]*)")?)? -->$', re.MULTILINE)
_LINK: Final = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def filled(text: str, page: Path) -> str:
    """Return a page with its included parts in place, and its links as Sphinx wants them."""
    text = _MARK.sub(lambda found: _part(found, page), text)
    return _LINK.sub(lambda found: f"{_target(page.parent / found[1], page)}{found[2] or ''}", text)


def sources(text: str, page: Path) -> Iterator[Path]:
    """Return the files that a page includes."""
    for found in _MARK.finditer(text):
        yield (page.parent / found[1]).resolve()


def _part(found: re.Match[str], page: Path) -> str:
    file, begin, end = (page.parent / found[1]).resolve(), found[2], found[3]
    text = file.read_text()
    if begin:
        text = _split(text, begin, file)[1]
    if end:
        text = _split(text, end, file)[0]
    return _LINK.sub(lambda link: f"{os.path.relpath(file.parent / link[1], page.parent)}{link[2] or ''}", text.strip())


def _split(text: str, line: str, file: Path) -> tuple[str, str]:
    before, found, after = f"\n{text}".partition(f"\n{line}\n")
    if not found:
        raise ValueError(f"{file} has no line {line!r}")
    return before, after


def _target(path: Path, page: Path) -> str:
    file = path.resolve()
    file = PAGES.get(file, file)
    told = os.path.relpath(file, page.parent)
    return told if file.is_relative_to(DOCS) or file.suffix != ".md" else f"path:{told}"


def _on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    for source in sources(content[0], page):
        app.env.note_dependency(str(source))
    content[0] = filled(content[0], page)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
