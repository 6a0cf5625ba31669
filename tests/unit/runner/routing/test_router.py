"""`Router` with real sockets of workers in one process: each query is answered exactly once."""

from __future__ import annotations

import asyncio
import select
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.routing.peers import Reply
from runner.routing.router import Router
from shared import ipc
from shared.config.handlers import HandlerRef
from shared.config.load import Agent, WorkerSpec
from shared.config.nodes import parse_node
from shared.config.schema import RunnerSection
from shared.ipc import (
    Cancel,
    Counters,
    Drain,
    DrainRequest,
    Failed,
    Hello,
    Launch,
    Outcome,
    Queries,
    ReplaceRequest,
    Replies,
    Status,
)
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio

LIMIT_S = 60.0
POLL_S = 0.001
KEY = b"k" * ipc.KEY_BYTES


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition is true, and return its value."""
    with anyio.fail_after(LIMIT_S):
        while not (found := condition()):  # noqa: ASYNC110 - ZeroMQ and the router offer no event
            await anyio.sleep(POLL_S)
        return found


class Reports:
    """Records what the workers report, with the incarnation that reports it.

    Attributes:
        states: from each `Status`.
        reasons: from each other message, why the worker exits.
        handovers: the memory from each `Handover`.
    """

    def __init__(self) -> None:
        self.states: list[tuple[int, str]] = []
        self.reasons: list[tuple[int, str]] = []
        self.handovers: list[tuple[int, bytes]] = []

    def record(self, incarnation: int, message: ipc.Report) -> None:
        match message:
            case Status():
                self.states.append((incarnation, message.state))
            case ipc.Handover():
                self.handovers.append((incarnation, message.memory))
            case _:
                self.reasons.append((incarnation, message.reason))


class FakeWorker:
    """A DEALER that sends what a worker sends, and also what a worker must not send."""

    def __init__(self, router: Router, routing_id: bytes) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, routing_id)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(router.endpoint)

    def send(self, *messages: ipc.WorkerMessage | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else ipc.encode(message))

    def report(self, state: Any) -> None:
        self.send(Status(state, "", Counters()))

    def authenticate(self, state: Any = "ready") -> None:
        self.send(Hello(KEY))
        self.report(state)

    def reply(self, *sequences: int, payload: bytes = b"1", outcome: Outcome = Outcome.OK) -> None:
        self.send(Replies([(sequence, outcome, payload) for sequence in sequences]))

    def _receive_now(self) -> bytes | None:
        try:
            return self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    async def receive(self) -> ipc.RunnerMessage:
        return ipc.decode_runner_message(await until(self._receive_now))

    async def receive_queries(self) -> dict[str, int]:
        """Return the texts of the queries in the next message, with their sequence numbers."""
        message = await self.receive()
        assert isinstance(message, Queries)
        return {query: sequence for sequence, query in message.items}


class Client:
    """Submits queries, and records every reply to each of them."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.replies: dict[str, list[Reply]] = {}

    def submit(
        self, query: str, worker: str = "echo_server", alternatives: tuple[str, ...] = ()
    ) -> int | None:
        self.replies[query] = []
        return self.router.submit(worker, query, self.replies[query].append, alternatives)

    def ask(
        self, query: str, worker: str = "echo_server", alternatives: tuple[str, ...] = ()
    ) -> int:
        """Submit a query that must be accepted, and return its sequence number."""
        sequence = self.submit(query, worker, alternatives)
        assert sequence is not None
        return sequence

    def outcomes(self, query: str) -> list[Outcome]:
        return [reply.outcome for reply in self.replies[query]]

    def payloads(self, query: str) -> list[bytes]:
        return [reply.payload for reply in self.replies[query]]

    async def reply_to(self, query: str) -> tuple[Outcome, bytes]:
        """Wait for the reply to a query, and return its outcome and payload."""
        await until(lambda: self.replies[query])
        (reply,) = self.replies[query]
        return reply.outcome, reply.payload


class Setup:
    """A router, its client, and the workers that it expects."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.reports = Reports()
        self.client = Client(router)
        self.workers: list[FakeWorker] = []

    def expect(
        self, name: str = "echo_server", incarnation: int = 1, *, standby: bool = False
    ) -> Launch:
        agent = Agent(
            name="echo",
            handler=HandlerRef("worker.echo", None, "handle", Path("/")),
            nodes=(parse_node("h"),),
        )
        spec = WorkerSpec(name=name, agent=agent, node=agent.nodes[0])
        launch = Launch(
            spec=spec,
            incarnation=incarnation,
            endpoint=self.router.endpoint,
            key=KEY,
            standby=standby,
        )
        self.router.expect(launch, self.reports.record)
        return launch

    def connect(self, routing_id: bytes) -> FakeWorker:
        self.workers.append(FakeWorker(self.router, routing_id))
        return self.workers[-1]

    async def worker(
        self, name: str = "echo_server", incarnation: int = 1
    ) -> tuple[Launch, FakeWorker]:
        """Return a worker that is up."""
        launch = self.expect(name, incarnation)
        worker = self.connect(launch.routing_id)
        worker.authenticate()
        await until(lambda: self.router.accepts(name))
        return launch, worker

    async def standby(self) -> tuple[Launch, FakeWorker]:
        """Return the second incarnation of `echo_server`, on standby."""
        launch = self.expect(incarnation=2, standby=True)
        worker = self.connect(launch.routing_id)
        worker.authenticate(state="standby")
        await until(lambda: (2, "standby") in self.reports.states)
        return launch, worker

    async def until_read(self, worker: FakeWorker) -> None:
        """Wait until the router has read everything that a worker has sent."""
        # The router reads a worker's messages in their order, so it reads this one last.
        worker.send(ReplaceRequest("last message"))
        await until(lambda: "last message" in [reason for _, reason in self.reports.reasons])


@contextmanager
def closed_afterwards(setup: Setup) -> Iterator[Setup]:
    try:
        yield setup
    finally:
        setup.router.close()
        for worker in setup.workers:
            worker.socket.close()


@asynccontextmanager
async def running_router(**limits: int) -> AsyncIterator[Setup]:
    with tempfile.TemporaryDirectory() as folder:
        router = Router(Path(folder) / "router.sock", RunnerSection(**limits))
        router.open()
        with closed_afterwards(Setup(router)) as setup:
            yield setup


# --- which messages count ---


async def test_query_reaches_its_worker_and_the_reply_returns() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("é?")
        assert await worker.receive() == Queries([(sequence, "é?")])
        worker.reply(sequence, payload=b'{"a":1}')
        await until(lambda: setup.client.replies["é?"])
        assert setup.client.replies["é?"] == [Reply(Outcome.OK, b'{"a":1}', "echo_server")]
        assert setup.router.in_flight_at("echo_server") == 0


async def test_failed_handler_has_another_outcome_than_an_answer() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        worker.reply(sequence, payload=b"ValueError: x", outcome=Outcome.HANDLER_FAILED)
        reply = await setup.client.reply_to("q")
        assert reply == (Outcome.HANDLER_FAILED, b"ValueError: x")


@pytest.mark.parametrize(
    "hello", [[], [Hello(b"")], [Hello(b"x" * ipc.KEY_BYTES)], [Hello(KEY[:-1])]]
)
async def test_worker_without_the_right_key_is_ignored(hello: list[ipc.WorkerMessage]) -> None:
    async with running_router() as setup:
        launch = setup.expect()
        worker = setup.connect(launch.routing_id)
        with capture_logs() as logs:
            worker.send(*hello, Status("ready", "", Counters()), Failed("x"), DrainRequest())
            await until(lambda: logs)
            assert logs[0]["kind"] == "no_key"
            assert not setup.router.accepts("echo_server")
            assert not setup.router.drain(launch)
            # The same worker, with the right key: the messages before it are read by then.
            worker.authenticate()
            await until(lambda: setup.router.accepts("echo_server"))
        assert setup.reports.states == [(1, "ready")]
        assert setup.reports.reasons == []


async def test_worker_that_the_router_does_not_expect_is_ignored() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        with capture_logs() as logs:
            unexpected = setup.connect(b"echo_server#2")
            unexpected.authenticate()
            unexpected.reply(sequence, payload=b'"forged"')
            await until(lambda: logs)
        assert logs[0]["kind"] == "unknown_peer"
        worker.reply(sequence, payload=b'"true"')
        assert await setup.client.reply_to("q") == (Outcome.OK, b'"true"')


@pytest.mark.parametrize(
    "message",
    [b"", b"\xff", b"garbage", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x92\x05\xa1\xff"],
)
async def test_worker_continues_after_an_invalid_message(message: bytes) -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        with capture_logs() as logs:
            worker.send(message)
            await until(lambda: logs)
        assert logs[0]["kind"] == "undecodable"
        sequence = setup.client.ask("q")
        await worker.receive()
        worker.reply(sequence)
        assert (await setup.client.reply_to("q"))[0] is Outcome.OK


async def test_message_in_several_parts_is_ignored() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        with capture_logs() as logs:
            draining = ipc.encode(Status("draining", "", Counters()))
            worker.socket.send_multipart([draining, b"second part"])
            await until(lambda: logs)
        assert setup.router.accepts("echo_server")


async def test_many_invalid_messages_are_logged_once() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        with capture_logs() as logs:
            for _ in range(500):
                worker.send(b"\xff")
            sequence = setup.client.ask("q")
            await worker.receive()
            worker.reply(sequence)
            await setup.client.reply_to("q")
        assert len(logs) == 1


async def test_reply_of_an_old_incarnation_does_not_answer_its_successors_query() -> None:
    async with running_router() as setup:
        first, old = await setup.worker(incarnation=1)
        setup.client.ask("before")
        await old.receive()
        setup.router.drop(first, "it died")
        _, new = await setup.worker(incarnation=2)
        sequence = setup.client.ask("after")
        await new.receive()
        with capture_logs() as logs:
            old.reply(*range(1, sequence + 1), payload=b'"old"')
            await until(lambda: logs)
        new.reply(sequence, payload=b'"new"')
        assert await setup.client.reply_to("after") == (Outcome.OK, b'"new"')
        before = setup.client.replies["before"]
        assert before == [Reply(Outcome.WORKER_UNAVAILABLE, b"it died", "echo_server")]


async def test_reply_to_another_workers_query_is_ignored() -> None:
    async with running_router() as setup:
        _, asked = await setup.worker("one")
        _, other = await setup.worker("two")
        sequence = setup.client.ask("q", "one")
        await asked.receive()
        other.reply(sequence, payload=b'"forged"')
        await setup.until_read(other)
        assert setup.client.replies["q"] == []
        asked.reply(sequence)
        assert (await setup.client.reply_to("q"))[0] is Outcome.OK


async def test_second_reply_to_a_query_is_ignored() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        worker.reply(sequence, sequence, payload=b"1")
        worker.reply(sequence, 12345, payload=b"2")
        await setup.until_read(worker)
        assert await setup.client.reply_to("q") == (Outcome.OK, b"1")


@pytest.mark.parametrize(
    ("state", "accepts"),
    [
        ("starting", False),
        ("connecting", True),
        ("registering", True),
        ("ready", True),
        ("backoff", True),
        ("draining", False),
        ("stopped", False),
    ],
)
async def test_worker_accepts_queries_in_the_states_in_which_it_is_up(
    state: Any, accepts: bool
) -> None:
    async with running_router() as setup:
        launch = setup.expect(incarnation=4)
        setup.connect(launch.routing_id).authenticate(state=state)
        await until(lambda: setup.reports.states)
        assert setup.reports.states == [(4, state)]
        assert setup.router.accepts("echo_server") is accepts
        setup.client.submit("q")
        refused = [] if accepts else [Outcome.WORKER_UNAVAILABLE]
        assert setup.client.outcomes("q") == refused


async def test_reason_why_a_worker_cannot_start_is_reported() -> None:
    async with running_router() as setup:
        launch = setup.expect(incarnation=3)
        setup.connect(launch.routing_id).send(Hello(KEY), Failed("no handler"))
        await until(lambda: setup.reports.reasons)
        assert setup.reports.reasons == [(3, "no handler")]


# --- how queries end ---


@pytest.mark.parametrize("name", ["echo_server", "unknown"])
async def test_query_for_a_worker_that_is_not_up_is_refused_at_once(name: str) -> None:
    async with running_router() as setup:
        setup.expect()
        assert setup.client.submit("q", name) is None
        assert setup.client.outcomes("q") == [Outcome.WORKER_UNAVAILABLE]
        assert setup.router.in_flight_at(name) == 0


async def test_query_is_accepted_if_the_workers_status_waits_in_the_socket() -> None:
    async with running_router() as setup:
        worker = setup.connect(setup.expect().routing_id)
        worker.authenticate()
        assert not setup.router.accepts("echo_server")
        # The status is on its way. The event loop, which would read it, does not run here.
        for _ in range(600):
            setup.router._socket.poll(100)
            if (sequence := setup.client.submit("q")) is not None:
                break
        assert await worker.receive() == Queries([(sequence, "q")])


async def test_query_over_the_limit_is_refused_at_once() -> None:
    async with running_router(max_in_flight=2) as setup:
        await setup.worker()
        setup.client.ask("a")
        setup.client.ask("b")
        assert setup.client.submit("c") is None
        assert setup.client.outcomes("c") == [Outcome.WORKER_BUSY]


async def test_limit_of_one_worker_does_not_concern_another() -> None:
    async with running_router(max_in_flight=1) as setup:
        await setup.worker("one")
        await setup.worker("two")
        setup.client.ask("a", "one")
        assert setup.client.submit("b", "one") is None
        assert setup.client.submit("c", "two") is not None


async def test_reply_makes_room_for_one_query() -> None:
    async with running_router(max_in_flight=2) as setup:
        _, worker = await setup.worker()
        first = setup.client.ask("a")
        setup.client.ask("b")
        await worker.receive()
        worker.reply(first)
        await setup.client.reply_to("a")
        assert setup.client.submit("c") is not None
        assert setup.client.submit("d") is None


async def test_limit_for_all_workers_holds() -> None:
    async with running_router(max_in_flight_total=3) as setup:
        await setup.worker()
        await setup.worker("other")
        names = ("other", "echo_server", "other", "echo_server", "other")
        accepted = [
            setup.client.submit(f"q{number}", name) is not None for number, name in enumerate(names)
        ]
        assert accepted == [True, True, True, False, False]
        assert setup.client.outcomes("q4") == [Outcome.WORKER_BUSY]


async def test_query_without_a_reply_ends_at_its_deadline() -> None:
    async with running_router(query_timeout_ms=200) as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        assert (await setup.client.reply_to("q"))[0] is Outcome.TIMED_OUT
        worker.reply(sequence)
        await setup.until_read(worker)
        assert setup.client.outcomes("q") == [Outcome.TIMED_OUT]


async def test_worker_learns_that_a_query_has_expired() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        assert await worker.receive() == Queries([(sequence, "q")])
        setup.router.set_limits(RunnerSection(query_timeout_ms=1))
        assert await worker.receive() == Cancel([sequence])


async def test_expired_query_makes_room() -> None:
    async with running_router(query_timeout_ms=200, max_in_flight=1) as setup:
        await setup.worker()
        setup.client.ask("q")
        await setup.client.reply_to("q")
        assert setup.router.in_flight_at("echo_server") == 0
        assert setup.client.submit("next") is not None


async def test_each_query_has_its_own_deadline() -> None:
    async with running_router(query_timeout_ms=50) as setup:
        await setup.worker("one")
        await setup.worker("two")
        setup.client.ask("a", "one")
        assert (await setup.client.reply_to("a"))[0] is Outcome.TIMED_OUT
        setup.client.ask("b", "one")
        setup.client.ask("c", "two")
        await setup.client.reply_to("b")
        await setup.client.reply_to("c")
        setup.client.ask("d", "two")
        assert (await setup.client.reply_to("d"))[0] is Outcome.TIMED_OUT


@pytest.mark.parametrize("first", ["the socket", "the deadline"])
async def test_reply_before_the_deadline_counts_even_if_it_is_read_later(first: str) -> None:
    limits = RunnerSection(query_timeout_ms=50)
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        # The event loop does not run here: the reply arrives in the socket, then the deadline
        # passes.
        setup.router.set_limits(limits)
        well_past_s = asyncio.get_running_loop().time() + 0.1
        worker.reply(sequence)
        select.select([setup.router._fd], [], [], LIMIT_S)
        while asyncio.get_running_loop().time() < well_past_s:
            pass
        # The event loop may see either first. A change of the limits checks deadlines at once.
        if first == "the deadline":
            setup.router.set_limits(limits)
        assert await setup.client.reply_to("q") == (Outcome.OK, b"1")


async def test_query_that_a_dead_worker_had_is_answered_at_once() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        await setup.worker("neighbour")
        setup.client.ask("sent")
        await worker.receive()
        setup.client.ask("neighbour's", "neighbour")
        setup.router.drop(launch, "killed by SIGKILL")
        setup.router.drop(launch, "again")
        sent = setup.client.replies["sent"]
        assert sent == [Reply(Outcome.WORKER_UNAVAILABLE, b"killed by SIGKILL", "echo_server")]
        assert setup.client.submit("after") is None
        assert setup.client.replies["neighbour's"] == []
        assert setup.router.in_flight_at("neighbour") == 1


async def test_query_that_a_dead_worker_was_not_sent_waits_for_the_successor() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        setup.client.ask("sent")
        await worker.receive()
        setup.client.ask("not sent")
        setup.router.drop(launch, "killed by SIGKILL")
        assert setup.client.replies["not sent"] == []
        assert setup.router.in_flight_at("echo_server") == 1
        _, successor = await setup.worker(incarnation=2)
        queries = await successor.receive_queries()
        assert list(queries) == ["not sent"]
        successor.reply(*queries.values())
        assert await setup.client.reply_to("not sent") == (Outcome.OK, b"1")


async def test_returned_query_goes_to_another_worker_of_its_agent() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        _, other = await setup.worker("echo_server_2")
        setup.client.ask("q", alternatives=("echo_server_2",))
        queries = await worker.receive_queries()
        worker.send(Failed("the handler hangs"))
        worker.reply(*queries.values(), payload=b"", outcome=Outcome.GIVEN_BACK)
        moved = await other.receive_queries()
        assert list(moved) == ["q"]
        other.reply(*moved.values(), payload=b"2")
        await until(lambda: setup.client.replies["q"])
        assert setup.client.replies["q"] == [Reply(Outcome.OK, b"2", "echo_server_2")]


async def test_returned_query_waits_for_the_successor_without_an_alternative() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        await setup.worker("echo_server_2")
        setup.client.ask("q")
        queries = await worker.receive_queries()
        worker.send(Failed("the handler hangs"))
        worker.reply(*queries.values(), payload=b"", outcome=Outcome.GIVEN_BACK)
        await setup.until_read(worker)
        assert setup.client.replies["q"] == []
        _, successor = await setup.worker(incarnation=2)
        assert list(await successor.receive_queries()) == ["q"]


async def test_dropping_an_old_incarnation_does_not_affect_its_successor() -> None:
    async with running_router() as setup:
        first, _ = await setup.worker(incarnation=1)
        await setup.worker(incarnation=2)
        setup.router.drop(first, "died")
        assert setup.router.accepts("echo_server")


async def test_reply_callback_may_cancel_the_next_query_of_a_dead_worker() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        replied: list[str] = []
        second = 0

        def on_first(_: Reply) -> None:
            replied.append("first")
            setup.router.cancel(second)

        setup.router.submit("echo_server", "q", on_first)
        on_second = setup.router.submit("echo_server", "q", lambda _: replied.append("second"))
        second = on_second or 0
        await worker.receive()
        setup.router.drop(launch, "died")
        assert replied == ["first"]


async def test_cancelled_query_is_never_answered() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        setup.router.cancel(sequence)
        worker.reply(sequence)
        await setup.until_read(worker)
        assert setup.client.replies["q"] == []


async def test_worker_learns_once_that_a_query_is_cancelled() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequence = setup.client.ask("q")
        await worker.receive()
        setup.router.cancel(sequence)
        setup.router.cancel(sequence)
        assert await worker.receive() == Cancel([sequence])


async def test_cancelled_query_makes_room() -> None:
    async with running_router(max_in_flight=1) as setup:
        await setup.worker()
        sequence = setup.client.ask("q")
        setup.router.cancel(sequence)
        assert setup.router.in_flight_at("echo_server") == 0
        assert setup.client.submit("next") is not None


async def test_query_that_is_cancelled_before_it_is_sent_is_not_sent() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        first = setup.client.ask("a")
        second = setup.client.ask("b")
        setup.router.cancel(first)
        assert await worker.receive() == Queries([(second, "b")])
        assert await worker.receive() == Cancel([first])


async def query_unreachable_worker(setup: Setup) -> Reply:
    """Return the reply to the first query after the router knows of the worker's disconnect."""
    _, worker = await setup.worker()
    worker.socket.close()
    setup.client.ask("q0")
    number = 0

    def refused() -> bool:
        nonlocal number
        if setup.client.replies[f"q{number}"]:
            return True
        # It was sent before the router learned of the disconnect.
        number += 1
        setup.client.ask(f"q{number}")
        return False

    await until(refused)
    (reply,) = setup.client.replies[f"q{number}"]
    return reply


async def test_query_that_cannot_be_sent_is_refused() -> None:
    async with running_router() as setup:
        reply = await query_unreachable_worker(setup)
        assert reply.outcome is Outcome.WORKER_UNAVAILABLE


async def test_closed_router_refuses_the_queries_in_flight() -> None:
    async with running_router() as setup:
        await setup.worker()
        setup.client.ask("q")
    assert setup.client.outcomes("q") == [Outcome.WORKER_UNAVAILABLE]


# --- one message for each turn of the event loop, and the request to drain ---


async def test_queries_of_one_turn_of_the_loop_share_a_message() -> None:
    async with running_router() as setup:
        workers = {name: (await setup.worker(name))[1] for name in ("one", "two")}
        sent: dict[str, list[Any]] = {"one": [], "two": []}
        for number in range(100):
            for name, queries in sent.items():
                query = f"{name}-{number}"
                queries.append((setup.client.ask(query, name), query))
        for name, worker in workers.items():
            assert await worker.receive() == Queries(sent[name])
        later = setup.client.ask("later", "one")
        assert await workers["one"].receive() == Queries([(later, "later")])


async def test_each_reply_in_a_message_answers_its_query() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        sequences = [setup.client.ask(f"q{number}") for number in range(50)]
        await worker.receive()
        worker.reply(*sequences)
        for number in range(50):
            assert await setup.client.reply_to(f"q{number}") == (Outcome.OK, b"1")


async def test_worker_gets_its_queries_before_the_request_to_drain() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        sequence = setup.client.ask("q")
        assert setup.router.drain(launch)
        assert await worker.receive() == Queries([(sequence, "q")])
        assert await worker.receive() == Drain()
        worker.reply(sequence)
        assert await setup.client.reply_to("q") == (Outcome.OK, b"1")


async def test_draining_worker_gets_no_more_queries() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        setup.router.drain(launch)
        assert not setup.router.accepts("echo_server")
        assert setup.client.submit("too late") is None
        assert setup.client.outcomes("too late") == [Outcome.WORKER_UNAVAILABLE]


async def test_status_from_before_the_request_to_drain_does_not_accept_queries() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        setup.router.drain(launch)
        worker.report("ready")
        await setup.until_read(worker)
        assert not setup.router.accepts("echo_server")


async def test_draining_worker_is_not_asked_to_drain_again() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        sequence = setup.client.ask("q")
        assert setup.router.drain(launch)
        assert setup.router.drain(launch)
        assert await worker.receive() == Queries([(sequence, "q")])
        assert await worker.receive() == Drain()
        setup.router.cancel(sequence)
        assert await worker.receive() == Cancel([sequence])


async def test_worker_that_asks_to_drain_first_gets_its_queries() -> None:
    async with running_router() as setup:
        _, worker = await setup.worker()
        worker.send(DrainRequest(), DrainRequest())
        select.select([setup.router._fd], [], [], LIMIT_S)
        # In the turn of the event loop in which the router reads the request.
        sequence = setup.client.ask("q")
        assert await worker.receive() == Queries([(sequence, "q")])
        assert await worker.receive() == Drain()
        assert not setup.router.accepts("echo_server")


async def test_worker_without_a_key_cannot_be_drained() -> None:
    async with running_router() as setup:
        launch = setup.expect()
        assert not setup.router.drain(launch)


async def test_dropped_worker_cannot_be_drained() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        setup.router.drop(launch, "died")
        assert not setup.router.drain(launch)


# --- any sequence of events answers each query exactly once ---

steps = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "turn", "reply", "cancel", "drop", "drain"]),
        st.integers(0, 15),
    ),
    max_size=30,
)


@settings(max_examples=40)
@given(steps)
def test_each_query_ends_exactly_once_unless_it_is_cancelled(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with running_router(max_in_flight=6) as setup:
            incarnation = 1
            launch, worker = await setup.worker()
            sequences: dict[str, int | None] = {}
            cancelled: set[str] = set()
            for step, number in steps:
                query = f"q{number % max(len(sequences), 1)}"
                match step:
                    case "submit":
                        query = f"q{len(sequences)}"
                        sequences[query] = setup.client.submit(query)
                    case "turn":
                        await asyncio.sleep(0)
                    case "reply" if sequences.get(query):
                        worker.reply(sequences[query] or 0)
                        await asyncio.sleep(0)
                    case "cancel" if sequences.get(query) and not setup.client.replies[query]:
                        setup.router.cancel(sequences[query] or 0)
                        cancelled.add(query)
                    case "drop":
                        setup.router.drop(launch, "died")
                        incarnation += 1
                        launch, worker = await setup.worker(incarnation=incarnation)
                    case "drain":
                        setup.router.drain(launch)
        for query in sequences:
            assert len(setup.client.replies[query]) == (0 if query in cancelled else 1)
        assert setup.router.in_flight_at("echo_server") == 0

    anyio.run(main, backend_options={"use_uvloop": True})


# --- held queries, and how they end ---


async def test_held_query_ends_at_its_deadline() -> None:
    async with running_router(query_timeout_ms=50) as setup:
        launch, _ = await setup.worker()
        setup.client.ask("q")
        setup.router.drop(launch, "died")
        assert (await setup.client.reply_to("q"))[0] is Outcome.TIMED_OUT
        assert setup.router.in_flight_at("echo_server") == 0


async def test_held_query_can_be_cancelled() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        sequence = setup.client.ask("q")
        setup.router.drop(launch, "died")
        setup.router.cancel(sequence)
        assert setup.router.in_flight_at("echo_server") == 0
    assert setup.client.replies["q"] == []


async def test_queries_are_held_while_a_worker_hands_over_to_its_successor() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        standby, successor = await setup.standby()
        setup.client.ask("before")
        assert setup.router.drain(launch, hand_over=True)
        assert list(await worker.receive_queries()) == ["before"]
        assert await worker.receive() == Drain(True)
        setup.client.ask("held 1")
        setup.client.ask("held 2")
        worker.send(ipc.Handover(b"memory"))
        await until(lambda: setup.reports.handovers)
        setup.router.promote(standby, b"memory")
        assert await successor.receive() == ipc.Promote(b"memory")
        successor.report("connecting")
        assert list(await successor.receive_queries()) == ["held 1", "held 2"]


async def test_held_queries_have_the_limit_of_a_worker() -> None:
    async with running_router(max_in_flight=2) as setup:
        launch, _ = await setup.worker()
        await setup.standby()
        setup.client.ask("before")
        setup.router.drain(launch, hand_over=True)
        setup.client.ask("held 1")
        setup.client.ask("held 2")
        assert setup.client.submit("held 3") is None
        assert setup.client.outcomes("held 3") == [Outcome.WORKER_BUSY]


async def test_queries_are_held_until_the_promoted_successor_is_up() -> None:
    async with running_router() as setup:
        launch, worker = await setup.worker()
        standby, successor = await setup.standby()
        assert setup.router.drain(launch, hand_over=True)
        assert isinstance(await worker.receive(), Drain)
        setup.router.drop(launch, "it has exited")
        setup.router.promote(standby, None)
        setup.client.ask("between")
        assert setup.router.accepts("echo_server")
        assert setup.client.replies["between"] == []
        successor.report("connecting")
        assert isinstance(await successor.receive(), ipc.Promote)
        queries = await successor.receive_queries()
        successor.reply(*queries.values())
        assert await setup.client.reply_to("between") == (Outcome.OK, b"1")


async def test_no_query_is_held_for_a_successor_that_died() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        standby, _ = await setup.standby()
        setup.router.drain(launch, hand_over=True)
        setup.router.drop(launch, "it has exited")
        setup.router.promote(standby, None)
        setup.router.drop(standby, "it died")
        assert not setup.router.accepts("echo_server")
        setup.client.submit("too late")
        assert setup.client.outcomes("too late") == [Outcome.WORKER_UNAVAILABLE]


async def test_held_queries_are_refused_when_the_worker_will_not_be_up() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        setup.router.drain(launch, hand_over=True)
        setup.client.ask("held")
        assert setup.client.replies["held"] == []
        setup.router.refuse_held("echo_server")
        assert setup.client.outcomes("held") == [Outcome.WORKER_UNAVAILABLE]
        assert setup.router.in_flight_at("echo_server") == 0
        assert not setup.router.accepts("echo_server")


async def test_shutdown_refuses_sent_and_held_queries_exactly_once() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        setup.client.ask("at the worker")
        setup.router.drain(launch, hand_over=True)
        setup.client.ask("held")
        setup.router.refuse_all()
        setup.router.drop(launch, "it has exited")
        for query in ("at the worker", "held"):
            assert setup.client.outcomes(query) == [Outcome.WORKER_UNAVAILABLE]


# --- the messages of refused queries ---


@pytest.mark.message_text
async def test_message_for_a_worker_that_is_not_up() -> None:
    async with running_router() as setup:
        setup.client.submit("q", "unknown")
        assert setup.client.payloads("q") == [b"the worker is not up"]


@pytest.mark.message_text
async def test_message_for_refused_held_queries() -> None:
    async with running_router() as setup:
        launch, _ = await setup.worker()
        setup.router.drain(launch, hand_over=True)
        setup.client.ask("q")
        setup.router.refuse_held("echo_server")
        assert setup.client.payloads("q") == [b"the worker is not up"]


@pytest.mark.message_text
async def test_message_for_an_unreachable_worker() -> None:
    async with running_router() as setup:
        reply = await query_unreachable_worker(setup)
        assert reply.payload == b"the worker cannot be reached"


@pytest.mark.message_text
async def test_message_for_a_full_queue_of_a_worker_names_the_setting() -> None:
    async with running_router(max_in_flight=1) as setup:
        await setup.worker()
        setup.client.ask("a")
        setup.client.submit("b")
        assert setup.client.payloads("b") == [b"the worker's queue is full (max_in_flight)"]


@pytest.mark.message_text
async def test_message_for_a_full_queue_of_the_runner_names_the_setting() -> None:
    async with running_router(max_in_flight_total=1) as setup:
        await setup.worker()
        setup.client.ask("a")
        setup.client.submit("b")
        assert setup.client.payloads("b") == [b"the runner's queue is full (max_in_flight_total)"]


@pytest.mark.message_text
async def test_message_for_an_expired_query() -> None:
    async with running_router(query_timeout_ms=50) as setup:
        await setup.worker()
        setup.client.ask("q")
        _, payload = await setup.client.reply_to("q")
        assert payload == b"no answer before the deadline"


@pytest.mark.message_text
async def test_message_at_shutdown() -> None:
    async with running_router() as setup:
        await setup.worker()
        setup.client.ask("q")
        setup.router.refuse_all()
        assert setup.client.payloads("q") == [b"the runner is shutting down"]
