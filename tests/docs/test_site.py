"""The pages as they are built: no warning, nothing loaded from elsewhere, no link that leads nowhere."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.markdown import PAGES, ROOT
from tests.screenshots import DIGEST, page_digest

LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\(([^)\s]+)\)")
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}


class Loaded(HTMLParser):
    """What a browser fetches for a page, and where its anchors and links are."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        if tag in LOADS and LOADS[tag] in found and found.get("rel") not in ("canonical", "author"):
            self.loads.append(found[LOADS[tag]])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "id" in found:
            self.ids.add(found["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `scripts/docs.sh` does."""
    folder = tmp_path_factory.mktemp("site")
    [line] = [line for line in (ROOT / "scripts" / "docs.sh").read_text().splitlines() if "-m sphinx" in line]
    options = line.partition("-m sphinx ")[2].replace('"$@" ', "").split()[:-1]
    assert {"-W", "-n", "--keep-going"} <= set(options)
    command = [sys.executable, "-m", "sphinx", "-q", *options, "-d", str(folder / "doctrees"), str(folder / "html")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (built.returncode, built.stderr) == (0, ""), built.stdout + built.stderr
    return folder / "html"


def read(page: Path) -> Loaded:
    parsed = Loaded()
    parsed.feed(page.read_text())
    return parsed


def test_pages_are_built_without_a_warning(site: Path) -> None:
    built = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")}
    docs = {str(p.relative_to(ROOT / "docs").with_suffix("")) for p in PAGES if p.is_relative_to(ROOT / "docs")}
    assert len(docs) > 20
    assert docs <= built


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in read(page).loads:
            parts = urlsplit(address)
            assert not parts.netloc, f"{page.name} loads {address}"
            if parts.path:
                assert (page.parent / unquote(parts.path)).is_file(), f"{page.name} loads {address}, which is not there"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_links_of_the_built_pages_lead_somewhere(site: Path) -> None:
    pages = {page: read(page) for page in site.rglob("*.html")}
    for page, parsed in pages.items():
        for link in parsed.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.relative_to(site)}: {link}"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_in_the_repository_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(re.sub(r"(`{3,})[\s\S]*?\1", "", page.read_text())):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_every_generated_part_is_filled(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert "generated:" not in page.read_text(), page.name
    text = (site / "reference" / "configuration.html").read_text()
    assert "handler_timeout_ms" in text
    assert "em-runner status" in (site / "reference" / "commands.html").read_text()
    assert "em_runner_queries_total" in (site / "reference" / "metrics.html").read_text()


def test_page_that_takes_a_part_of_another_says_nothing_twice(site: Path) -> None:
    text = (site / "how-to" / "monitoring.html").read_text()
    assert text.count("scrape_configs") == 1
    assert text.count("grafana-dashboard.json") > 0, "the part is there"


def test_pictures_are_of_the_page_as_it_is() -> None:
    told = (ROOT / "docs" / "images" / DIGEST).read_text().strip()
    assert told == page_digest(), "run scripts/screenshots.sh"
