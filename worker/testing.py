"""For your own tests: a handler at an embedded node, run as a worker runs it, from plain pytest.

    from worker.testing import running

    def test_counts(run_agent):
        agent = run_agent("agents.py:handle")
        assert agent.ask("fish") == [{"type": "count", "properties": {"number": 1}}]
        assert agent.memory == {"count": 1}

`run_agent` is a fixture that pytest finds wherever em-runner is installed; `running` is the same as a context manager.
No process, no port to choose, no token: the node listens on loopback, where the kernel finds a port, and
is gone at the end of the `with`. What a worker does to a query is done here too: the WebSocket, the
handler's thread or loop, its time-out, what its result and memory must be.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, get_args

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from disco import Node, NodeSettings, serve
from shared.config import Agent, Connection, WorkerSpec
from shared.handlers import HandlerRef, parse_handler
from shared.ipc import Counters
from shared.nodes import NodeAddress
from shared.schema import MemoryKind
from worker.connection import Connection as Line
from worker.dispatchers import dispatcher_for
from worker.handler import Handler, examined, load
from worker.memories import memory_for
from worker.memory import Memory
from worker.results import HandlerFault

NAME: Final = "agent_under_test"
_REF: Final = HandlerRef("the handler under test", None, "handle", Path())
_PATIENCE_S: Final = 10.0


class HandlerFailed(AssertionError):
    """The handler failed at a query, or took too long; the text says why."""


class Handles(Protocol):
    """An object that is a handler."""

    @property
    def handle(self) -> Callable[..., Any]:
        """What is called for each query."""


class AgentUnderTest:
    """A handler that answers at an embedded node; `running` makes one."""

    def __init__(self, portal: BlockingPortal, node: Node, memory: Memory, counters: Counters) -> None:
        self._portal = portal
        self._node = node
        self._memory = memory
        self._counters = counters
        self._one_at_a_time = threading.Lock()
        self._hung = ""

    def hang(self, reason: str) -> None:
        """Take that a call of the handler hangs: a worker would be replaced now."""
        self._hung = reason

    @property
    def memory(self) -> dict[Any, Any]:
        """What the next query will get."""
        return dict(self._memory.checkout())

    def ask(self, text: str) -> list[Any]:
        """Ask through the node and return what it makes of the answer: a list of embryos.

        Several threads that ask are answered one after the other.

        Raises:
            HandlerFailed: when the handler failed, took longer than its time, or gave what a node does not take.
            RuntimeError: when the agent runs no more.
        """
        with self._one_at_a_time:
            if self._hung:
                raise HandlerFailed(f"{self._hung}; a worker would have been replaced")
            try:
                return self._portal.call(self._ask, text)
            except RuntimeError as exc:
                raise RuntimeError(f"the agent under test runs no more: {exc}") from None

    async def _ask(self, text: str) -> list[Any]:
        await self._node.wait_for(NAME, _PATIENCE_S)  # it may have lost its connection at the query before
        errors, answered, peer = self._counters.errors, self._counters.queries_node, self._node.registry.peer(NAME)
        found = await self._node.query(text)
        if self._counters.errors > errors:
            raise HandlerFailed(self._counters.handler_error.words if self._counters.handler_error else "")
        if not found and (self._node.registry.peer(NAME) is not peer or self._counters.queries_node == answered):
            raise HandlerFailed("the answer did not reach the node, which cut the connection; is it too large?")
        return found


@contextmanager
def running(
    handler: str | Callable[..., Any] | type | Handles,
    *,
    memory: MemoryKind = "ram",
    folder: Path | None = None,
    state_dir: Path | None = None,
    timeout_s: float = 5.0,
    setup_timeout_s: float = 30.0,
) -> Iterator[AgentUnderTest]:
    """Run a handler at an embedded node for as long as the `with` lasts.

    Args:
        handler: `module:attribute` or `file.py:attribute`, as in a configuration, or a function, class or object.
        memory: as in a configuration; `disk` needs a `state_dir` or a `folder`.
        folder: where a handler's file or module is looked for; else the current folder.
        state_dir: where a disk memory's file is made; else `folder`.
        timeout_s: how long one query may take.
        setup_timeout_s: how long the handler's `setup` may take.

    Raises:
        ConfigError: when it cannot be loaded.
        HandlerFault: when its `setup` fails, or takes too long.
    """
    state_dir = state_dir or folder
    if memory not in get_args(MemoryKind):
        raise ValueError(f"memory: found {memory!r}, expected one of {', '.join(get_args(MemoryKind))}")
    if memory == "disk" and state_dir is None:
        raise ValueError("a disk memory needs a state_dir, such as pytest's tmp_path")
    here = folder or Path.cwd()
    loaded = load(parse_handler(handler, here)) if isinstance(handler, str) else examined(handler, _REF)
    with start_blocking_portal(backend_options={"use_uvloop": True}) as portal:
        life = portal.wrap_async_context_manager(
            _running(portal, loaded, memory, state_dir or here, timeout_s, setup_timeout_s)
        )
        try:
            agent = life.__enter__()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        try:
            yield agent  # a test that fails here fails as it is: the task groups within never see it
        finally:
            life.__exit__(None, None, None)


@asynccontextmanager
async def _running(
    portal: BlockingPortal,
    handler: Handler,
    kind: MemoryKind,
    folder: Path,
    timeout_s: float,
    setup_timeout_s: float,
) -> AsyncIterator[AgentUnderTest]:
    counters, memory = Counters(), memory_for(kind, NAME, folder)
    async with serve(NodeSettings(port=0, query_timeout_ms=round((timeout_s + _PATIENCE_S) * 1000))) as node:
        address = NodeAddress(node.host, node.port, False)
        agent = Agent(name=NAME, handler=_REF, nodes=(address,), connection=Connection(reconnect_interval_ms=100))
        spec = WorkerSpec(name=NAME, agent=agent, node=address, index=1)
        dispatcher = dispatcher_for(handler, memory, counters, 1, timeout_s)
        dispatcher.quotes_queries = True
        line = Line(spec, handler.capabilities, dispatcher, counters, lambda state, detail: None)
        memory.open()
        try:
            async with anyio.create_task_group() as tasks, dispatcher.running():
                with anyio.move_on_after(setup_timeout_s) as limit:
                    await dispatcher.set_up()
                if limit.cancelled_caught:
                    raise HandlerFault(f"the handler's setup() has not ended after {setup_timeout_s:g} s")
                tasks.start_soon(line.run)
                await node.wait_for(NAME, _PATIENCE_S)
                agent_under_test = AgentUnderTest(portal, node, memory, counters)
                dispatcher.on_hung = agent_under_test.hang
                yield agent_under_test
                with anyio.move_on_after(timeout_s):
                    await line.drain()
                    await dispatcher.tear_down()
                tasks.cancel_scope.cancel()
        finally:
            memory.close()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
