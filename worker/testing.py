"""For your own tests: a handler at an embedded node, run as a worker runs it, from plain pytest.

    from worker.testing import running

    def test_counts(run_agent):
        agent = run_agent("agents.py:handle")
        assert agent.ask("fish") == [{"type": "count", "properties": {"number": 1}}]
        assert agent.memory == {"count": 1}

    async def test_counts_beside_a_server_of_its_own(run_agent):
        assert await run_agent("agents.py:handle").ask_async("fish")

`run_agent` is a fixture that pytest finds wherever em-runner is installed; `running` is the same as a context manager.
No process, no port to choose, no token: the node listens on loopback, where the kernel finds a port, and
is gone at the end of the `with`. What a worker does to a query is done here too: the WebSocket, the
handler's thread or loop, its time-out, what its result and memory must be.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, get_args

import anyio
import anyio.to_thread
import msgspec

from disco import Node, NodeSettings, serve
from shared.config import Agent, Connection, WorkerSpec
from shared.embryos import objection
from shared.errors import ConfigError
from shared.handlers import HandlerRef, parse_handler
from shared.ipc import Counters, Outcome
from shared.nodes import NodeAddress
from shared.schema import MemoryKind
from worker.connection import Connection as Line
from worker.dispatchers import dispatcher_for
from worker.handler import Handler, examined, load
from worker.memories import memory_for
from worker.memory import Memory
from worker.own_modules import own_modules
from worker.results import HandlerFault, encode_result

NAME: Final = "agent_under_test"
_STUCK_S: Final = 2.0
_LOOP_HELD_UP: Final = (
    "; ask() has held up the event loop of the test meanwhile, which the handler may have waited for: "
    "there, use 'await agent.ask_async(...)'"
)
_REF: Final = HandlerRef("the handler under test", None, "handle", Path())
_PATIENCE_S: Final = 10.0
_SLACK_S: Final = 1.0
_KEEPS_THE_LOOP: Final = (
    "keeps the event loop, or goes on when it is cancelled: an 'async def' must not compute or sleep without 'await', "
    "nor catch CancelledError"
)


class HandlerFailed(AssertionError):
    """The handler failed at a query, or took too long; the text says why."""


class Handles(Protocol):
    """An object that is a handler."""

    @property
    def handle(self) -> Callable[..., Any]:
        """What is called for each query."""


class AgentUnderTest:
    """A handler that answers at an embedded node; `running` makes one."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, node: Node, memory: Memory, counters: Counters, timeout_s: float
    ) -> None:
        self._loop = loop
        self._node = node
        self._memory = memory
        self._counters = counters
        self._timeout_s = timeout_s
        self._one_at_a_time = threading.Lock()
        self._hung = anyio.Event()
        self._why_hung = ""
        self._returned: Any = None
        self._given_up = False

    def hang(self, reason: str) -> None:
        """Take that a call of the handler hangs: a worker would be replaced now."""
        self._why_hung = reason
        self._hung.set()

    @property
    def hangs(self) -> bool:
        """Whether a call of the handler still runs, long after its time."""
        return bool(self._why_hung)

    @property
    def is_let_go(self) -> bool:
        """Whether nobody waits for the handler any more: a call of it hangs, or the test was told to stop."""
        return self.hangs or self._given_up

    def note(self, returned: Any) -> None:
        """Take what the handler returned."""
        self._returned = returned

    @property
    def memory(self) -> dict[Any, Any]:
        """What the next query will get: a copy, which is the test's own."""
        return self._memory.peek()

    def ask(self, text: str) -> list[Any]:
        """Ask through the node and return what it makes of the answer: a list of embryos.

        Several threads that ask are answered one after the other.

        It waits, and with it the event loop of the thread that calls it: in an `async def`, use `ask_async`.

        Raises:
            HandlerFailed: when the handler failed, took longer than its time, or gave what a node does not take.
            ValueError: when the text cannot be sent.
            RuntimeError: when the agent runs no more, or the query before was not waited for.
        """
        return self._answered(text, [])

    async def ask_async(self, text: str) -> list[Any]:
        """Ask as `ask` does, while the event loop of the test goes on: a server of its own may answer the handler."""
        asked: list[Future[list[Any]]] = []
        try:
            return await anyio.to_thread.run_sync(self._answered, text, asked, abandon_on_cancel=True)
        except BaseException as exc:
            if not isinstance(exc, Exception):  # cancelled, by Ctrl-C too: the thread must not outlive the test
                self._given_up = True
                for one in asked:
                    one.cancel()
            raise

    def _answered(self, text: str, begun: list[Future[list[Any]]]) -> list[Any]:
        """Ask and wait; what is waited for is put into `begun`."""
        if not isinstance(text, str):
            raise TypeError(f"ask() takes a text, found a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise ValueError(f"the query is no text that can be sent: {exc}") from None
        with self._one_at_a_time:
            if self.hangs:
                raise HandlerFailed(f"{self._why_hung}; a worker would have been replaced")
            if self._given_up:
                raise RuntimeError("the query before was not waited for; run another agent")
            asking = self._ask(text, _LOOP_HELD_UP if _is_on_a_loop() else "")
            try:
                asked = asyncio.run_coroutine_threadsafe(asking, self._loop)
            except RuntimeError as exc:
                asking.close()
                raise RuntimeError(f"the agent under test runs no more: {exc}") from None
            begun.append(asked)
            if self._given_up:  # just now, and by one who did not see it begin
                asked.cancel()
            try:
                return self._waited_for(asked)
            except BaseException as exc:
                self._given_up = self._given_up or not isinstance(exc, Exception)  # Ctrl-C
                raise

    def _waited_for(self, asked: Future[list[Any]]) -> list[Any]:
        ends_s = time.monotonic() + self._timeout_s + 2 * _PATIENCE_S
        limit_s = self._timeout_s + _SLACK_S
        while True:
            try:
                return asked.result(limit_s)
            except FutureTimeout:
                if asked.done():
                    raise
            if time.monotonic() > ends_s or not self._loop_turns():
                self._why_hung = f"a query {_KEEPS_THE_LOOP}"
                raise HandlerFailed(self._why_hung)
            limit_s = _SLACK_S

    def _loop_turns(self) -> bool:
        turned = threading.Event()
        with contextlib.suppress(RuntimeError):  # it is over, and so is what was asked
            self._loop.call_soon_threadsafe(turned.set)
            return turned.wait(_STUCK_S)
        return True

    async def _ask(self, text: str, late: str) -> list[Any]:
        try:
            await self._node.wait_for(NAME, _PATIENCE_S)  # it may have lost its connection at the query before
        except TimeoutError:
            raise HandlerFailed("the agent has lost its node and is not back") from None
        errors, answered, peer = self._counters.errors, self._counters.queries_node, self._node.registry.peer(NAME)
        timed_out = self._counters.node[Outcome.TIMED_OUT]
        self._returned = None
        began_s = time.monotonic()
        found: list[Any] = []
        async with anyio.create_task_group() as tasks:

            async def give_up() -> None:
                await self._hung.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(give_up)
            found = await self._node.query(text)
            tasks.cancel_scope.cancel()
        if self._counters.errors > errors:
            words = self._counters.handler_error.words if self._counters.handler_error else ""
            raise HandlerFailed(words + late if self._counters.node[Outcome.TIMED_OUT] > timed_out else words)
        if self.hangs:
            raise HandlerFailed(f"{self._why_hung}; a worker would have been replaced")
        if self._counters.queries_node == answered:
            raise HandlerFailed(f"the query, of {len(text)} characters, did not reach the handler; is it too large?")
        if not found and self._node.registry.peer(NAME) is not peer:
            raise HandlerFailed("the answer did not reach the node, which cut the connection; is it too large?")
        if (took_s := time.monotonic() - began_s) > self._timeout_s + _SLACK_S:
            raise HandlerFailed(f"a query took {took_s:.1f} s, and {_KEEPS_THE_LOOP}")
        if self._returned is not None and (wrong := objection(msgspec.json.decode(encode_result(self._returned[0])))):
            raise HandlerFailed(wrong)
        return found


def _is_on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


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
        state_dir: where a disk memory's file is made; else `folder`. Both may be texts.
        timeout_s: how long one query may take.
        setup_timeout_s: how long the handler's `setup` may take.

    Raises:
        ConfigError: when it cannot be loaded.
        HandlerFault: when its `setup` fails, or takes too long; at the end, when its `close` does.
    """
    folder, state_dir = (None if each is None else Path(each) for each in (folder, state_dir or folder))
    if memory not in get_args(MemoryKind):
        raise ValueError(f"memory: found {memory!r}, expected one of {', '.join(get_args(MemoryKind))}")
    if memory == "disk" and state_dir is None:
        raise ValueError("a disk memory needs a state_dir, such as pytest's tmp_path")
    if not 0 < timeout_s < threading.TIMEOUT_MAX or not 0 < setup_timeout_s < threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_s, setup_timeout_s: found {timeout_s}, {setup_timeout_s}, expected seconds above 0")
    here = folder or Path.cwd()
    ref = parse_handler(handler, here) if isinstance(handler, str) else None
    with own_modules(ref.search_dir) if ref is not None else contextlib.nullcontext():
        try:
            loaded = load(ref, reuse=True) if ref is not None else examined(handler, _REF)
        except TypeError as exc:  # a class that wants arguments
            raise ConfigError(f"the handler {handler!r} cannot be made: {exc}") from None
        life = _Life(lambda: _running(loaded, memory, state_dir or here, timeout_s, setup_timeout_s))
        agent = life.begin(setup_timeout_s)
        try:
            yield agent
        except BaseException as exc:
            is_let_go = agent.is_let_go or not isinstance(exc, Exception)
            with contextlib.suppress(Exception):  # a test that fails here fails as it is; one told to stop, stops
                life.end(_SLACK_S if is_let_go else timeout_s + 2 * _PATIENCE_S)
            raise
        if agent.is_let_go:  # what there is to be said of it was said
            with contextlib.suppress(Exception):
                life.end(_SLACK_S)
        else:
            life.end(timeout_s + 2 * _PATIENCE_S)


class _Life:
    """An agent's event loop, on a thread that is left behind where a handler does not let it end."""

    def __init__(self, agent: Callable[[], AbstractAsyncContextManager[AgentUnderTest]]) -> None:
        self._agent = agent
        self._began: Future[AgentUnderTest] = Future()
        self._ended: Future[None] = Future()
        self._given_up = False

    def begin(self, setup_timeout_s: float) -> AgentUnderTest:
        """Start it, and return the agent once that is ready."""
        threading.Thread(target=self._run, name="agent-under-test", daemon=True).start()
        either: list[Future[Any]] = [self._began, self._ended]
        try:
            wait(either, setup_timeout_s + 2 * _PATIENCE_S, FIRST_COMPLETED)
            if self._began.done():
                return self._began.result()
            if self._ended.done():
                self._ended.result()
            raise HandlerFault(f"the handler's setup() {_KEEPS_THE_LOOP}")
        except BaseException:  # a signal's too: nobody would end it once it is up
            self._given_up = True
            with contextlib.suppress(AttributeError, RuntimeError):  # it is not there yet, or no more
                self._loop.call_soon_threadsafe(self._over.set)
            raise

    def end(self, limit_s: float) -> None:
        """Have it end, within this time.

        Raises:
            HandlerFault: when the handler's `close` fails or does not end.
        """
        with contextlib.suppress(RuntimeError):  # it has ended by itself, and `_ended` says how
            self._loop.call_soon_threadsafe(self._over.set)
        try:
            self._ended.result(limit_s)
        except FutureTimeout:
            raise HandlerFault(f"the handler's close(), or a query, {_KEEPS_THE_LOOP}") from None

    def _run(self) -> None:
        try:
            anyio.run(self._live, backend_options={"use_uvloop": True})
        except BaseExceptionGroup as group:
            self._ended.set_exception(_first(group))
        except BaseException as exc:  # noqa: BLE001 - whoever waits for the end raises it
            self._ended.set_exception(exc)
        else:
            self._ended.set_result(None)

    async def _live(self) -> None:
        self._over = anyio.Event()
        self._loop = asyncio.get_running_loop()
        if self._given_up:
            return
        async with self._agent() as agent:
            self._began.set_result(agent)
            await self._over.wait()


@asynccontextmanager
async def _running(
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
        agent_under_test = AgentUnderTest(asyncio.get_running_loop(), node, memory, counters, timeout_s)
        dispatcher = dispatcher_for(_noted(handler, agent_under_test.note), memory, counters, 1, timeout_s)
        dispatcher.quotes_queries = True
        line = Line(spec, handler.capabilities, dispatcher, counters, lambda state, detail: None)
        memory.open()
        try:
            async with anyio.create_task_group() as tasks, dispatcher.running():
                began_s = time.monotonic()
                with anyio.move_on_after(setup_timeout_s) as limit:
                    await dispatcher.set_up()
                if limit.cancelled_caught:
                    raise HandlerFault(f"the handler's setup() has not ended after {setup_timeout_s:g} s")
                if time.monotonic() - began_s > setup_timeout_s + _SLACK_S:
                    raise HandlerFault(f"the handler's setup() {_KEEPS_THE_LOOP}")
                tasks.start_soon(line.run)
                await node.wait_for(NAME, _PATIENCE_S)
                dispatcher.on_hung = agent_under_test.hang
                yield agent_under_test
                with anyio.move_on_after(timeout_s):
                    await line.drain()
                with anyio.move_on_after(timeout_s) as limit:
                    if not agent_under_test.hangs:  # a call that still runs would have close() wait for it
                        await dispatcher.tear_down()
                tasks.cancel_scope.cancel()
                if limit.cancelled_caught:
                    raise HandlerFault(f"the handler's close() has not ended after {timeout_s:g} s")
        finally:
            memory.close()


def _noted(handler: Handler, note: Callable[[Any], None]) -> Handler:
    """Have `note` told what the handler returns: of what a node drops, nothing is to be seen at the node."""

    def handle(body: str, memory: dict[Any, Any]) -> Any:
        returned = handler.handle(body, memory)
        note(returned)
        return returned

    async def handle_async(body: str, memory: dict[Any, Any]) -> Any:
        returned = await handler.handle(body, memory)
        note(returned)
        return returned

    return msgspec.structs.replace(handler, handle=handle_async if handler.is_async else handle)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
