"""Run a handler at an embedded node in your own tests, as a worker runs it.

    def test_counts(run_agent):
        agent = run_agent("agents.py:handle")
        assert agent.ask("fish") == [{"type": "count", "properties": {"number": 1}}]
        assert agent.memory == {"count": 1}

pytest finds the fixture `run_agent` wherever em-runner is installed. `running` does the same as a
context manager. They start no other process, and need no fixed port and no token. Until the test
ends, the node listens on a free loopback port, on the event loop of a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Final, get_args

import anyio
import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal

from disco import Node, NodeSettings, serve
from shared.config.handlers import HandlerRef, parse_handler
from shared.config.load import Agent, WorkerSpec
from shared.config.schema import DEFAULT_MEMORY, ConnectionSection, MemoryKind
from shared.embryos import drop_reason
from shared.errors import ConfigError
from shared.ipc import Outcome
from worker.dispatching.choose import create_dispatcher
from worker.dispatching.dispatch import DispatcherOptions
from worker.dispatching.handler import Handler, load
from worker.dispatching.jobs import Answer, Job
from worker.dispatching.results import HandlerFault
from worker.memory.base import Memory
from worker.memory.choose import create_memory
from worker.node.client import NodeClient

if TYPE_CHECKING:
    import pytest

__all__ = ["AgentUnderTest", "ConfigError", "HandlerFault", "QueryFailed", "RunAgent", "running"]

_NAME: Final = "agent_under_test"
_REF: Final = HandlerRef("the handler under test", None, "handle", Path())

# Shorter than a runner's: a test should fail soon.
_TIMEOUT_S: Final = 5.0
_SETUP_TIMEOUT_S: Final = 30.0

_NODE_TIMEOUT_S: Final = 10.0
"""How long the node may take, apart from the handler."""

_CLOSE_TIMEOUT_S: Final = 1.0
"""How long the agent may take to close its connection at the end."""


class QueryFailed(AssertionError):
    """The handler failed to answer a query, or exceeded its timeout. The message has the reason."""


class AgentUnderTest:
    """A handler that answers at an embedded node. `running` creates it."""

    def __init__(
        self,
        portal: BlockingPortal,
        node: Node,
        memory: Memory,
    ) -> None:
        self._portal = portal
        self._node = node
        self._memory = memory
        self._one_query = anyio.Lock()
        self._job: Job | None = None
        self._answer: Answer | None = None
        self._hang_reason: str | None = None
        self._query_scope = anyio.CancelScope()

    @property
    def memory(self) -> dict[Any, Any]:
        """A copy of the memory that the next query gets. Waits for a running query."""
        return self._portal.call(self._read_memory)

    def ask(self, text: str) -> list[Any]:
        """Send a query through the node, and return its result: a list of embryos.

        This blocks the event loop of the calling thread: in an `async def`, use `ask_async`.
        The queries of several threads run one after the other.

        Raises:
            QueryFailed: if the handler fails, exceeds its timeout, or returns an invalid result.
            ValueError: if the text cannot be encoded.
            RuntimeError: if the agent has ended.
        """
        return self._portal.call(self._ask, text)

    async def ask_async(self, text: str) -> list[Any]:
        """Ask as `ask` does, without blocking the event loop."""
        future = self._portal.start_task_soon(self._ask, text)
        return await asyncio.wrap_future(future)

    async def _read_memory(self) -> dict[Any, Any]:
        async with self._one_query:
            self._check_not_hung()
            memory = self._memory.checkout()
            # The rollback gives the agent another copy, so the test may change this dict.
            self._memory.rollback()
            return memory

    async def _ask(self, text: str) -> list[Any]:
        # One query at a time, as in a worker with a memory. So the dispatcher's last answer is the
        # answer to this query.
        async with self._one_query:
            self._check_not_hung()
            # A query or an answer that is too large ends the connection. Then the agent must
            # reconnect before this query is sent.
            await self._node.wait_for(_NAME, _NODE_TIMEOUT_S)
            self._job = None
            self._answer = None
            with anyio.CancelScope() as self._query_scope:
                embryos = await self._node.query(text)
            self._check_not_hung()
            # The node returns an empty list for every failure. The dispatcher's answer has the
            # reason. Without it, a handler that fails would look like one that finds nothing.
            if self._answer is None:
                raise QueryFailed(
                    f"the query of {len(text)} characters was not answered; is it too large?"
                )
            outcome, payload = self._answer
            if outcome is not Outcome.OK:
                raise QueryFailed(payload.decode("utf-8", "replace"))
            result = msgspec.json.decode(payload)
            problem = drop_reason(result)
            if problem is not None:
                raise QueryFailed(problem)
            if result and not embryos:
                raise QueryFailed("the answer did not reach the node; is it too large?")
            return embryos

    def _check_not_hung(self) -> None:
        if self._hang_reason is not None:
            raise QueryFailed(f"{self._hang_reason}; em-runner would restart a worker for this")

    def _on_hung(self, reason: str) -> None:
        """Fail all further queries. A thread that hangs cannot be stopped in this process."""
        self._hang_reason = reason
        self._query_scope.cancel()

    # --- what a dispatcher reports, see `Observer` ---

    def submitted(self, job: Job) -> None:
        """Expect the answer of this job."""
        self._job = job

    def failed(self, job: Job, exc: BaseException) -> None:
        """Do nothing: the answer contains the reason."""

    def settled(self, job: Job, answer: Answer) -> None:
        """Keep the answer, unless its query was cancelled and another one has been sent."""
        if job is self._job:
            self._answer = answer


class RunAgent:
    """The fixture `run_agent`."""

    def __init__(
        self,
        request: pytest.FixtureRequest,
        agents: ExitStack,
    ) -> None:
        self._request = request
        self._agents = agents

    def __call__(
        self,
        handler: object,
        *,
        memory: MemoryKind = DEFAULT_MEMORY,
        folder: Path | None = None,
        state_dir: Path | None = None,
        timeout_s: float = _TIMEOUT_S,
        setup_timeout_s: float = _SETUP_TIMEOUT_S,
    ) -> AgentUnderTest:
        """Run a handler until the test ends, as `running` does.

        The default of `folder` is the folder of the test's file. The default of `state_dir` is a
        new folder in the test's `tmp_path`.
        """
        if memory == "disk" and state_dir is None:
            # A new folder for each agent: two agents of one test have the same name.
            tmp_path = self._request.getfixturevalue("tmp_path")
            state_dir = Path(mkdtemp(dir=tmp_path))
        agent = running(
            handler,
            memory=memory,
            folder=folder or self._request.path.parent,
            state_dir=state_dir,
            timeout_s=timeout_s,
            setup_timeout_s=setup_timeout_s,
        )
        return self._agents.enter_context(agent)


@contextmanager
def running(
    handler: object,
    *,
    memory: MemoryKind = DEFAULT_MEMORY,
    folder: Path | None = None,
    state_dir: Path | None = None,
    timeout_s: float = _TIMEOUT_S,
    setup_timeout_s: float = _SETUP_TIMEOUT_S,
) -> Iterator[AgentUnderTest]:
    """Run a handler at an embedded node until the end of the `with`.

    Args:
        handler: `module:attribute` or `file.py:attribute`, as in a configuration; or a function,
            class or object.
        memory: `none`, `ram` or `disk`, as in a configuration.
        folder: where a handler's file or module is looked for. Default: the current folder.
        state_dir: where a memory on disk is kept. Default: `folder`.
        timeout_s: how long one query may take, and the handler's `close`.
        setup_timeout_s: how long the handler's `setup` may take.

    Raises:
        ConfigError: if the handler cannot be loaded.
        HandlerFault: if its `setup` fails or exceeds its timeout; at the end, if its `close` does.
        ValueError: if the memory is of an unknown kind, or on disk without a folder.
    """
    if memory not in get_args(MemoryKind):
        expected = ", ".join(get_args(MemoryKind))
        raise ValueError(f"memory: found {memory!r}, expected one of {expected}")
    state_dir = state_dir or folder
    if memory == "disk" and state_dir is None:
        raise ValueError("a disk memory needs a state_dir, such as pytest's tmp_path")
    if isinstance(handler, str):
        ref = parse_handler(handler, folder or Path.cwd())
        loaded = load(ref)
    else:
        loaded = Handler.from_object(handler, _REF)
    agent_memory = create_memory(
        memory,
        _NAME,
        state_dir or Path(),
    )
    with start_blocking_portal(backend_options={"use_uvloop": True}) as portal:
        context = portal.wrap_async_context_manager(
            _running(
                portal,
                loaded,
                agent_memory,
                timeout_s,
                setup_timeout_s,
            )
        )
        agent = context.__enter__()
        try:
            yield agent
        finally:
            # Without the exception of the test: the agent's task group would wrap it in a group,
            # and pytest would show that instead of the failed assertion.
            context.__exit__(None, None, None)


@asynccontextmanager
async def _running(
    portal: BlockingPortal,
    handler: Handler,
    memory: Memory,
    timeout_s: float,
    setup_timeout_s: float,
) -> AsyncIterator[AgentUnderTest]:
    # The node's timeout is longer than the dispatcher's, so that the dispatcher ends a query that
    # takes too long, and gives the reason.
    node_timeout_ms = round((timeout_s + _NODE_TIMEOUT_S) * 1000)
    settings = NodeSettings(port=0, query_timeout_ms=node_timeout_ms)
    memory.open()
    try:
        async with serve(settings) as node:
            agent = AgentUnderTest(portal, node, memory)
            options = DispatcherOptions(
                timeout_s=timeout_s,
                on_hung=agent._on_hung,
                observer=agent,
            )
            dispatcher = create_dispatcher(handler, memory, options)
            client = NodeClient(
                _spec(node),
                handler.capabilities,
                dispatcher,
                on_state=lambda *_: None,
            )
            async with dispatcher.running():
                await _within(setup_timeout_s, "setup", dispatcher.set_up)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.run)
                    await node.wait_for(_NAME, _NODE_TIMEOUT_S)
                    yield agent
                    # A query may still run if Ctrl-C ended its test. It is not waited for.
                    with anyio.move_on_after(_CLOSE_TIMEOUT_S):
                        await client.drain()
                    tasks.cancel_scope.cancel()
                # `close` runs on the thread of the handler, and would wait for the call that hangs.
                if not agent._hang_reason:
                    await _within(timeout_s, "close", dispatcher.tear_down)
    except BaseExceptionGroup as group:
        # The task groups are internal. A test expects the exception of its handler.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        memory.close()


def _spec(node: Node) -> WorkerSpec:
    # The node is in this process, so it needs no protection from clients that reconnect at once.
    connection = ConnectionSection(reconnect_interval_ms=100)
    agent = Agent(
        name=_NAME,
        handler=_REF,
        nodes=(node.address,),
        connection=connection,
    )
    return WorkerSpec(
        name=_NAME,
        agent=agent,
        node=node.address,
    )


async def _within(
    limit_s: float,
    name: str,
    call: Callable[[], Awaitable[None]],
) -> None:
    """Call the handler's `setup` or `close`.

    Raises:
        HandlerFault: if it fails, or does not end in time.
    """
    with anyio.move_on_after(limit_s) as limit:
        await call()
    if limit.cancelled_caught:
        raise HandlerFault(f"the handler's {name}() has not ended after {limit_s:g} s")
