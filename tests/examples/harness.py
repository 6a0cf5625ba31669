"""Loads an example as a worker does, and gives it queries through a dispatcher."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from shared.config.handlers import parse_handler
from shared.config.schema import MemoryKind
from shared.ipc import Outcome
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.handler import load
from worker.dispatching.jobs import Answer, Job
from worker.dispatching.results import encode_result
from worker.memory.choose import create_memory

ROOT = Path(__file__).parents[2]


class Page(msgspec.Struct, frozen=True):
    """The response for a path of the site. If `hangs`, the site sends nothing during the test."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/html; charset=utf-8"
    hangs: bool = False
    location: str = ""


class Site:
    """A web site.

    Attributes:
        pages: the responses by path.
        requested: the paths that were requested, with their queries.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.pages: dict[str, Page] = {}
        self.requested: list[str] = []


class Collector:
    """A `worker.dispatching.dispatch.Source` that sets each job's answer as a future's result."""

    def encode(self, result: Any) -> bytes:
        return encode_result(result)

    def answer(self, job: Job, answer: Answer) -> None:
        job.ticket.set_result(answer)

    def send_answers(self) -> None:
        pass


async def ask_example(reference: str, *queries: str, memory: MemoryKind = "ram") -> list[Any]:
    """Set up an example, give it the queries, close it, and return the decoded results.

    Args:
        reference: the handler, as in the configuration.
        queries: are given to the handler at once.
        memory: the kind of the worker's memory.
    """
    handler = load(parse_handler(reference, ROOT))
    dispatcher = create_dispatcher(handler, create_memory(memory, "w", Path("/nowhere")))
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
