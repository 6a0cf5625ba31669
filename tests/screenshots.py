"""Takes pictures of the status page of a runner under load. `scripts/screenshots.sh` runs it."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import random
import signal
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
from playwright.async_api import Browser, Page, expect

from disco import NodeSettings, serve
from runner.web.dashboard import ASSETS
from tests.browser import chromium
from tests.cluster import ROOT, Cluster, agent, cluster, until

WARM_UP_S = 90.0
DIGEST = "page.sha256"
"""The file with the hash of the page that the pictures show. A test compares it with the page."""

LOAD = {"search": 60, "echo": 140, "weather": 12}
"""The mean queries per second for each agent."""

DESKTOP = {"viewport": {"width": 1400, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}

HANDLERS = """
import random, time

def search(body, memory):
    time.sleep(random.lognormvariate(-6.5, 0.8))
    count = memory.get("asked", 0) + 1
    return [{"type": "page", "properties": {"title": body, "number": count}}], {"asked": count}

async def echo(body, memory):
    return {"type": "echo", "properties": {"title": body}}, memory

def weather(body, memory):
    time.sleep(random.lognormvariate(-4, 0.5))
    if random.random() < 0.02:
        raise TimeoutError("the weather service did not answer within 2 s")
    return {"type": "weather", "properties": {"place": body, "celsius": 11}}, memory
"""


async def main(folder: Path) -> None:
    """Take the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(serve(NodeSettings(port=0)))
            second_node = AsyncExitStack()
            second = await second_node.enter_async_context(serve(NodeSettings(port=0)))
            stack.push_async_callback(second_node.aclose)
            both = [first.url, second.url]
            agents = [
                agent("search", both, handler="handlers.py:search"),
                agent("echo", both, handler="handlers.py:echo"),
                agent("weather", [first.url], handler="handlers.py:weather"),
            ]
            running = await stack.enter_async_context(
                cluster(Path(scratch), *agents, handlers=HANDLERS, supervision="max_restarts = 1")
            )
            await running.wait_ready()
            browser = await stack.enter_async_context(chromium())
            async with anyio.create_task_group() as tasks:
                for name, per_s in LOAD.items():
                    tasks.start_soon(load, running, name, per_s)
                await anyio.sleep(WARM_UP_S)
                dark = {**DESKTOP, "color_scheme": "dark"}
                await picture(browser, running, folder / "light.png", DESKTOP)
                await picture(browser, running, folder / "dark.png", dark)
                await picture(browser, running, folder / "phone.png", PHONE)

                failed = "weather_server"
                await kill_until_failed(running, failed)
                await second_node.aclose()
                await running.wait_state("echo_server_2", "backoff")
                path = folder / "worker-down.png"
                await picture(browser, running, path, DESKTOP, open_error=failed)
                tasks.cancel_scope.cancel()


async def load(running: Cluster, name: str, per_s: float) -> None:
    """Send queries to an agent's workers, at a rate that varies around `per_s`."""
    began_s = time.monotonic()
    chance = random.Random(name)
    while True:
        wave = 1 + 0.6 * math.sin((time.monotonic() - began_s) / 9)
        await anyio.sleep(chance.expovariate(per_s * wave))
        second = name != "weather" and chance.random() < 0.3
        worker = f"{name}_server_2" if second else f"{name}_server"
        await running.ask(f"red fish {chance.randrange(100)}", worker=worker)


async def kill_until_failed(running: Cluster, worker: str) -> None:
    """Kill a worker after each restart, until it is not restarted immediately."""
    while (await running.row(worker))["state"] != "failed":
        pid = (await running.row(worker))["pid"]
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

            async def replaced(pid: int = pid) -> bool:
                row = await running.row(worker)
                return row["pid"] != pid and row["state"] in ("ready", "failed")

            await until(replaced, f"{worker} is restarted or failed")


async def picture(
    browser: Browser,
    running: Cluster,
    path: Path,
    screen: dict[str, Any],
    open_error: str | None = None,
) -> None:
    """Send a query from the page, and take a picture of it.

    Args:
        browser: the browser.
        running: the runner.
        path: the file for the picture.
        screen: options for the browser's context.
        open_error: the worker whose last errors are shown in full.
    """
    page = await (await browser.new_context(**screen)).new_page()
    await page.goto(str(running.http.base_url))
    await expect(page.locator("#connection")).to_have_attribute("data-connection", "live")
    await ask(page)
    if open_error is not None:
        await page.locator(f"[data-worker={open_error}] [data-cell=brief]").click()
    await page.evaluate("scrollTo(0, 0)")
    await page.screenshot(path=path, full_page=True)
    await page.context.close()
    print(path)


def page_digest() -> str:
    """Return a hash of the page's files. It changes when the pictures are outdated."""
    digest = hashlib.sha256()
    for name in ("page.html", *ASSETS):
        digest.update((ROOT / "runner" / "web" / "dashboard" / name).read_bytes())
    return digest.hexdigest()


async def ask(page: Page) -> None:
    """Send a query with the page's form, and wait for the result."""
    await page.get_by_label("Query", exact=True).fill("red fish")
    await page.get_by_label("To", exact=True).select_option("agent/echo")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator("#result")).to_be_visible()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    target.mkdir(parents=True, exist_ok=True)
    anyio.run(main, target, backend_options={"use_uvloop": True})
    (target / DIGEST).write_text(f"{page_digest()}\n")
