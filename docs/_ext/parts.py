"""Writes the generated and included parts of the pages into the pages, between their marks.

The pages in the repository contain the parts, because most readers read them there, and not in the
built documentation. `scripts/docs.sh` runs this program before it builds the pages. A test fails if
a page is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

import generated
import included

DOCS: Final = Path(__file__).resolve().parents[1]

_PART: Final = re.compile(
    r"^<!-- (generated|included): (.+?) -->\n(.*?)^<!-- /\1 -->$", re.MULTILINE | re.DOTALL
)
_MARK: Final = re.compile(r"^<!-- /?(generated|included)\b", re.MULTILINE)


def current(text: str, page: Path) -> str:
    """Return a page's text with up-to-date parts.

    Raises:
        ValueError: a mark lacks its counterpart, or names something that does not exist.
    """
    if len(_MARK.findall(text)) != 2 * len(_PART.findall(text)):
        raise ValueError(
            f"{page}: each mark of a part needs its counterpart, such as <!-- /generated -->"
        )

    def filled(found: re.Match[str]) -> str:
        kind, name, _ = found.groups()
        part = included.part(name, page) if kind == "included" else generated.part(name)
        return f"<!-- {kind}: {name} -->\n\n{part}\n\n<!-- /{kind} -->"

    return _PART.sub(filled, text)


def names(text: str) -> list[str]:
    """Return the names of the generated parts in a page."""
    return [name for kind, name, _ in _PART.findall(text) if kind == "generated"]


def main() -> None:
    """Update every page, and print the names of those that changed."""
    for page in sorted(DOCS.rglob("*.md")):
        if "_build" in page.parts:
            continue
        before = page.read_text()
        after = current(before, page)
        if after != before:
            page.write_text(after)
            print(f"updated {page.relative_to(DOCS.parent)}", file=sys.stderr)


if __name__ == "__main__":
    main()
