"""Parts of other files that pages include, and the links in them.

Each text is written in one file. A page may include a part of it, between the marks

    <!-- included: ../deploy/README.md, from "## Sizing" to "## What to watch" -->
    <!-- /included -->

The lines that `from` and `to` name are not included. Without `from` the part starts at the start of
the file. Without `to` it ends at the end of the file. `parts.py` writes the text between the marks.
"""

from __future__ import annotations

import os
import re
import typing
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
"""Files of the repository that are also pages. A link to such a file becomes a link to its page."""

_SOURCE: Final = re.compile(r'(\S+?)(?:,(?: from "([^"]*)")?(?: to "([^"]*)")?)?')
_LINK: Final = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def part(name: str, page: Path) -> str:
    """Return the part of a file that a mark in a page names, with its links relative to the page.

    Raises:
        ValueError: the name cannot be read, or the file lacks a line that it names.
    """
    found = _SOURCE.fullmatch(name)
    if found is None:
        raise ValueError(f"{page}: cannot read the mark 'included: {name}'")
    file, start, end = (page.parent / found[1]).resolve(), found[2], found[3]
    text = file.read_text()
    if start:
        text = _split(text, start, file)[1]
    if end:
        text = _split(text, end, file)[0]

    def moved(link: re.Match[str]) -> str:
        return f"{os.path.relpath(file.parent / link[1], page.parent)}{link[2] or ''}"

    return _LINK.sub(moved, text.strip())


def for_sphinx(text: str, page: Path) -> str:
    """Return a page with each link to a repository file as Sphinx needs it.

    A link to a file that is also a page becomes a link to the page. A link to any other Markdown
    file becomes a download.
    """

    def for_page(link: re.Match[str]) -> str:
        return f"{_target(page.parent / link[1], page)}{link[2] or ''}"

    return _LINK.sub(for_page, text)


def _split(text: str, line: str, file: Path) -> tuple[str, str]:
    before, found, after = f"\n{text}".partition(f"\n{line}\n")
    if not found:
        raise ValueError(f"{file} has no line {line!r}")
    return before, after


def _target(path: Path, page: Path) -> str:
    file = path.resolve()
    file = PAGES.get(file, file)
    relative = os.path.relpath(file, page.parent)
    return relative if file.is_relative_to(DOCS) or file.suffix != ".md" else f"path:{relative}"


def _on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = for_sphinx(content[0], Path(app.env.doc2path(docname)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
