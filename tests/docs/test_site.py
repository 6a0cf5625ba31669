"""The built pages: without warnings, without outside resources, without broken links."""

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
RESOURCES = {
    "link": "href",
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
}


class ParsedPage(HTMLParser):
    """A built page.

    Attributes:
        resources: the addresses that a browser loads for the page.
        links: the targets of its links.
        ids: its anchors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        resource = values.get(RESOURCES.get(tag, ""))
        # Browsers do not load these links.
        is_reference = values.get("rel") in ("canonical", "author")
        if resource is not None and not is_reference:
            self.resources.append(resource)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "id" in values:
            self.ids.add(values["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages, built with the options of `scripts/docs.sh`."""
    folder = tmp_path_factory.mktemp("site")
    lines = (ROOT / "scripts" / "docs.sh").read_text().splitlines()
    [line] = [line for line in lines if "-m sphinx" in line]
    arguments = line.partition("-m sphinx ")[2].replace('"$@" ', "").split()
    options = arguments[:-1]  # the last one is the output folder
    assert {"-W", "-n", "--keep-going"} <= set(options)
    doctrees, html = folder / "doctrees", folder / "html"
    command = [sys.executable, "-m", "sphinx", "-q", *options, "-d", doctrees, html]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (built.returncode, built.stderr) == (0, ""), built.stdout + built.stderr
    return html


def read(page: Path) -> ParsedPage:
    parsed = ParsedPage()
    parsed.feed(page.read_text())
    return parsed


def test_every_page_is_built_without_a_warning(site: Path) -> None:
    built = {str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html")}
    sources = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert len(sources) > 20
    assert {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in sources} <= built


def test_pages_load_only_files_of_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        for address in read(page).resources:
            parts = urlsplit(address)
            assert not parts.netloc, f"{page.name} loads {address}"
            if parts.path:
                file = page.parent / unquote(parts.path)
                assert file.is_file(), f"{page.name} loads {address}, which does not exist"


def test_style_sheets_load_nothing_from_other_hosts(site: Path) -> None:
    style_sheets = [*site.rglob("*.css")]
    assert style_sheets
    for style in style_sheets:
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_links_within_the_built_pages_have_a_target(site: Path) -> None:
    pages = {page: read(page) for page in site.rglob("*.html")}
    for page, parsed in pages.items():
        for link in parsed.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            where = f"{page.relative_to(site)}: {link}"
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), where
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, where


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_between_files_of_the_repository_have_a_target(page: Path) -> None:
    prose = re.sub(r"(`{3,})[\s\S]*?\1", "", page.read_text())
    for link in LINK.findall(prose):
        if not urlsplit(link).scheme and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_generated_parts_are_built(site: Path) -> None:
    text = (site / "reference" / "configuration.html").read_text()
    assert "handler_timeout_ms" in text
    assert "em-runner status" in (site / "reference" / "commands.html").read_text()
    assert "em_runner_queries_total" in (site / "reference" / "metrics.html").read_text()


def test_part_of_another_page_is_built_once(site: Path) -> None:
    text = (site / "how-to" / "monitoring.html").read_text()
    assert text.count("scrape_configs") == 1
    assert "grafana-dashboard.json" in text


def test_pictures_show_the_current_status_page() -> None:
    digest = (ROOT / "docs" / "images" / DIGEST).read_text().strip()
    assert digest == page_digest(), "run scripts/screenshots.sh"
