"""The status page in a real browser, against a real runner."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, Route, expect

from disco import Node, NodeSettings, serve
from runner.dashboard.routes import MAX_STREAMS
from tests import browser
from tests.cluster import Cluster, agent, cluster

pytestmark = pytest.mark.anyio

HANDLERS = """
def handle(body, memory):
    count = memory.get("count", 0) + 1
    if body == "fail":
        raise ValueError("<img src=x onerror='document.title=1'>\\n second line")
    value = 2 ** 53 + 1 if body == "large" else body
    return {"type": "count", "properties": {"count": count, "body": value}}, {"count": count}
"""


@pytest.fixture
async def chromium(anyio_backend: object) -> AsyncIterator[Browser]:
    if browser.program() is None:
        pytest.skip("no Chromium here: install your distribution's package to run this")
    async with browser.chromium() as running:
        yield running


class Seen:
    """A page, and what it did that it should not."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda line: self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def cell(self, worker: str, field: str) -> Any:
        return self.page.locator(f"[data-worker={worker}] [data-cell={field}]")


async def look(chromium: Browser, running: Cluster, **options: Any) -> Seen:
    context = await chromium.new_context(**options)
    context.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    seen = Seen(await context.new_page())
    await seen.page.goto(str(running.http.base_url))
    if options.get("java_script_enabled", True):
        await expect(seen.page.locator("#link")).to_have_text("live")
    return seen


async def test_states_change_on_the_page(tmp_path: Path, chromium: Browser, held_port: int) -> None:
    async with serve(NodeSettings(port=0)) as other:
        async with AsyncExitStack() as first_life:
            node = await first_life.enter_async_context(serve(NodeSettings(port=held_port)))
            agents = [agent("a", [node.url]), agent("b", [other.url])]
            async with cluster(tmp_path, *agents, handlers=HANDLERS, supervision="max_restarts = 1") as running:
                await running.wait_ready()
                seen = await look(chromium, running)
                page = seen.page
                await expect(page.locator("#summary")).to_have_text("2 of 2 workers ready")
                await expect(page).to_have_title("2 of 2 workers ready - em-runner")

                # A worker is killed, and is back; and killed once too often.
                first = await running.worker_pid("b_server")
                os.kill(first, signal.SIGKILL)
                await expect(seen.cell("b_server", "restarts")).to_have_text("1")
                await running.wait_state("b_server", "ready")
                await expect(seen.cell("b_server", "state")).to_have_text("ready")
                os.kill(await running.worker_pid("b_server"), signal.SIGKILL)
                await expect(seen.cell("b_server", "state")).to_have_text("failed")
                await expect(seen.cell("b_server", "detail")).to_contain_text("SIGKILL")
                await expect(seen.cell("b_server", "detail")).to_contain_text("; it is tried again within a minute")
                await expect(page.locator("#summary")).to_have_text("1 of 2 workers ready")
                await expect(page.locator("#news")).to_contain_text("b_server: failed")
                full = seen.cell("b_server", "last_error")
                await expect(full).not_to_be_visible()
                await seen.cell("b_server", "brief").click()
                await expect(full).to_be_visible()
                await expect(full).to_contain_text("process, 20")
                await expect(full).to_contain_text("killed by SIGKILL")
                assert (await running.ask("x", worker="b_server")).status_code == 503
                await expect(seen.cell("b_server", "unanswered")).to_have_text("1")

                # A node goes away, and comes back. What the handler had done is still said.
                await running.ask("fail", agent="a")
                await first_life.aclose()
                await expect(seen.cell("a_server", "state")).to_have_text("backoff")
                await expect(seen.cell("a_server", "brief")).to_contain_text("connection, ")
                await expect(seen.cell("a_server", "brief")).to_contain_text("s ago: ValueError: <img")
                await expect(page.locator("#summary")).to_have_text("0 of 2 workers ready")
                async with serve(NodeSettings(port=held_port)):
                    await expect(seen.cell("a_server", "state")).to_have_text("ready")
                    await expect(page.locator("#summary")).to_have_text("1 of 2 workers ready")
                assert seen.complaints == []


async def test_query_is_typed_and_answered(tmp_path: Path, chromium: Browser, node: Node, other_node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url, other_node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        await running.wait_state("a_server_2", "ready")
        seen = await look(chromium, running)
        verdict, result = seen.page.locator("#verdict"), seen.page.locator("#result")

        # By keyboard alone.
        await seen.page.get_by_label("Query", exact=True).focus()
        await seen.page.keyboard.type("red <fish>")
        await seen.page.keyboard.press("Enter")
        await expect(verdict).to_contain_text("a_server answered in ")
        await expect(verdict).to_contain_text(" ms")
        shown = json.loads(await result.inner_text())
        assert shown == {"type": "count", "properties": {"count": 1, "body": "red <fish>"}}
        await expect(seen.page.get_by_label("Query", exact=True)).to_be_focused()

        await seen.page.get_by_label("Whom").select_option("a_server_2")
        await seen.page.get_by_label("Whom").focus()
        await seen.page.keyboard.press("Tab")
        await seen.page.keyboard.press("Enter")
        await expect(verdict).to_contain_text("a_server_2 answered in ")
        await expect(seen.page.get_by_role("button", name="Ask")).to_be_focused()

        # Several lines are one query.
        await seen.page.get_by_label("Query", exact=True).fill("one")
        await seen.page.keyboard.press("Shift+Enter")
        await seen.page.keyboard.type("two")
        await seen.page.keyboard.press("Enter")
        await expect(result).to_contain_text('"body": "one\\ntwo"')

        await seen.page.get_by_label("Query", exact=True).fill("large")
        await seen.page.keyboard.press("Enter")
        await expect(result).to_contain_text(str(2**53 + 1))

        await seen.page.get_by_label("Query", exact=True).fill("fail")
        await seen.page.keyboard.press("Enter")
        await expect(verdict).to_contain_text("500, a_server_2 after ")
        await expect(verdict).to_contain_text("handler_failed")
        await expect(result).to_be_hidden()

        await expect(seen.cell("a_server_2", "errors")).to_have_text("1")
        await expect(seen.cell("a_server_2", "queries")).to_have_text("4")
        await expect(seen.cell("a_server_2", "p99")).to_contain_text("s")
        await expect(seen.cell("a_server_2", "rate")).not_to_have_text("0")
        # What a handler says is text, here and when the page is served anew.
        for _ in range(2):
            await seen.cell("a_server_2", "brief").click()
            await expect(seen.cell("a_server_2", "last_error")).to_contain_text(
                "<img src=x onerror='document.title=1'>"
            )
            assert await seen.page.locator("img").count() == 0
            await seen.page.reload()
        base = str(running.http.base_url).rstrip("/")
        assert [url for url in seen.asked if not url.startswith(base + "/")] == [], "nothing comes from elsewhere"
        assert [line for line in seen.complaints if "500" not in line] == []


async def test_each_death_is_news_and_numbers_of_months_fit(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running, viewport={"width": 1300, "height": 700})
        watch = """() => { window.said = []; new MutationObserver(() => said.push(news.textContent)).observe(
            news, { childList: true, characterData: true, subtree: true }); }"""
        await seen.page.evaluate(watch)
        for number in range(2):
            os.kill(await running.worker_pid("a_server"), signal.SIGKILL)
            await expect(seen.cell("a_server", "restarts")).to_have_text(str(number + 1))
            await running.wait_state("a_server", "ready")
            said = "said.filter((words) => words.includes('a_server')).length"
            await seen.page.wait_for_function(f"() => {said} > {number}")

        large = """() => { for (const [name, text] of Object.entries({
            queries: "1.23 G", errors: "999,999", unanswered: "12.3 M", restarts: "999,999", rate: "99,999",
            p50: "9.9 ms", p99: "999 ms", uptime: "365d 23h" })) document.querySelector(`[data-cell=${name}]`)
            .textContent = text; return [...document.querySelectorAll("td")].filter(
            (cell) => cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent); }"""
        for width in (1160, 1300, 1440, 1100, 800, 360):
            await seen.page.set_viewport_size({"width": width, "height": 700})
            assert await seen.page.evaluate(large) == [], f"nothing runs into another at {width}"


async def test_runner_that_is_gone_is_shown_as_gone(
    tmp_path: Path, chromium: Browser, node: Node, held_port: int
) -> None:
    http = f"127.0.0.1:{held_port}"
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS, http=http) as running:
        await running.wait_ready()
        seen = await look(chromium, running)
        link = seen.page.locator("#link")

        # It hangs: nothing is closed, nothing comes.
        running.process.send_signal(signal.SIGSTOP)
        try:
            await expect(link).to_contain_text(re.compile(r"The runner is gone: .* since \S*20\d\d, \d+:"))
            await expect(seen.page).to_have_title("gone - em-runner")
            await expect(seen.page.locator("body")).to_have_class("gone")
            await expect(seen.page.locator("#summary")).to_have_text("unknown how it stands")
            await seen.page.set_viewport_size({"width": 600, "height": 200})
            await seen.page.evaluate("scrollTo(0, document.body.scrollHeight)")
            await expect(link).to_be_in_viewport()
        finally:
            running.process.send_signal(signal.SIGCONT)
        await expect(link).to_have_text("live")
        await expect(seen.page).to_have_title("1 of 1 worker ready - em-runner")

        assert await running.stop() == 0, "an open page keeps no runner from its end"
        await expect(link).to_contain_text("The runner is gone")
        await expect(seen.cell("a_server", "state")).to_be_visible()
    async with cluster(tmp_path, agent("b", [node.url]), handlers=HANDLERS, http=http) as running:
        await running.wait_ready()
        await expect(link).to_have_text("live")
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        assert await seen.cell("a_server", "state").count() == 0, "it is another runner"


async def test_page_of_another_version_is_loaded_with_what_was_typed(
    tmp_path: Path, chromium: Browser, node: Node, other_node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url, other_node.url]), handlers=HANDLERS) as running:
        await running.wait_state("a_server_2", "ready")
        await running.ask("fail", worker="a_server_2")
        seen = await look(chromium, running)
        page, link = seen.page, seen.page.locator("#link")
        query = page.get_by_label("Query", exact=True)
        await query.fill("half a\nquestion")
        await seen.cell("a_server_2", "brief").click()
        await page.get_by_label("Whom").select_option("worker/a_server_2")
        await query.focus()
        await page.evaluate("window.before = true")

        # A proxy stands before a runner that is not up yet, or before two.
        answers: list[Any] = [{"status": 502}, {"status": 200, "body": "<p>Log in"}]
        answers.append({"status": 200, "body": "<body data-version=yet-another>"})

        async def from_the_proxy(route: Route) -> None:
            assert route.request.resource_type == "fetch", "the page is not loaded before it is there"
            await route.fulfill(**answers[0])

        await page.route(page.url, from_the_proxy)
        await page.evaluate("document.body.dataset.version = 'another'")
        await expect(link).to_contain_text("the page is answered 502")
        await expect(page.locator("body")).to_have_class("gone")
        await expect(page.locator("#news")).to_contain_text("502")
        await page.evaluate(
            "window.said = []; new MutationObserver(() => said.push(news.textContent)).observe(news, {childList: true})"
        )
        del answers[0]
        await expect(link).to_contain_text("something else answers in its place")
        del answers[0]
        await expect(link).to_contain_text("it is still the page of another version")
        for _ in range(2):
            async with page.expect_response(page.url):
                pass
        assert await page.evaluate("[window.before, window.said]") == [True, []], "it is said once"
        await expect(query).to_have_value("half a\nquestion")

        async with page.expect_event("load"):
            await page.unroute(page.url)
        assert await page.evaluate("window.before") is None, "it is another page"
        await expect(link).to_have_text("live")
        await expect(query).to_have_value("half a\nquestion")
        await expect(query).to_be_focused()
        await expect(page.get_by_label("Whom")).to_have_value("worker/a_server_2")
        await expect(seen.cell("a_server_2", "last_error")).to_be_visible()
        await page.reload()
        await expect(query).to_have_value("")
        assert [line for line in seen.complaints if "502" not in line] == []


async def test_what_a_node_that_hangs_does_to_its_workers_is_not_read_out_each_time(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running)
        told = """(states) => states.map(([state, restarts]) => ({ state, restarts })).map((now, index, all) =>
            index === 0 ? null : change("a", all[index - 1], now))"""
        flaps = [["ready", "0"], ["backoff", "0"], ["connecting", "0"], ["registering", "0"], ["backoff", "0"]]
        assert await seen.page.evaluate(told, flaps) == [None, "a: backoff", None, None, None]
        deaths = [["backoff", "0"], ["restarting", "1"], ["failed", "1"], ["starting", "1"], ["ready", "1"]]
        assert await seen.page.evaluate(told, deaths) == [None, "a: restarted", "a: failed", None, "a: ready"]


async def test_workers_that_come_and_go_at_a_reload_do_so_on_the_page(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running)
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text() + agent("b", [node.url]))
        os.kill(running.process.pid, signal.SIGHUP)
        await expect(seen.page.locator("#news")).to_contain_text("b_server")
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        await expect(seen.page.locator("#summary")).to_have_text("2 of 2 workers ready")
        await seen.page.get_by_label("Whom").select_option("worker/b_server")
        await seen.page.get_by_label("Query", exact=True).fill("x")
        await seen.page.keyboard.press("Enter")
        await expect(seen.page.locator("#verdict")).to_contain_text("b_server answered in ")
        assert seen.complaints == []


async def test_whom_one_had_chosen_is_said_to_be_gone_until_there_again(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running)
        config, whom = tmp_path / "em-runner.toml", seen.page.get_by_label("Whom")
        without = config.read_text()
        shown = "() => document.querySelector('#target').selectedOptions[0]?.textContent"
        for names, expected in (
            ("b", "a: the first that is up"),
            ("c", "worker b_server is gone: choose anew"),
            ("d", "worker b_server is gone: choose anew"),
            ("bd", "b_server"),
        ):
            config.write_text(without + "".join(agent(name, [node.url]) for name in names))
            os.kill(running.process.pid, signal.SIGHUP)
            await expect(seen.page.locator("tbody[data-worker]")).to_have_count(1 + len(names))
            await expect(seen.cell(f"{names[-1]}_server", "state")).to_have_text("ready")
            assert await seen.page.evaluate(shown) == expected
            if names == "b":
                await whom.select_option("worker/b_server")
        assert await whom.input_value() == "worker/b_server"
        assert seen.complaints == []


async def test_what_grows_above_it_covers_no_field_and_no_low_screen(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    names = [*"abcdefgh", "an_agent_with_a_very_long_name_of_fifty_characters_"]
    agents = [agent(name, ["127.0.0.1:9"]) for name in names] + [agent("z", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("z_server", "ready")
        seen = await look(chromium, running, viewport={"width": 360, "height": 640})
        wide = (
            "() => document.querySelector('#troubled').scrollWidth <= document.querySelector('#troubled').clientWidth"
        )
        assert await seen.page.evaluate(wide), "no name hides its state"
        query = seen.page.get_by_label("Query", exact=True)
        await query.focus()
        height = "document.querySelector('header').offsetHeight"
        await query.evaluate(f"field => scrollBy(0, field.getBoundingClientRect().top - {height} - 1)")
        await seen.page.evaluate(
            "source.close(); lost('It is said at some length what is wrong: the header grows. '.repeat(3))"
        )
        clear = f"field => field.getBoundingClientRect().top >= {height} - 1"
        for _ in range(50):
            if await query.evaluate(clear):
                break
            await seen.page.evaluate("() => new Promise(requestAnimationFrame)")
        assert await query.evaluate(clear)
        await seen.page.set_viewport_size({"width": 320, "height": 256})
        await seen.page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
        await expect(seen.page.locator("#link")).to_be_in_viewport()
        covered = "document.elementFromPoint(160, 100).closest('header') === null"
        assert await seen.page.evaluate(covered), "there is room for the workers"


async def test_what_happens_while_the_page_is_asked_for_anew_is_shown(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running)

        async def late(route: Route) -> None:
            answer = await route.fetch()
            os.kill(await running.worker_pid("a_server"), signal.SIGKILL)
            await seen.page.wait_for_function("() => known.get('a_server').restarts === '1'")
            await running.wait_state("a_server", "ready")
            await route.fulfill(response=answer)

        await seen.page.route(seen.page.url, late, times=1)
        config = tmp_path / "em-runner.toml"
        config.write_text(config.read_text() + agent("b", [node.url]))
        os.kill(running.process.pid, signal.SIGHUP)
        restarts = "rows.get('a_server').querySelector('[data-cell=restarts]').textContent"
        at_once = await seen.page.wait_for_function(f"() => rows.has('b_server') && {restarts}")
        assert await at_once.json_value() == "1", "not only when something of it changes again"
        await expect(seen.cell("b_server", "state")).to_have_text("ready")
        assert seen.complaints == []


async def test_trouble_among_many_is_seen_and_reached_from_the_top(
    tmp_path: Path, chromium: Browser, node: Node, held_port: int
) -> None:
    async with AsyncExitStack() as life:
        other = await life.enter_async_context(serve(NodeSettings(port=held_port)))
        agents = [agent(name, [node.url]) for name in "abcdefgh"] + [agent("z", [other.url])]
        async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
            await running.wait_ready()
            seen = await look(chromium, running, viewport={"width": 1300, "height": 300})
            await expect(seen.page.locator("#summary")).to_have_text("9 of 9 workers ready")
            troubled = seen.page.get_by_role("navigation", name="Workers that are not ready")
            await expect(troubled).to_be_hidden()
            await life.aclose()
            await expect(troubled).to_have_text("z_server backoff")
            await expect(seen.cell("z_server", "state")).not_to_be_in_viewport()
            await troubled.get_by_role("link").click()
            await expect(seen.cell("z_server", "state")).to_be_in_viewport()
            # And whoever opens the page now sees the same, without a script too.
            still = await look(chromium, running, java_script_enabled=False)
            await expect(still.page.locator("#troubled a")).to_have_text("z_server backoff")
            await troubled.get_by_role("link").focus()
            async with serve(NodeSettings(port=held_port)):
                await expect(troubled).to_be_hidden()
                await expect(seen.page.locator("#worker-z_server th")).to_be_focused()
            await seen.page.evaluate("scrollTo(0, 0)")
            await seen.page.get_by_role("link", name="Ask").click()
            await expect(seen.page.get_by_label("Query", exact=True)).to_be_in_viewport()
            assert seen.complaints == []


async def test_list_of_those_not_ready_is_in_view_however_far_one_has_scrolled(
    tmp_path: Path, chromium: Browser, node: Node, held_port: int
) -> None:
    async with AsyncExitStack() as life:
        other = await life.enter_async_context(serve(NodeSettings(port=held_port)))
        agents = [agent(name, [node.url]) for name in "ab"] + [agent(name, [other.url]) for name in "mnopqrstuv"]
        async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
            await running.wait_ready()
            seen = await look(chromium, running, viewport={"width": 1300, "height": 500})
            await seen.page.evaluate("scrollTo(0, 30)")
            phone = await look(chromium, running, viewport={"width": 360, "height": 640})
            await phone.page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
            await life.aclose()
            for page in (seen.page, phone.page):
                links = page.locator("#troubled a")
                await expect(links).to_have_count(10)
                assert await page.evaluate("scrollY") > 0
                await expect(links.first).to_be_in_viewport(ratio=1)
                await links.first.click(trial=True)  # nothing lies above it
                room = "troubled.getBoundingClientRect().height / innerHeight"
                assert await page.evaluate(room) < 0.25, "it leaves the screen to the workers, and can be scrolled"
                await links.last.click()
                await expect(page.locator("#worker-v_server th")).to_be_in_viewport(ratio=1)
                clear = """() => document.querySelector("#worker-v_server").getBoundingClientRect().top
                    >= document.querySelector("header").getBoundingClientRect().bottom - 1"""
                assert await page.evaluate(clear), "what was gone to is not below the header"
            assert seen.complaints == phone.complaints == []


async def test_cards_stand_side_by_side_and_those_not_ready_are_listed_beside_few_too(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    down = ["127.0.0.1:9"]
    agents = [agent("word_counter", [node.url, *down]), agent("b", [node.url])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("word_counter_server_2", "backoff")
        seen = await look(chromium, running, viewport={"width": 1160, "height": 700})
        troubled = seen.page.locator("#troubled")
        await expect(troubled).to_have_text("word_counter_server_2 backoff")
        tops = "[...document.querySelectorAll('[data-worker]')].map((row) => row.getBoundingClientRect().top)"
        first, second, _ = await seen.page.evaluate(tops)
        assert first < second, "a table"
        for width, beside in ((1100, True), (760, True), (360, False)):
            await seen.page.set_viewport_size({"width": width, "height": 700})
            first, second, _ = await seen.page.evaluate(tops)
            assert (first == second) is beside, f"cards, at {width}"
            assert await seen.page.evaluate("document.documentElement.scrollWidth") == width
        await seen.page.set_viewport_size({"width": 1400, "height": 700})
        name = "document.querySelector('#worker-word_counter_server th')"
        lines = f"{name}.clientHeight < 2 * parseFloat(getComputedStyle({name}).lineHeight)"
        assert await seen.page.evaluate(lines), "its name is not cut in two"
        assert seen.complaints == []


async def test_choice_and_open_errors_outlive_a_reload_and_no_question_goes_to_another(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), agent("b", ["127.0.0.1:9"]), handlers=HANDLERS) as running:
        await running.wait_state("b_server", "backoff")
        seen = await look(chromium, running)
        page, config = seen.page, tmp_path / "em-runner.toml"
        await seen.cell("b_server", "brief").click()
        await page.get_by_label("Whom").select_option("worker/a_server")
        await page.get_by_label("Query", exact=True).fill("half a quest")
        config.write_text(config.read_text() + agent("c", [node.url]))
        os.kill(running.process.pid, signal.SIGHUP)
        await expect(seen.cell("c_server", "state")).to_have_text("ready")
        await expect(seen.cell("b_server", "last_error")).to_be_visible()
        await expect(page.get_by_label("Whom")).to_have_value("worker/a_server")
        await expect(page.get_by_label("Query", exact=True)).to_have_value("half a quest")
        await expect(page.get_by_label("Query", exact=True)).to_be_focused()

        config.write_text(config.read_text().replace(agent("a", [node.url]), ""))
        os.kill(running.process.pid, signal.SIGHUP)
        await expect(seen.cell("a_server", "state")).to_have_count(0)
        await expect(page.get_by_label("Whom")).to_have_value("")
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Whom")).to_be_focused()
        await expect(page.locator("#verdict")).to_contain_text("Nobody was asked")
        assert not [url for url in seen.asked if url.endswith("/query")]


async def test_page_that_gets_no_stream_says_that_the_runner_is_up(
    tmp_path: Path, chromium: Browser, node: Node
) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        async with AsyncExitStack() as others:
            for _ in range(MAX_STREAMS):
                await others.enter_async_context(running.http.stream("GET", "/events"))
            page = await (await chromium.new_context()).new_page()
            await page.goto(str(running.http.base_url))
            await expect(page.locator("#link")).to_contain_text("The runner is up", timeout=20_000)
        await expect(page.locator("#link")).to_have_text("live", timeout=20_000)
        await expect(page.locator("body")).not_to_have_class("gone")


async def test_page_that_nobody_sees_keeps_no_connection(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), handlers=HANDLERS) as running:
        await running.wait_ready()
        seen = await look(chromium, running)
        hide = "Object.defineProperty(document, 'hidden', { get: () => %s, configurable: true });"
        async with seen.page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
            await seen.page.evaluate(hide % "true")
        assert await running.stop() == 0
        await expect(seen.page.locator("#link")).to_have_text("live")
        tell = "document.dispatchEvent(new Event('visibilitychange'))"
        # Whoever looks again is not told that what is shown is live before it is.
        at_once = "heardAt -= 60000;" + tell + "; document.querySelector('#link').textContent"
        assert await seen.page.evaluate(hide % "false" + at_once) == "connecting"
        await expect(seen.page.locator("#link")).to_contain_text("The runner is gone")


async def test_page_is_a_plain_table_without_a_script(tmp_path: Path, chromium: Browser, node: Node) -> None:
    async with cluster(tmp_path, agent("a", [node.url]), agent("b", ["127.0.0.1:9"]), handlers=HANDLERS) as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        seen = await look(chromium, running, java_script_enabled=False)
        await expect(seen.page.locator("#summary")).to_have_text("1 of 2 workers ready")
        await expect(seen.page.locator("#troubled")).to_be_hidden()  # two are seen at a glance
        await expect(seen.page.get_by_text("reload it to look again")).to_be_visible()
        await expect(seen.cell("b_server", "detail")).to_contain_text("Connection refused")
        await expect(seen.page.locator("#ask")).to_be_hidden()
        rows = seen.page.get_by_role("row")
        assert await rows.count() == 6, "a heading, two agents, two workers, an error"
        await expect(rows.filter(has_text="a_server").get_by_role("cell").nth(1)).to_have_text(node.url)


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
async def test_page_can_be_used_by_everybody(
    screen: dict[str, Any], tmp_path: Path, chromium: Browser, node: Node
) -> None:
    agents = [agent("a", [node.url]), agent("b", ["127.0.0.1:9"])]
    async with cluster(tmp_path, *agents, handlers=HANDLERS) as running:
        await running.wait_state("a_server", "ready")
        await running.wait_state("b_server", "backoff")
        await running.ask("fail", agent="a")
        seen = await look(chromium, running, bypass_csp=True, **screen)
        page = seen.page
        await page.get_by_label("Query", exact=True).fill("x")
        await page.keyboard.press("Enter")
        await expect(page.locator("#result")).to_be_visible()
        await seen.cell("a_server", "brief").click()
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not await page.evaluate(wide), "nothing has to be scrolled sideways"
        assert await running.stop() == 0
        await expect(page.locator("body")).to_have_class("gone")
        found = await Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


async def test_token_is_the_password(tmp_path: Path, chromium: Browser, node: Node) -> None:
    secret = tmp_path / "token"
    secret.write_text("let-me-in")
    secret.chmod(0o600)
    async with cluster(
        tmp_path, agent("a", [node.url]), handlers=HANDLERS, runner='http_token_file = "token"'
    ) as running:
        refused = await running.http.get("/")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        assert (await running.http.get("/workers")).headers["www-authenticate"] == "Bearer"
        running.http.headers["authorization"] = "Bearer let-me-in"
        await running.wait_ready()
        seen = await look(chromium, running, http_credentials={"username": "", "password": "let-me-in"})
        await seen.page.get_by_label("Query", exact=True).fill("x")
        await seen.page.keyboard.press("Enter")
        await expect(seen.page.locator("#verdict")).to_contain_text("a_server answered in ")
