"""Pictures of the status page, of a real runner under load. `scripts/screenshots.sh` runs it."""

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
from runner.dashboard import ASSETS
from tests.browser import chromium
from tests.cluster import ROOT, Cluster, agent, cluster, until

WARM_UP_S = 90.0
DIGEST = "page.sha256"
DESK = {"viewport": {"width": 1400, "height": 860}}
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
            second_life = AsyncExitStack()
            second = await second_life.enter_async_context(serve(NodeSettings(port=0)))
            stack.push_async_callback(second_life.aclose)
            agents = [
                agent(name, [node.url for node in nodes], handler=f"handlers.py:{name}")
                for name, nodes in (("search", (first, second)), ("echo", (first, second)), ("weather", (first,)))
            ]
            running = await stack.enter_async_context(
                cluster(Path(scratch), *agents, handlers=HANDLERS, supervision="max_restarts = 1")
            )
            await running.wait_ready()
            browser = await stack.enter_async_context(chromium())
            async with anyio.create_task_group() as tasks:
                for name, per_s in (("search", 60), ("echo", 140), ("weather", 12)):
                    tasks.start_soon(load, running, name, per_s)
                await anyio.sleep(WARM_UP_S)
                await picture(browser, running, folder / "light.png", DESK)
                await picture(browser, running, folder / "dark.png", {**DESK, "color_scheme": "dark"})
                await picture(browser, running, folder / "phone.png", PHONE)
                await take_down(running, "weather_server")
                await second_life.aclose()
                await running.wait_state("echo_server_2", "backoff")
                await picture(browser, running, folder / "worker-down.png", DESK, open_error="weather_server")
                tasks.cancel_scope.cancel()


async def load(running: Cluster, name: str, per_s: float) -> None:
    """Ask an agent and its second worker, more and less by turns."""
    began_s = time.monotonic()
    chance = random.Random(name)
    while True:
        wave = 1 + 0.6 * math.sin((time.monotonic() - began_s) / 9)
        await anyio.sleep(chance.expovariate(per_s * wave))
        worker = f"{name}_server" + ("_2" if name != "weather" and chance.random() < 0.3 else "")
        await running.ask(f"red fish {chance.randrange(100)}", worker=worker)


async def take_down(running: Cluster, worker: str) -> None:
    """Kill a worker as often as it is started at once."""
    while (await running.row(worker))["state"] != "failed":
        pid = (await running.row(worker))["pid"]
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

            async def noticed(pid: int = pid) -> bool:
                row = await running.row(worker)
                return row["pid"] != pid and row["state"] in ("ready", "failed")

            await until(noticed, "it is up again, or given up")


async def picture(
    browser: Browser, running: Cluster, path: Path, screen: dict[str, Any], open_error: str | None = None
) -> None:
    """Ask a query on the page and take its picture."""
    page = await (await browser.new_context(**screen)).new_page()
    await page.goto(str(running.http.base_url))
    await expect(page.locator("#link")).to_have_text("live")
    await ask(page)
    if open_error is not None:
        await page.locator(f"[data-worker={open_error}] [data-cell=brief]").click()
    await page.evaluate("scrollTo(0, 0)")
    await page.screenshot(path=path, full_page=True)
    await page.context.close()
    print(path)


def page_digest() -> str:
    """Return what tells the page that the pictures are of from an earlier one."""
    digest = hashlib.sha256()
    for name in ("page.html", *ASSETS):
        digest.update((ROOT / "runner" / "dashboard" / name).read_bytes())
    return digest.hexdigest()


async def ask(page: Page) -> None:
    await page.get_by_label("Query", exact=True).fill("red fish")
    await page.get_by_label("Whom").select_option("agent/echo")
    await page.get_by_role("button", name="Ask").click()
    await expect(page.locator("#verdict")).to_contain_text("answered in")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    wanted = parser.parse_args().folder
    wanted.mkdir(parents=True, exist_ok=True)
    anyio.run(main, wanted, backend_options={"use_uvloop": True})
    (wanted / DIGEST).write_text(f"{page_digest()}\n")
