"""Headless Chromium, as Debian and others install it: no browser is fetched."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def program() -> str | None:
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A browser of its own, gone at the end."""
    # Its sandbox is not for the superuser.
    arguments = [*QUIET, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program(), args=arguments)
        try:
            yield browser
        finally:
            await browser.close()
