"""The status page in a real browser, against a real runner."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Locator, Page, Route, expect

from disco import Node, NodeSettings, serve
from runner.web.dashboard.routes import MAX_STREAMS
from tests import browser
from tests.cluster import Cluster, agent, cluster, until

pytestmark = pytest.mark.anyio

TIMEOUT_MS = 60_000
UNREACHABLE = "127.0.0.1:9"
STAYS_IN_BACKOFF = {"reconnect_interval_ms": 600_000}
"""Options of an agent that connects once during a test."""

MARKUP = "<img src=x onerror='document.title=1'>"
HANDLERS = f"""
def handle(body, memory):
    count = memory.get("count", 0) + 1
    if body == "fail":
        raise ValueError("{MARKUP}\\n second line")
    value = 2 ** 53 + 1 if body == "large" else body
    return {{"type": "count", "properties": {{"count": count, "body": value}}}}, {{"count": count}}
"""


@pytest.fixture(scope="module")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """One event loop for the module, so that its tests can share a browser."""
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="module")
async def shared_browser(anyio_backend: object) -> AsyncIterator[Browser]:
    if browser.find_browser() is None:
        pytest.skip("Chromium is not installed; install your distribution's package")
    expect.set_options(timeout=TIMEOUT_MS)
    async with browser.chromium() as running:
        yield running


@pytest.fixture
async def chromium(shared_browser: Browser) -> AsyncIterator[Browser]:
    """A browser without open pages. They are closed after the test."""
    yield shared_browser
    for context in shared_browser.contexts:
        await context.close()


class Dashboard:
    """A page in the browser, with the parts that tests look at.

    Attributes:
        console: the messages and errors of the page's script.
        requests: the addresses that the page has requested.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.console: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.summary = page.locator("#summary")
        self.connection = page.locator("#connection")
        self.announced = page.locator("#announcements")
        self.query = page.get_by_label("Query", exact=True)
        self.target = page.get_by_label("To", exact=True)
        self.button = page.get_by_role("button", name="Send")
        self.verdict = page.locator("#verdict")
        self.result = page.locator("#result")
        self.not_ready = page.locator("#not-ready")

    def cell(self, worker: str, field: str) -> Locator:
        return self.page.locator(f"[data-worker={worker}] [data-cell={field}]")

    async def expect_link(self, state: str) -> None:
        """Wait until the page shows this state of its connection to the runner."""
        await expect(self.connection).to_have_attribute("data-connection", state)

    async def send(self, query: str) -> None:
        await self.query.fill(query)
        await self.page.keyboard.press("Enter")

    async def expect_answer_of(self, worker: str) -> None:
        await expect(self.verdict).to_contain_text(f"{worker} ")
        await expect(self.result).to_be_visible()


async def open_dashboard(chromium: Browser, running: Cluster, **options: Any) -> Dashboard:
    """Open the page in a new browser context with these options, and wait until it is live."""
    context = await chromium.new_context(**options)
    context.set_default_timeout(TIMEOUT_MS)
    dashboard = Dashboard(await context.new_page())
    await dashboard.page.goto(str(running.http.base_url))
    if options.get("java_script_enabled", True):
        await dashboard.expect_link("live")
    return dashboard


@asynccontextmanager
async def one_agent(
    folder: Path, chromium: Browser, node: Node
) -> AsyncIterator[tuple[Cluster, Dashboard]]:
    """Run the agent `a` at a node, and open the page once it is ready."""
    async with cluster(folder, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        yield running, await open_dashboard(chromium, running)


def counted(ready: int, workers: int) -> re.Pattern[str]:
    """Return a pattern for `2 of 2 workers ready`, in any words."""
    return re.compile(rf"^{ready} \w+ {workers} \w+")


def reload_config(running: Cluster, text: str) -> None:
    """Replace the runner's configuration, and have it reloaded."""
    (running.state_dir.parent / "em-runner.toml").write_text(text)
    os.kill(running.process.pid, signal.SIGHUP)


async def kill(running: Cluster, worker: str) -> None:
    os.kill(await running.worker_pid(worker), signal.SIGKILL)


async def test_killed_worker_is_shown_as_restarted_then_as_failed(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", [node.url])]
    async with cluster(
        tmp_path, *agents, handlers=HANDLERS, supervision="max_restarts = 1"
    ) as running:
        await running.wait_ready()
        seen = await open_dashboard(chromium, running)
        await expect(seen.summary).to_have_text(counted(2, 2))

        await kill(running, "b_server")
        await expect(seen.cell("b_server", "restarts")).to_have_text("1")
        await running.wait_state("b_server", "ready")
        await expect(seen.cell("b_server", "state")).to_have_text("ready")

        await kill(running, "b_server")
        await expect(seen.cell("b_server", "state")).to_have_text("failed")
        await expect(seen.cell("b_server", "reason")).to_contain_text("SIGKILL")
        await expect(seen.summary).to_have_text(counted(1, 2))
        await expect(seen.announced).to_contain_text("b_server: failed")
        assert seen.console == []


async def test_last_error_is_shown_in_full_after_a_click(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        await kill(running, "a_server")
        in_full = seen.cell("a_server", "last_errors")
        await expect(in_full).to_contain_text("SIGKILL")
        await expect(in_full).not_to_be_visible()
        await seen.cell("a_server", "brief").click()
        await expect(in_full).to_be_visible()
        await expect(in_full).to_contain_text(re.compile(r"process, 20\d\d-\d\d-\d\d "))
        assert seen.console == []


async def test_query_to_a_failed_worker_counts_as_unserved(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, supervision="max_restarts = 0"
    ) as running:
        await running.wait_ready()
        seen = await open_dashboard(chromium, running)
        await kill(running, "a_server")
        await expect(seen.cell("a_server", "state")).to_have_text("failed")
        assert (await running.ask("x", worker="a_server")).status_code == 503
        await expect(seen.cell("a_server", "unserved")).to_have_text("1")


async def test_worker_is_shown_in_backoff_until_its_node_is_back(
    tmp_path: Path, chromium: Browser, reserved_port: int
) -> None:
    async with AsyncExitStack() as first_life:
        node = await first_life.enter_async_context(serve(NodeSettings(port=reserved_port)))
        async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
            await running.wait_ready()
            seen = await open_dashboard(chromium, running)
            await running.ask("fail", agent="a")
            await first_life.aclose()
            await expect(seen.cell("a_server", "state")).to_have_text("backoff")
            await expect(seen.summary).to_have_text(counted(0, 1))
            # The error of the connection does not replace the error of the handler.
            brief = seen.cell("a_server", "brief")
            await expect(brief).to_contain_text("connection, ")
            await expect(brief).to_contain_text("ValueError: <img")
            async with serve(NodeSettings(port=reserved_port)):
                await expect(seen.cell("a_server", "state")).to_have_text("ready")
                await expect(seen.summary).to_have_text(counted(1, 1))
            assert seen.console == []


@pytest.mark.message_text
async def test_texts_about_a_failed_worker(tmp_path: Path, chromium: Browser, node: Node) -> None:
    agents = [agent("a", [node.url]), agent("b", [node.url])]
    async with cluster(
        tmp_path, *agents, handlers=HANDLERS, supervision="max_restarts = 0"
    ) as running:
        await running.wait_ready()
        seen = await open_dashboard(chromium, running)
        await expect(seen.summary).to_have_text("2 of 2 workers ready")
        await expect(seen.page).to_have_title("2 of 2 workers ready - em-runner")
        await running.ask("fail", agent="a")
        await expect(seen.cell("a_server", "brief")).to_contain_text("s ago: ValueError: <img")
        await kill(running, "b_server")
        reason = seen.cell("b_server", "reason")
        await expect(reason).to_contain_text("; it is tried again within a minute")
        await expect(seen.cell("b_server", "last_errors")).to_contain_text("killed by SIGKILL")
        await expect(seen.summary).to_have_text("1 of 2 workers ready")


async def test_form_can_be_used_by_keyboard_alone(
    tmp_path: Path, chromium: Browser, node: Node, other_node: Node
) -> None:
    agents = agent("a", [node.url, other_node.url])
    async with cluster(tmp_path, agents, handlers=HANDLERS) as running:
        await running.wait_ready()
        await running.wait_state("a_server_2", "ready")
        seen = await open_dashboard(chromium, running)
        keyboard = seen.page.keyboard

        await seen.query.focus()
        await keyboard.type("red <fish>")
        await keyboard.press("Enter")
        await seen.expect_answer_of("a_server")
        result = json.loads(await seen.result.inner_text())
        assert result == {"type": "count", "properties": {"count": 1, "body": "red <fish>"}}
        await expect(seen.query).to_be_focused()

        await seen.target.select_option("a_server_2")
        await seen.target.focus()
        await keyboard.press("Tab")
        await keyboard.press("Enter")
        await seen.expect_answer_of("a_server_2")
        await expect(seen.button).to_be_focused()
        assert seen.console == []


async def test_query_can_have_several_lines(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.query.fill("one")
        await seen.page.keyboard.press("Shift+Enter")
        await seen.page.keyboard.type("two")
        await seen.page.keyboard.press("Enter")
        await expect(seen.result).to_contain_text('"body": "one\\ntwo"')


async def test_integer_beyond_javascripts_is_shown_exactly(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.send("large")
        await expect(seen.result).to_contain_text(str(2**53 + 1))


async def test_failed_query_is_shown_and_counted(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.send("x")
        await seen.expect_answer_of("a_server")
        await seen.send("fail")
        await expect(seen.verdict).to_contain_text("500, a_server ")
        await expect(seen.verdict).to_contain_text("handler_failed")
        await expect(seen.result).to_be_hidden()

        await expect(seen.cell("a_server", "errors")).to_have_text("1")
        await expect(seen.cell("a_server", "queries")).to_have_text("2")
        await expect(seen.cell("a_server", "p99")).to_contain_text("s")
        assert [message for message in seen.console if "500" not in message] == []


async def test_rate_of_a_worker_is_shown_while_it_gets_queries(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):

        async def ask_repeatedly() -> None:
            while True:
                await running.ask("x")
                await anyio.sleep(0.1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_repeatedly)
            await expect(seen.cell("a_server", "rate")).not_to_have_text("0")
            tasks.cancel_scope.cancel()


async def test_error_of_a_handler_is_shown_as_text_not_as_markup(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        await running.ask("fail", agent="a")
        # First the script shows the error. After the reload it is in the served page.
        for _ in range(2):
            await seen.cell("a_server", "brief").click()
            await expect(seen.cell("a_server", "last_errors")).to_contain_text(MARKUP)
            assert await seen.page.locator("img").count() == 0
            await seen.page.reload()
        assert seen.console == []


async def test_page_loads_everything_from_the_runner(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        await seen.send("x")
        await seen.expect_answer_of("a_server")
        base = str(running.http.base_url).rstrip("/") + "/"
        assert len(seen.requests) > 3
        assert [url for url in seen.requests if not url.startswith(base)] == []


@pytest.mark.message_text
async def test_verdict_on_a_query_gives_the_worker_and_the_duration(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.send("x")
        await expect(seen.verdict).to_have_text(re.compile(r"^a_server answered in [\d.]+ ms\.$"))
        await seen.send("fail")
        await expect(seen.verdict).to_have_text(re.compile(r"^500, a_server after [\d.]+ ms: "))


# Records every text that the page announces to a screen reader, in `announced`.
RECORD_ANNOUNCEMENTS = """() => {
    window.announced = [];
    const region = document.querySelector("#announcements");
    const record = () => announced.push(region.textContent);
    const changes = { childList: true, characterData: true, subtree: true };
    new MutationObserver(record).observe(region, changes);
}"""


async def test_each_restart_is_announced(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        await seen.page.evaluate(RECORD_ANNOUNCEMENTS)
        count = "announced.filter((text) => text.includes('a_server')).length"
        for number in range(2):
            await kill(running, "a_server")
            await expect(seen.cell("a_server", "restarts")).to_have_text(str(number + 1))
            await running.wait_state("a_server", "ready")
            await seen.page.wait_for_function(f"() => {count} > {number}")


# Fills the cells of a worker with large numbers, and returns the texts that do not fit.
FILL_CELLS = """() => {
    const numbers = {
        queries: "1.23 G", errors: "999,999", unserved: "12.3 M", restarts: "999,999",
        rate: "99,999", p50: "9.9 ms", p99: "999 ms", uptime: "365d 23h",
    };
    for (const [field, text] of Object.entries(numbers))
        document.querySelector(`[data-cell=${field}]`).textContent = text;
    const overflows = (cell) => cell.scrollWidth > cell.clientWidth + 1;
    const cells = [...document.querySelectorAll("td")];
    return cells.filter(overflows).map((cell) => cell.textContent);
}"""


async def test_large_numbers_fit_their_cells(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        for width in (1160, 1300, 1440, 1100, 800, 360):
            await seen.page.set_viewport_size({"width": width, "height": 700})
            assert await seen.page.evaluate(FILL_CELLS) == [], f"{width} pixels wide"


async def test_suspended_runner_is_shown_as_gone_until_it_continues(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        # A suspended runner closes no connection, and sends nothing.
        running.process.send_signal(signal.SIGSTOP)
        try:
            await seen.expect_link("gone")
            await expect(seen.page).to_have_title("gone - em-runner")
            await expect(seen.page.locator("body")).to_have_class("stale")
            await expect(seen.summary).not_to_have_text(counted(1, 1))
            await seen.page.set_viewport_size({"width": 600, "height": 200})
            await seen.page.evaluate("scrollTo(0, document.body.scrollHeight)")
            await expect(seen.connection).to_be_in_viewport()
        finally:
            running.process.send_signal(signal.SIGCONT)
        await seen.expect_link("live")
        await expect(seen.page).to_have_title(counted(1, 1))


async def test_open_page_does_not_delay_the_runners_exit(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        assert await running.stop() == 0
        await seen.expect_link("gone")
        await expect(seen.cell("a_server", "state")).to_be_visible()


async def test_page_follows_the_next_runner_at_its_address(
    tmp_path: Path, chromium: Browser, node: Node, reserved_port: int
) -> None:
    http = f"127.0.0.1:{reserved_port}"
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS, http=http) as running:
        await running.wait_ready()
        seen = await open_dashboard(chromium, running)
        await running.stop()
        await seen.expect_link("gone")
    async with cluster(tmp_path, agent("b", [node.url]), handlers=HANDLERS, http=http) as running:
        await running.wait_ready()
        await seen.expect_link("live")
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        assert await seen.cell("a_server", "state").count() == 0


@pytest.mark.message_text
async def test_page_says_since_when_the_runner_is_gone(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        await running.stop()
        since = re.compile(r"The runner is unreachable since \S*20\d\d, \d+:")
        await expect(seen.connection).to_contain_text(since)
        await expect(seen.summary).to_have_text("current state unknown")


WRONG_ANSWERS = {
    "a proxy's error": {"status": 502},
    "another page": {"status": 200, "body": "<p>Log in"},
    "a third version": {"status": 200, "body": "<body data-version=yet-another>"},
}


async def answer_with(page: Page, answer: dict[str, Any]) -> None:
    """Answer requests for the page with `answer`, as a proxy in front of the runner may.

    `answer` may be changed afterwards.
    """

    async def fulfill(route: Route) -> None:
        # A navigation would replace the page by this answer.
        assert route.request.resource_type == "fetch"
        await route.fulfill(**answer)

    await page.route(page.url, fulfill)


PRETEND_NEW_VERSION = "document.body.dataset.version = 'another'"


async def test_page_of_another_version_is_loaded_only_from_the_runner(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        page = seen.page
        await page.evaluate("window.before = true")
        first, *others = WRONG_ANSWERS.values()
        answer = dict(first)
        await answer_with(page, answer)
        await page.evaluate(PRETEND_NEW_VERSION)
        await seen.expect_link("stale")
        await expect(page.locator("body")).to_have_class("stale")
        await expect(seen.announced).to_contain_text("502")
        await page.evaluate(RECORD_ANNOUNCEMENTS)
        for other in others:
            answer.clear()
            answer.update(other)
            for _ in range(2):  # the first one may still have the previous answer
                async with page.expect_response(page.url):
                    pass
        await seen.expect_link("stale")
        assert await page.evaluate("window.before"), "the page has not been replaced"
        assert await page.evaluate("announced") == [], "only the first failure is announced"

        async with page.expect_event("load"):
            await page.unroute(page.url)
        assert await page.evaluate("window.before") is None, "the page has been replaced"
        await seen.expect_link("live")
        assert [message for message in seen.console if "502" not in message] == []


async def test_page_of_another_version_keeps_what_was_typed(
    tmp_path: Path, chromium: Browser, node: Node, other_node: Node
) -> None:
    agents = agent("a", [node.url, other_node.url])
    async with cluster(tmp_path, agents, handlers=HANDLERS) as running:
        await running.wait_state("a_server_2", "ready")
        await running.ask("fail", worker="a_server_2")
        seen = await open_dashboard(chromium, running)
        await seen.query.fill("half a\nquestion")
        await seen.cell("a_server_2", "brief").click()
        await seen.target.select_option("worker/a_server_2")
        await seen.query.focus()
        async with seen.page.expect_event("load"):
            await seen.page.evaluate(PRETEND_NEW_VERSION)
        await seen.expect_link("live")
        await expect(seen.query).to_have_value("half a\nquestion")
        await expect(seen.query).to_be_focused()
        await expect(seen.target).to_have_value("worker/a_server_2")
        await expect(seen.cell("a_server_2", "last_errors")).to_be_visible()
        await seen.page.reload()
        await expect(seen.query).to_have_value("")
        assert seen.console == []


async def test_what_was_typed_stays_while_the_page_cannot_be_loaded(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.query.fill("half a\nquestion")
        await answer_with(seen.page, {"status": 502})
        await seen.page.evaluate(PRETEND_NEW_VERSION)
        await seen.expect_link("stale")
        await expect(seen.query).to_have_value("half a\nquestion")


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("a proxy's error", "the response has status 502"),
        ("another page", "the response is not from em-runner"),
        ("a third version", "the page has another version"),
    ],
)
async def test_page_names_the_reason_why_it_cannot_be_loaded(
    answer: str, text: str, tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await answer_with(seen.page, WRONG_ANSWERS[answer])
        await seen.page.evaluate(PRETEND_NEW_VERSION)
        await expect(seen.connection).to_contain_text(text)


# Returns what the page announces after each state in a sequence of a worker's states and restarts.
ANNOUNCEMENTS = """(sequence) => {
    const states = sequence.map(([state, restarts]) => ({ state, restarts }));
    const announcement = (now, index) =>
        index === 0 ? null : announcementOf("a", states[index - 1], now);
    return states.map(announcement);
}"""


@pytest.mark.parametrize(
    ("sequence", "announcements"),
    [
        (
            [
                ["ready", "0"],
                ["backoff", "0"],
                ["connecting", "0"],
                ["registering", "0"],
                ["backoff", "0"],
            ],
            [None, "a: backoff", None, None, None],
        ),
        (
            [
                ["backoff", "0"],
                ["restarting", "1"],
                ["failed", "1"],
                ["starting", "1"],
                ["ready", "1"],
            ],
            [None, "a: restarted", "a: failed", None, "a: ready"],
        ),
    ],
    ids=["node hangs", "process dies"],
)
async def test_only_important_changes_of_state_are_announced(
    sequence: Any, announcements: Any, tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        assert await seen.page.evaluate(ANNOUNCEMENTS, sequence) == announcements


async def test_worker_that_a_reload_adds_is_shown_and_can_be_queried(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        config = (tmp_path / "em-runner.toml").read_text()
        reload_config(running, config + agent("b", [node.url]))
        await expect(seen.announced).to_contain_text("b_server")
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        await expect(seen.summary).to_have_text(counted(2, 2))
        await seen.target.select_option("worker/b_server")
        await seen.send("x")
        await seen.expect_answer_of("b_server")
        assert seen.console == []


async def test_chosen_worker_is_unavailable_until_a_reload_adds_it_again(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        config = (tmp_path / "em-runner.toml").read_text()

        async def run_also(names: str) -> None:
            added = [agent(name, [node.url]) for name in names]
            reload_config(running, config + "".join(added))
            workers = seen.page.locator("tbody[data-worker]")
            await expect(workers).to_have_count(1 + len(names))
            await expect(seen.cell(f"{names[-1]}_server", "state")).to_have_text("ready")

        await run_also("b")
        await expect(seen.target).to_have_value("agent/a")
        await seen.target.select_option("worker/b_server")
        for names in ("c", "d"):
            await run_also(names)
            await expect(seen.target).to_have_value("")
        await run_also("bd")
        await expect(seen.target).to_have_value("worker/b_server")
        assert seen.console == []


@pytest.mark.message_text
async def test_texts_of_the_list_of_workers_to_ask(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        chosen = "target.selectedOptions[0].textContent"
        assert await seen.page.evaluate(chosen) == "a: the first worker that is up"
        unavailable = await seen.page.evaluate(f"selectTarget('worker/b_server'); {chosen}")
        assert unavailable == "worker b_server was removed: select another"
        await seen.send("x")
        await expect(seen.verdict).to_contain_text("The query was not sent")


PHONE = {"width": 360, "height": 640}


async def test_long_name_of_a_worker_does_not_hide_its_state(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    names = ["an_agent_with_a_very_long_name_of_fifty_characters_", "b"]
    agents = [agent(name, [UNREACHABLE]) for name in names] + [agent("z", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("z_server", "ready")
        seen = await open_dashboard(chromium, running, viewport=PHONE)
        await expect(seen.not_ready).to_be_visible()
        fits = "list => list.scrollWidth <= list.clientWidth"
        assert await seen.not_ready.evaluate(fits)


async def test_growing_header_does_not_cover_the_focused_field(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent(name, [UNREACHABLE]) for name in "abcdefgh"] + [agent("z", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("z_server", "ready")
        seen = await open_dashboard(chromium, running, viewport=PHONE)
        await seen.query.focus()
        height = "document.querySelector('header').offsetHeight"
        top = "field.getBoundingClientRect().top"
        await seen.query.evaluate(f"field => scrollBy(0, {top} - {height} - 1)")
        await seen.page.evaluate("source.close(); markStale('A long message. '.repeat(10), 'gone')")
        visible = f"field => {top} >= {height} - 1"
        await seen.page.wait_for_function(visible, arg=await seen.query.element_handle())


async def test_header_leaves_room_for_the_workers_on_a_low_screen(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent(name, [UNREACHABLE]) for name in "abcdefgh"] + [agent("z", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("z_server", "ready")
        low = {"width": 320, "height": 256}
        seen = await open_dashboard(chromium, running, viewport=low)
        await seen.page.evaluate("source.close(); markStale('A long message. '.repeat(10), 'gone')")
        await seen.page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
        await expect(seen.connection).to_be_in_viewport()
        visible = "() => document.elementFromPoint(160, 100).closest('header') === null"
        await seen.page.wait_for_function(visible)


async def test_change_during_a_reload_of_the_table_is_shown_immediately(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):

        async def restart_meanwhile(route: Route) -> None:
            outdated = await route.fetch()
            await kill(running, "a_server")
            await seen.page.wait_for_function("() => cells.get('a_server').restarts === '1'")
            await running.wait_state("a_server", "ready")
            await route.fulfill(response=outdated)

        await seen.page.route(seen.page.url, restart_meanwhile, times=1)
        config = (tmp_path / "em-runner.toml").read_text()
        reload_config(running, config + agent("b", [node.url]))
        restarts = "rows.get('a_server').querySelector('[data-cell=restarts]').textContent"
        first = await seen.page.wait_for_function(f"() => rows.has('b_server') && {restarts}")
        assert await first.json_value() == "1", "the first table has the restart"
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        assert seen.console == []


async def test_header_links_to_a_worker_that_is_not_ready(
    tmp_path: Path, chromium: Browser, node: Node, reserved_port: int
) -> None:
    async with AsyncExitStack() as life:
        other = await life.enter_async_context(serve(NodeSettings(port=reserved_port)))
        agents = [agent(name, [node.url]) for name in "abcdefgh"] + [agent("z", [other.url])]
        async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
            await running.wait_ready()
            viewport = {"width": 1300, "height": 300}
            seen = await open_dashboard(chromium, running, viewport=viewport)
            await expect(seen.summary).to_have_text(counted(9, 9))
            await expect(seen.not_ready).to_be_hidden()
            await life.aclose()
            await expect(seen.not_ready).to_have_text("z_server backoff")
            await expect(seen.cell("z_server", "state")).not_to_be_in_viewport()
            link = seen.not_ready.get_by_role("link")
            await link.click()
            await expect(seen.cell("z_server", "state")).to_be_in_viewport()
            # The list is also in the served page.
            static = await open_dashboard(chromium, running, java_script_enabled=False)

            async def is_listed() -> bool:
                # At the moment of the request the worker may be connecting.
                await static.page.reload()
                return await static.not_ready.locator("a").inner_text() == "z_server backoff"

            await until(is_listed, "the served page has the list")
            # When the focused link disappears, the focus moves to the worker.
            await link.focus()
            async with serve(NodeSettings(port=reserved_port)):
                await expect(seen.not_ready).to_be_hidden()
                await expect(seen.page.locator("#worker-z_server th")).to_be_focused()
            assert seen.console == []


async def test_header_links_to_the_form(tmp_path: Path, chromium: Browser, node: Node) -> None:
    agents = [agent(name, [node.url]) for name in "abcdefgh"]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_ready()
        viewport = {"width": 1300, "height": 300}
        seen = await open_dashboard(chromium, running, viewport=viewport)
        await expect(seen.query).not_to_be_in_viewport()
        await seen.page.get_by_role("link", name="Send a query").click()
        await expect(seen.query).to_be_in_viewport()


@pytest.mark.parametrize(
    ("viewport", "scroll"),
    [
        ({"width": 1300, "height": 500}, "scrollTo(0, 30)"),
        (PHONE, "scrollTo(0, document.body.scrollHeight / 2)"),
    ],
    ids=["desktop", "phone"],
)
async def test_list_of_workers_not_ready_stays_visible_while_scrolling(
    viewport: Any, scroll: str, tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with AsyncExitStack() as life:
        other = await life.enter_async_context(serve(NodeSettings(port=0)))
        agents = [agent(name, [node.url]) for name in "ab"] + [
            agent(name, [other.url]) for name in "mnopqrstuv"
        ]
        async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
            await running.wait_ready()
            seen = await open_dashboard(chromium, running, viewport=viewport)
            await seen.page.evaluate(scroll)
            await life.aclose()
            links = seen.not_ready.locator("a")
            await expect(links).to_have_count(10)
            assert await seen.page.evaluate("scrollY") > 0
            await expect(links.first).to_be_in_viewport(ratio=1)
            await links.first.click(trial=True)  # fails if something covers the link
            box = "document.querySelector('#not-ready').getBoundingClientRect()"
            height = f"{box}.height / innerHeight"
            assert await seen.page.evaluate(height) < 0.25, "most of the screen is for the table"

            await links.last.click()
            heading = seen.page.locator("#worker-v_server th")
            await expect(heading).to_be_in_viewport(ratio=1)
            below_the_header = """() => {
                const row = document.querySelector("#worker-v_server");
                const header = document.querySelector("header");
                const bottom = header.getBoundingClientRect().bottom;
                return row.getBoundingClientRect().top >= bottom - 1;
            }"""
            assert await seen.page.evaluate(below_the_header)
            assert seen.console == []


WORKER_TOPS = """() => {
    const workers = [...document.querySelectorAll("[data-worker]")];
    return workers.map((worker) => worker.getBoundingClientRect().top);
}"""


async def test_workers_are_cards_side_by_side_on_medium_screens(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("word_counter", [node.url, UNREACHABLE]), agent("b", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("word_counter_server_2", "backoff")
        seen = await open_dashboard(chromium, running)
        for width, beside in ((1160, False), (1100, True), (760, True), (360, False)):
            await seen.page.set_viewport_size({"width": width, "height": 700})
            first, second, _ = await seen.page.evaluate(WORKER_TOPS)
            assert (first == second) is beside, f"{width} pixels wide"
            assert first <= second
            assert await seen.page.evaluate("document.documentElement.scrollWidth") == width
        assert seen.console == []


async def test_list_of_workers_not_ready_is_shown_for_three_workers(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("word_counter", [node.url, UNREACHABLE]), agent("b", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("word_counter_server_2", "backoff")
        seen = await open_dashboard(chromium, running)
        await expect(seen.not_ready).to_have_text("word_counter_server_2 backoff")


async def test_name_of_a_worker_is_on_one_line_of_a_wide_screen(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("word_counter", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        viewport = {"width": 1400, "height": 700}
        seen = await open_dashboard(chromium, running, viewport=viewport)
        one_line = """(name) => {
            const lineHeight = parseFloat(getComputedStyle(name).lineHeight);
            return name.clientHeight < 2 * lineHeight;
        }"""
        assert await seen.page.locator("#worker-word_counter_server th").evaluate(one_line)


async def test_reload_keeps_what_was_typed_chosen_and_open(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", [UNREACHABLE])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("b_server", "backoff")
        seen = await open_dashboard(chromium, running)
        await seen.cell("b_server", "brief").click()
        await seen.target.select_option("worker/a_server")
        await seen.query.fill("half a quest")
        config = (tmp_path / "em-runner.toml").read_text()
        reload_config(running, config + agent("c", [node.url]))
        await expect(seen.cell("c_server", "state")).to_have_text("ready")
        await expect(seen.cell("b_server", "last_errors")).to_be_visible()
        await expect(seen.target).to_have_value("worker/a_server")
        await expect(seen.query).to_have_value("half a quest")
        await expect(seen.query).to_be_focused()


async def test_query_for_a_removed_worker_is_sent_to_no_other(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await open_dashboard(chromium, running)
        await seen.target.select_option("worker/a_server")
        await seen.query.fill("x")
        config = (tmp_path / "em-runner.toml").read_text()
        reload_config(running, config.replace(agent("a", [node.url]), ""))
        await expect(seen.cell("a_server", "state")).to_have_count(0)
        await expect(seen.target).to_have_value("")
        await seen.page.keyboard.press("Enter")
        await expect(seen.target).to_be_focused()
        await expect(seen.verdict).not_to_be_empty()
        assert not [url for url in seen.requests if url.endswith("/query")]


async def test_page_beyond_the_limit_of_streams_waits_for_a_free_one(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        async with AsyncExitStack() as others:
            for _ in range(MAX_STREAMS):
                await others.enter_async_context(running.http.stream("GET", "/events"))
            seen = Dashboard(await (await chromium.new_context()).new_page())
            await seen.page.goto(str(running.http.base_url))
            await seen.expect_link("full")
        await seen.expect_link("live")
        await expect(seen.page.locator("body")).not_to_have_class("stale")


@pytest.mark.message_text
async def test_page_without_a_stream_says_that_the_runner_is_up(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (_, seen):
        await seen.page.evaluate("failedStreams = 2; source.onerror()")
        await expect(seen.connection).to_contain_text("The runner is up")


HIDE = "Object.defineProperty(document, 'hidden', { get: () => %s, configurable: true });"


async def test_hidden_page_keeps_no_connection(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with one_agent(tmp_path, chromium, node) as (running, seen):
        async with seen.page.expect_event(
            "requestfailed", lambda request: request.url.endswith("/events")
        ):
            await seen.page.evaluate(HIDE % "true")
        assert await running.stop() == 0
        await seen.expect_link("live")

        # When the page is visible again, it is not live before the runner has sent an event.
        show = HIDE % "false" + "document.dispatchEvent(new Event('visibilitychange'));"
        state = "document.querySelector('#connection').dataset.connection"
        after_a_minute = f"lastEventAt -= 60000; {show} {state} ?? 'connecting'"
        assert await seen.page.evaluate(after_a_minute) == "connecting"
        await seen.expect_link("gone")


async def test_page_is_a_plain_table_without_scripts(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", [UNREACHABLE], **STAYS_IN_BACKOFF)]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        seen = await open_dashboard(chromium, running, java_script_enabled=False)
        await expect(seen.summary).to_have_text(counted(1, 2))
        await expect(seen.not_ready).to_be_hidden()  # two workers are visible at once
        await expect(seen.connection).to_be_visible()
        await expect(seen.cell("b_server", "reason")).to_contain_text("Connection refused")
        await expect(seen.page.locator("#query-section")).to_be_hidden()
        rows = seen.page.get_by_role("row")
        assert await rows.count() == 6, "a heading, two agents, two workers and an error"
        cells = rows.filter(has_text="a_server").get_by_role("cell")
        await expect(cells.nth(1)).to_have_text(node.url)


@pytest.mark.message_text
async def test_page_without_scripts_says_that_it_must_be_reloaded(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        seen = await open_dashboard(chromium, running, java_script_enabled=False)
        await expect(seen.connection).to_contain_text("Reload it to update it")


@pytest.mark.parametrize(
    "screen",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 740}, "is_mobile": True},
        {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "color_scheme": "dark"},
    ],
    ids=("light", "dark", "phone", "dark phone"),
)
async def test_page_is_accessible_and_needs_no_sideways_scrolling(
    screen: dict[str, Any], tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", [UNREACHABLE])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        await running.ask("fail", agent="a")
        seen = await open_dashboard(chromium, running, bypass_csp=True, **screen)
        await seen.send("x")
        await expect(seen.result).to_be_visible()
        await seen.cell("a_server", "brief").click()
        live = await Axe().run(seen.page)
        assert live.violations_count == 0, live.generate_report()
        root = "document.documentElement"
        wide = f"{root}.scrollWidth > {root}.clientWidth"
        assert not await seen.page.evaluate(wide)
        assert await running.stop() == 0
        await seen.expect_link("gone")
        gone = await Axe().run(seen.page)
        assert gone.violations_count == 0, gone.generate_report()


async def test_browser_can_send_the_token_as_the_password(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    secret = tmp_path / "token"
    secret.write_text("let-me-in")
    secret.chmod(0o600)
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, runner='http_token_file = "token"'
    ) as running:
        page = await running.http.get("/")
        assert page.status_code == 401
        assert page.headers["www-authenticate"].startswith("Basic ")
        workers = await running.http.get("/workers")
        assert workers.headers["www-authenticate"] == "Bearer"
        running.http.headers["authorization"] = "Bearer let-me-in"
        await running.wait_ready()
        credentials = {"username": "", "password": "let-me-in"}
        seen = await open_dashboard(chromium, running, http_credentials=credentials)
        await seen.send("x")
        await seen.expect_answer_of("a_server")
