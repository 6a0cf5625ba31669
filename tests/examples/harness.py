"""Loads an example as a worker does, and puts queries to it through a dispatcher."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from shared.handlers import parse_handler
from shared.ipc import Counters, Outcome
from shared.schema import MemoryKind
from worker.dispatchers import dispatcher_for
from worker.handler import load
from worker.jobs import Answer, Job
from worker.memories import memory_for
from worker.results import encode_result

ROOT = Path(__file__).parents[2]


class Page(msgspec.Struct, frozen=True):
    """What a path of the site answers with; `hangs` answers nothing as long as the test lasts."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/html; charset=utf-8"
    hangs: bool = False
    location: str = ""


class Site:
    """A web site: what it has, and the paths that were asked for."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: dict[str, Page] = {}
        self.asked: list[str] = []


class Collector:
    """A `worker.dispatch.Source` that keeps the answers as futures."""

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        job.ticket.set_result(answer)

    def flush(self) -> None:
        pass


async def ask_example(reference: str, *queries: str, memory: MemoryKind = "ram") -> list[Any]:
    """Run one worker's worth of an example: load, set up, ask, close. Return the decoded results."""
    handler = load(parse_handler(reference, ROOT))
    dispatcher = dispatcher_for(handler, memory_for(memory, "w", Path("/nowhere")), Counters())
    loop = asyncio.get_running_loop()
    async with dispatcher.running():
        await dispatcher.set_up()
        jobs = [Job(Collector(), loop.create_future(), query) for query in queries]
        dispatcher.submit(jobs)
        answers: list[Answer] = await asyncio.gather(*(job.ticket for job in jobs))
        await dispatcher.tear_down()
    for outcome, payload in answers:
        assert outcome is Outcome.OK, payload
    return [msgspec.json.decode(payload) for _, payload in answers]
