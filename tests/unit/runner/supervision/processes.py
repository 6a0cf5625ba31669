"""Fakes for the supervisor's unit tests: a process, the fork server and the router."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from runner.supervision._incarnation import Incarnation
from runner.supervision.restarts import Failure
from shared.config.load import Agent, HandlerRef, WorkerSpec
from shared.config.nodes import parse_node
from shared.ipc import Launch, Outcome

AGENT = Agent(
    name="a",
    handler=HandlerRef("worker.echo", None, "handle", Path("/")),
    nodes=(parse_node("h"),),
)
SPEC = WorkerSpec(name="a_server", agent=AGENT, node=AGENT.nodes[0])


class Process:
    """A process that ends when it is killed. Its status arrives once `reported` is set."""

    pid = 1

    def __init__(self) -> None:
        self.ended = anyio.Event()
        self.awaited = anyio.Event()
        self.reported = anyio.Event()
        self.reported.set()
        self.released = False

    def kill(self) -> None:
        self.ended.set()

    async def exit_failure(self) -> Failure:
        self.awaited.set()
        await self.reported.wait()
        return Failure.from_exit(-signal.SIGKILL)

    def release(self) -> None:
        self.released = True


class ForkServer:
    def __init__(self) -> None:
        self.forked: list[Process] = []

    async def spawn(self, launch: Launch) -> Process:
        self.forked.append(Process())
        return self.forked[-1]


class Router:
    """A router whose worker sends while `alive`. It counts how often its messages are read."""

    endpoint = ""

    def __init__(self) -> None:
        self.heard_s = time.monotonic()
        self.reads = 0
        self.resets = 0
        self.alive = False

    def receive(self) -> None:
        self.reads += 1
        if self.alive:
            self.heard_s = time.monotonic()

    def silent_for_s(self, launch: Launch) -> float:
        return time.monotonic() - self.heard_s

    def restart_silence(self, launch: Launch) -> None:
        self.resets += 1
        self.heard_s = time.monotonic()

    def expect(self, launch: Launch, on_report: Any) -> None:
        self.on_report = on_report

    def drop(self, launch: Launch, reason: str) -> None:
        pass

    def drain(self, launch: Launch, *, hand_over: bool) -> bool:
        return False

    def refuse_held(self, name: str) -> None:
        pass

    def outcomes_of(self, name: str) -> Mapping[Outcome, int]:
        return {}


def incarnation(router: Any, process: Any) -> Incarnation:
    return Incarnation(Launch(spec=SPEC, incarnation=1, endpoint="", key=b""), process, router)
