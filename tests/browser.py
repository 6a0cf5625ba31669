"""Runs the headless Chromium that the system has installed. Nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, async_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
NO_BACKGROUND_TRAFFIC = (
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_browser() -> str | None:
    """Return the path of the installed browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Start a new browser. It is closed at the end of the block."""
    arguments = [*NO_BACKGROUND_TRAFFIC]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
    async with async_playwright() as playwright:
        launch = playwright.chromium.launch
        browser = await launch(executable_path=find_browser(), args=arguments)
        try:
            yield browser
        finally:
            await browser.close()
