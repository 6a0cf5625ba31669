"""An agent that reads HTML and returns the links that match the query.

    [[agent]]
    name = "html_links"
    handler = "examples.html_links:HtmlLinks"
    memory = "none"

The environment names the source, which the agent reads again for each query:

    HTML_LINKS_SOURCE       a folder with *.html files, such as ~/pages
                            or a page, such as https://example.com/links.html
                            or a search page, such as https://example.com/find?q={query}
    HTML_LINKS_TIMEOUT_S    the timeout for a page, by default 4 (an em_disco node waits 5 s)

A link matches if its text and the text around it together contain every word of the query. On a
search page every link matches.

Needs httpx and selectolax.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import httpx
from selectolax.lexbor import LexborHTMLParser, LexborNode

log = logging.getLogger(__name__)

MAX_LINKS = 20
MAX_PAGE_BYTES = 2 * 1024 * 1024
MAX_RESUME = 200

Embryo = dict[str, Any]


class HtmlLinks:
    """Reads the pages for one worker.

    `handle` is a plain method, so it runs on a separate thread and may block.
    """

    def setup(self) -> None:
        """Read the environment and open the client."""
        self._source = os.environ.get("HTML_LINKS_SOURCE", "")
        if not self._source:
            raise RuntimeError(
                "HTML_LINKS_SOURCE is not set; it is a folder of HTML files or a page's address"
            )
        self._timeout_s = float(os.environ.get("HTML_LINKS_TIMEOUT_S", "4"))
        self._client = httpx.Client(timeout=self._timeout_s, follow_redirects=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def handle(self, body: str, memory: dict[str, Any]) -> tuple[list[Embryo], dict[str, Any]]:
        """Return the matching links without duplicates, or an empty list if nothing can be read."""
        words = () if "{query}" in self._source else tuple(body.casefold().split())
        found: dict[str, Embryo] = {}
        try:
            for address, page in self._pages(body):
                for link in links(page, address):
                    if _fits(link, words):
                        found.setdefault(link["properties"]["url"], link)
                    if len(found) == MAX_LINKS:
                        return list(found.values()), memory
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
            log.warning("the pages cannot be read: %s", type(exc).__name__)
        return list(found.values()), memory

    def _pages(self, query: str) -> Iterator[tuple[str, bytes]]:
        if self._source.startswith(("http://", "https://")):
            yield self._fetch(self._source.replace("{query}", quote(query, safe="")))
            return
        for file in sorted(Path(self._source).expanduser().resolve().glob("*.html")):
            yield file.as_uri(), file.read_bytes()[:MAX_PAGE_BYTES]

    def _fetch(self, address: str) -> tuple[str, bytes]:
        """Return a page's address after redirects, and the page.

        A page that is too slow or too large is cut off.
        """
        ends = time.monotonic() + self._timeout_s
        page = bytearray()
        with self._client.stream("GET", address) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                page += chunk
                if len(page) >= MAX_PAGE_BYTES or time.monotonic() > ends:
                    break
        return str(response.url), bytes(page[:MAX_PAGE_BYTES])


def links(page: bytes, address: str) -> Iterator[Embryo]:
    """Return each link of a page as an embryo with an absolute address."""
    for node in LexborHTMLParser(page).css("a[href]"):
        try:
            url = urljoin(address, node.attributes["href"] or "")
            scheme = urlsplit(url).scheme
        except ValueError:  # such as http://[
            continue
        if scheme in ("http", "https", "file"):
            title = _text(node) or url
            yield {
                "type": "url",
                "properties": {"url": url, "title": title, "resume": _around(node)},
            }


def _around(node: LexborNode) -> str:
    return _text(node.parent)[:MAX_RESUME] if node.parent is not None else ""


def _text(node: LexborNode) -> str:
    return " ".join(node.text().split())


def _fits(link: Embryo, words: tuple[str, ...]) -> bool:
    text = f"{link['properties']['title']} {link['properties']['resume']}".casefold()
    return all(word in text for word in words)
