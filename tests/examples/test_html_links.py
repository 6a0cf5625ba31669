"""The example that reads links from HTML."""

from __future__ import annotations

import pytest

from examples import html_links
from tests.examples.harness import Page

pytestmark = pytest.mark.anyio

HANDLER = "examples.html_links:HtmlLinks"
PAGE = b"""<!doctype html><title>Fruit</title>
<ul>
<li><a href="/apple">Green   apple</a>, a fruit of autumn</li>
<li><a href="http://other.test/pear"><b>Pear</b></a> is another</li>
<li><a href="apple2">Apple</a> again</li>
<li><a href="mailto:apple@fruit.test">apple</a> <a href="javascript:apple()">apple</a></li>
<li><a>apple</a></li>
<li><a href="http://[">apple</a></li>
</ul>"""


@pytest.fixture
def source(monkeypatch):
    """A function that sets the example's source."""
    monkeypatch.delenv("HTML_LINKS_TIMEOUT_S", raising=False)
    return lambda text: monkeypatch.setenv("HTML_LINKS_SOURCE", str(text))


def urls(answer):
    assert all(embryo["type"] == "url" for embryo in answer)
    return [embryo["properties"]["url"] for embryo in answer]


async def test_html_links_returns_the_links_that_match_all_words(ask, site, source):
    site.pages["/fruit/"] = Page(body=PAGE)
    source(f"{site.url}/fruit/")
    apples, autumn, none = await ask(HANDLER, "APPLE", "fruit autumn", "plum")
    assert urls(apples) == [f"{site.url}/apple", f"{site.url}/fruit/apple2"]
    assert autumn == [
        {
            "type": "url",
            "properties": {
                "url": f"{site.url}/apple",
                "title": "Green apple",
                "resume": "Green apple, a fruit of autumn",
            },
        }
    ]
    assert none == []


async def test_html_links_returns_every_link_of_a_search_page(ask, site, source):
    site.pages["/find"] = Page(body=b'<a href="/1">one</a>')
    source(f"{site.url}/find?q={{query}}")
    [answer] = await ask(HANDLER, "two & three")
    assert urls(answer) == [f"{site.url}/1"]
    assert site.requested == ["/find?q=two%20%26%20three"]


async def test_html_links_returns_each_link_in_a_folder_once(ask, tmp_path, source):
    (tmp_path / "a.html").write_bytes(
        b'<a href="b.html">apple</a> <a href="http://x.test/">apple</a>'
    )
    (tmp_path / "b.html").write_bytes(b'<a href="http://x.test/">apple tree</a>')
    (tmp_path / "notes.txt").write_bytes(b'<a href="http://y.test/">apple</a>')
    source(tmp_path)
    [answer] = await ask(HANDLER, "apple")
    assert urls(answer) == [(tmp_path / "b.html").resolve().as_uri(), "http://x.test/"]


async def test_html_links_returns_at_most_its_limit(ask, tmp_path, source):
    page = "".join(f'<p><a href="http://x.test/{number}">apple</a></p>' for number in range(100))
    (tmp_path / "a.html").write_text(page)
    source(tmp_path)
    [answer] = await ask(HANDLER, "apple")
    assert len(answer) == html_links.MAX_LINKS


async def test_html_links_follows_redirects(ask, site, source):
    site.pages["/old"] = Page(301, location="/a/b")
    site.pages["/a/b"] = Page(body=b'<a href="c">apple</a>')
    source(f"{site.url}/old")
    [answer] = await ask(HANDLER, "apple")
    assert urls(answer) == [f"{site.url}/a/c"]


@pytest.mark.parametrize(
    "page", [Page(500, b'<a href="/1">apple</a>'), Page(200, b""), Page(200, b"\x00\xff<<<a")]
)
async def test_html_links_returns_nothing_for_a_page_without_links(ask, site, source, page):
    site.pages["/"] = page
    source(f"{site.url}/")
    assert await ask(HANDLER, "apple") == [[]]


async def test_html_links_returns_nothing_when_a_page_times_out(
    ask, site, source, monkeypatch, caplog
):
    monkeypatch.setenv("HTML_LINKS_TIMEOUT_S", "0.5")
    site.pages["/"] = Page(hangs=True)
    source(f"{site.url}/")
    assert await ask(HANDLER, "apple") == [[]]
    assert "ReadTimeout" in caplog.text


async def test_html_links_returns_nothing_when_the_site_is_down(
    ask, unused_address, source, caplog
):
    source(f"http://{unused_address}/")
    assert await ask(HANDLER, "apple") == [[]]
    assert "ConnectError" in caplog.text


async def test_html_links_reads_a_page_up_to_its_limit(ask, site, source, monkeypatch):
    monkeypatch.setattr(html_links, "MAX_PAGE_BYTES", 1000)
    site.pages["/"] = Page(
        body=b'<a href="/1">apple</a>' + b" " * 2_000 + b'<a href="/2">apple</a>'
    )
    source(f"{site.url}/")
    [answer] = await ask(HANDLER, "apple")
    assert urls(answer) == [f"{site.url}/1"]


def test_html_links_requires_a_source(monkeypatch):
    monkeypatch.delenv("HTML_LINKS_SOURCE", raising=False)
    with pytest.raises(RuntimeError, match="HTML_LINKS_SOURCE is not set"):
        html_links.HtmlLinks().setup()
