"""`runner.router`: a real ROUTER and real DEALERs in one process; every query is answered exactly once."""

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

from runner.lines import Ending, Reply
from runner.router import Router
from shared import ipc
from shared.config import Agent, WorkerSpec
from shared.handlers import HandlerRef
from shared.ipc import Cancel, Counters, Drain, DrainRequest, Failed, Hello, Launch, Outcome, Queries, Replies, Status
from shared.nodes import parse_node
from tests.logs import capture_logs

pytestmark = pytest.mark.anyio

LIMIT_S = 20.0
POLL_S = 0.001
KEY = b"k" * ipc.KEY_BYTES


async def until(reached: Callable[[], Any]) -> Any:
    """Wait for a condition; return what it came to."""
    with anyio.fail_after(LIMIT_S):
        while not (found := reached()):  # noqa: ASYNC110 - ZeroMQ and the router offer no event
            await anyio.sleep(POLL_S)
        return found


class Desk:
    """Who is told what the workers say of themselves."""

    def __init__(self) -> None:
        self.states: list[tuple[int, str]] = []
        self.failed: list[tuple[int, str]] = []
        self.legacies: list[tuple[int, bytes]] = []

    def on_status(self, incarnation: int, status: ipc.Status) -> None:
        self.states.append((incarnation, status.state))

    def on_failed(self, incarnation: int, reason: str) -> None:
        self.failed.append((incarnation, reason))

    def on_recycle(self, incarnation: int, reason: str) -> None:
        self.failed.append((incarnation, reason))

    def on_legacy(self, incarnation: int, memory: bytes) -> None:
        self.legacies.append((incarnation, memory))


class Peer:
    """A DEALER that speaks as a worker would, or as a worker must not."""

    def __init__(self, router: Router, routing_id: bytes) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, routing_id)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(router.endpoint)

    def say(self, *messages: ipc.WorkerMessage | bytes) -> None:
        for message in messages:
            self.socket.send(message if isinstance(message, bytes) else ipc.encode(message))

    def up(self, key: bytes = KEY, state: Any = "ready") -> None:
        self.say(Hello(key, 1), Status(state, "", Counters()))

    def reply(self, *sequences: int, payload: bytes = b"1", outcome: Outcome = Outcome.OK) -> None:
        self.say(Replies([(sequence, int(outcome), payload) for sequence in sequences]))

    def _receive(self) -> bytes | None:
        try:
            return self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    async def hear(self) -> ipc.RunnerMessage:
        return ipc.decode_runner_message(await until(self._receive))


class Asked:
    """The queries of a test, and every reply that came for them."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.replies: dict[str, list[Reply]] = {}

    def ask(self, query: str, worker: str = "echo_server") -> int | None:
        self.replies[query] = []
        return self.router.submit(worker, query, self.replies[query].append)

    def came(self, query: str) -> list[tuple[Ending, bytes]]:
        return [(reply.ending, reply.payload) for reply in self.replies[query]]

    async def end(self, query: str) -> tuple[Ending, bytes]:
        await until(lambda: self.replies[query])
        (end,) = self.came(query)
        return end


class Place:
    """A router, its listener, and the workers that it expects."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.desk = Desk()
        self.asked = Asked(router)
        self.peers: list[Peer] = []

    def expect(self, name: str = "echo_server", incarnation: int = 1, *, standby: bool = False) -> Launch:
        agent = Agent(
            name="echo", handler=HandlerRef("worker.echo", None, "handle", Path("/")), nodes=(parse_node("h"),)
        )
        spec = WorkerSpec(name=name, agent=agent, node=agent.nodes[0], index=1)
        launch = Launch(spec=spec, incarnation=incarnation, endpoint=self.router.endpoint, key=KEY, standby=standby)
        self.router.expect(launch, self.desk)
        return launch

    def peer(self, routing_id: bytes) -> Peer:
        self.peers.append(Peer(self.router, routing_id))
        return self.peers[-1]

    async def worker(self, name: str = "echo_server", incarnation: int = 1) -> tuple[Launch, Peer]:
        """Return a worker that is up."""
        launch = self.expect(name, incarnation)
        peer = self.peer(launch.routing_id)
        peer.up()
        await until(lambda: self.router.accepts(name))
        return launch, peer


@contextmanager
def closed_afterwards(place: Place) -> Iterator[Place]:
    try:
        yield place
    finally:
        place.router.close()
        for peer in place.peers:
            peer.socket.close()


@asynccontextmanager
async def routing(**options: Any) -> AsyncIterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        router = Router(Path(folder) / "router.sock", **options)
        router.open()
        with closed_afterwards(Place(router)) as place:
            yield place


# --- who is heard ---


async def test_query_reaches_its_worker_and_the_reply_comes_back() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("é?")
        assert await peer.hear() == Queries([(sequence, "é?")])
        peer.reply(sequence, payload=b'{"a":1}')
        await until(lambda: place.asked.replies["é?"])
        assert place.asked.replies["é?"] == [Reply(Ending.OK, b'{"a":1}', "echo_server")]
        assert place.router.in_flight == 0


async def test_failed_handler_is_told_apart_from_an_answer() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        await peer.hear()
        peer.reply(sequence, payload=b"ValueError: x", outcome=Outcome.HANDLER_FAILED)
        assert await place.asked.end("q") == (Ending.HANDLER_FAILED, b"ValueError: x")


@pytest.mark.parametrize("hello", [[], [Hello(b"", 1)], [Hello(b"x" * ipc.KEY_BYTES, 1)], [Hello(KEY[:-1], 1)]])
async def test_peer_without_the_right_key_is_not_heard(hello: list[ipc.WorkerMessage]) -> None:
    async with routing() as place:
        launch = place.expect()
        peer = place.peer(launch.routing_id)
        with capture_logs() as logs:
            peer.say(*hello, Status("ready", "", Counters()), Failed("x"), DrainRequest())
            await until(lambda: logs)
            assert logs[0]["reason"] == "no_key"
            assert not place.router.accepts("echo_server")
            assert not place.router.drain(launch), "it cannot be told"
            peer.up()  # the same peer, with the right key: what came before is read by now
            await until(lambda: place.router.accepts("echo_server"))
        assert (place.desk.states, place.desk.failed) == ([(1, "ready")], [])


async def test_peer_that_nobody_expects_is_not_heard() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        await peer.hear()
        with capture_logs() as logs:
            stranger = place.peer(b"echo_server#2")
            stranger.up()
            stranger.reply(sequence, payload=b'"forged"')
            await until(lambda: logs)
        assert logs[0]["reason"] == "unknown_peer"
        peer.reply(sequence, payload=b'"true"')
        assert await place.asked.end("q") == (Ending.OK, b'"true"')


@pytest.mark.parametrize(
    "message", [b"", b"\xff", b"garbage", b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff", b"\x92\x05\xa1\xff"]
)
async def test_message_that_is_none_is_ignored_and_the_worker_goes_on(message: bytes) -> None:
    async with routing() as place:
        _, peer = await place.worker()
        with capture_logs() as logs:
            peer.say(message)
            await until(lambda: logs)
        assert logs[0]["reason"] == "undecodable"
        sequence = place.asked.ask("q")
        await peer.hear()
        peer.reply(sequence)
        assert (await place.asked.end("q"))[0] is Ending.OK


async def test_message_in_several_parts_is_ignored() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        with capture_logs() as logs:
            peer.socket.send_multipart([ipc.encode(Status("draining", "", Counters())), b"more"])
            await until(lambda: logs)
        assert place.router.accepts("echo_server")


async def test_endless_nonsense_is_logged_once() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        with capture_logs() as logs:
            for _ in range(500):
                peer.say(b"\xff")
            sequence = place.asked.ask("q")
            await peer.hear()
            peer.reply(sequence)
            await place.asked.end("q")
        assert len(logs) == 1


async def test_reply_of_an_old_incarnation_is_not_taken_for_one_of_its_successor() -> None:
    async with routing() as place:
        first, old = await place.worker(incarnation=1)
        place.asked.ask("before")
        await old.hear()
        place.router.drop(first, "it died")
        _, new = await place.worker(incarnation=2)
        sequence = place.asked.ask("after")
        assert sequence is not None
        await new.hear()
        with capture_logs() as logs:
            old.reply(*range(1, sequence + 1), payload=b'"old"')
            await until(lambda: logs)
        new.reply(sequence, payload=b'"new"')
        assert await place.asked.end("after") == (Ending.OK, b'"new"')
        assert place.asked.came("before") == [(Ending.WORKER_GONE, b"it died")]


async def test_reply_to_another_workers_query_is_ignored() -> None:
    async with routing() as place:
        _, asked = await place.worker("one")
        _, other = await place.worker("two")
        sequence = place.asked.ask("q", "one")
        assert sequence is not None
        await asked.hear()
        other.reply(sequence, payload=b'"forged"')
        other.say(Failed("the mark that the reply was read"))
        await until(lambda: place.desk.failed)
        assert place.asked.came("q") == []
        asked.reply(sequence)
        assert (await place.asked.end("q"))[0] is Ending.OK


async def test_second_reply_to_a_query_is_ignored() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        await peer.hear()
        peer.reply(sequence, sequence, payload=b"1")
        peer.reply(sequence, 12345, payload=b"2")
        peer.say(ipc.RecycleRequest("the mark"))
        await until(lambda: place.desk.failed)
        assert place.asked.came("q") == [(Ending.OK, b"1")]


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
async def test_worker_takes_queries_in_every_state_in_which_it_is_up(state: Any, accepts: bool) -> None:
    async with routing() as place:
        launch = place.expect(incarnation=4)
        place.peer(launch.routing_id).up(state=state)
        await until(lambda: place.desk.states)
        assert place.desk.states == [(4, state)]
        assert place.router.accepts("echo_server") is accepts
        place.asked.ask("q")
        assert place.asked.came("q") == ([] if accepts else [(Ending.WORKER_GONE, b"the worker is not up")])


async def test_reason_why_a_worker_cannot_start_is_passed_on() -> None:
    async with routing() as place:
        launch = place.expect(incarnation=3)
        place.peer(launch.routing_id).say(Hello(KEY, 1), Failed("no handler"))
        await until(lambda: place.desk.failed)
        assert place.desk.failed == [(3, "no handler")]


# --- how queries end ---


async def test_query_for_a_worker_that_is_not_there_is_refused_at_once() -> None:
    async with routing() as place:
        place.expect()
        for worker in ("echo_server", "nobody"):
            assert place.asked.ask("q", worker) is None
            assert place.asked.came("q") == [(Ending.WORKER_GONE, b"the worker is not up")]
        assert place.router.in_flight == 0


async def test_worker_that_has_just_said_that_it_is_up_is_heard_before_a_query_is_refused() -> None:
    async with routing() as place:
        peer = place.peer(place.expect().routing_id)
        peer.up()
        assert not place.router.accepts("echo_server")
        for _ in range(50):  # it is on its way; the loop, which would tell, does not run meanwhile
            place.router._socket.poll(100)
            if (sequence := place.asked.ask("q")) is not None:
                break
        assert await peer.hear() == Queries([(sequence, "q")])


async def test_query_past_the_limit_is_refused_at_once_until_one_before_it_ends() -> None:
    async with routing(max_in_flight=2) as place:
        _, peer = await place.worker("one")
        await place.worker("two")
        first = place.asked.ask("a", "one")
        assert first is not None
        place.asked.ask("b", "one")
        assert place.asked.ask("c", "one") is None
        assert place.asked.came("c") == [(Ending.REFUSED, b"the worker has too many queries before it")]
        assert place.asked.ask("neighbour's", "two") is not None
        await peer.hear()
        peer.reply(first)
        await place.asked.end("a")
        assert place.asked.ask("d", "one") is not None
        assert place.asked.ask("e", "one") is None


async def test_query_without_a_reply_ends_at_its_deadline_and_frees_its_place() -> None:
    async with routing(query_timeout_s=0.2, max_in_flight=1) as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        assert await peer.hear() == Queries([(sequence, "q")])
        assert await place.asked.end("q") == (Ending.TIMED_OUT, b"no answer before the deadline")
        assert await peer.hear() == Cancel([sequence]), "the worker need not begin it"
        assert place.router.in_flight == 0
        peer.reply(sequence)
        peer.say(ipc.RecycleRequest("the mark"))
        await until(lambda: place.desk.failed)
        assert place.asked.came("q") == [(Ending.TIMED_OUT, b"no answer before the deadline")]
        assert place.asked.ask("next") is not None


async def test_each_query_has_a_deadline_of_its_own() -> None:
    async with routing(query_timeout_s=0.05) as place:
        await place.worker("one")
        await place.worker("two")
        place.asked.ask("a", "one")
        assert await place.asked.end("a") == (Ending.TIMED_OUT, b"no answer before the deadline")
        place.asked.ask("b", "one")
        place.asked.ask("c", "two")
        await place.asked.end("b")
        await place.asked.end("c")
        place.asked.ask("d", "two")
        assert (await place.asked.end("d"))[0] is Ending.TIMED_OUT


@pytest.mark.parametrize("first", ["the socket", "the deadline"])
async def test_late_runner_does_not_take_replies_that_came_in_time_for_missing(first: str) -> None:
    async with routing(query_timeout_s=0.3) as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        well_past = asyncio.get_running_loop().time() + 0.35
        await peer.hear()
        # From here the loop does not turn: the reply arrives in the socket, then the deadline passes.
        peer.reply(sequence)
        select.select([place.router._fd], [], [], LIMIT_S)
        while asyncio.get_running_loop().time() < well_past:
            pass
        if first == "the deadline":  # which of the two a loop sees first is its own affair
            place.router._expire()
        assert await place.asked.end("q") == (Ending.OK, b"1")


async def test_dead_workers_queries_are_answered_at_once_and_those_that_never_left_wait_for_its_successor() -> None:
    async with routing() as place:
        launch, peer = await place.worker()
        await place.worker("neighbour")
        place.asked.ask("left")
        await peer.hear()
        place.asked.ask("waits in the outbox")
        place.asked.ask("neighbour's", "neighbour")
        place.router.drop(launch, "killed by SIGKILL")
        assert place.asked.came("left") == [(Ending.WORKER_GONE, b"killed by SIGKILL")]
        place.router.drop(launch, "again")
        assert place.asked.ask("after") is None
        assert place.router.in_flight == 2
        assert place.asked.came("neighbour's") == []
        assert place.asked.came("waits in the outbox") == []
        _, successor = await place.worker(incarnation=2)
        message = await successor.hear()
        assert isinstance(message, Queries)
        assert [query for _, query in message.items] == ["waits in the outbox"]
        successor.reply(message.items[0][0])
        assert await place.asked.end("waits in the outbox") == (Ending.OK, b"1")


async def test_query_that_comes_back_unhandled_goes_to_another_worker_of_its_agent_or_waits_for_the_next() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        _, other = await place.worker("echo_server_2")
        replies: dict[str, list[Reply]] = {"anyone": [], "by name": []}
        place.router.submit("echo_server", "anyone", replies["anyone"].append, ("echo_server_2",))
        place.router.submit("echo_server", "by name", replies["by name"].append)
        message = await peer.hear()
        assert isinstance(message, Queries)
        peer.say(Failed("the handler hangs"))
        peer.reply(*(sequence for sequence, _ in message.items), payload=b"", outcome=Outcome.RETURNED)
        moved = await other.hear()
        assert isinstance(moved, Queries)
        assert [query for _, query in moved.items] == ["anyone"]
        other.reply(moved.items[0][0], payload=b"2")
        await until(lambda: replies["anyone"])
        assert replies == {"anyone": [Reply(Ending.OK, b"2", "echo_server_2")], "by name": []}
        _, successor = await place.worker(incarnation=2)
        held = await successor.hear()
        assert isinstance(held, Queries)
        assert [query for _, query in held.items] == ["by name"]


async def test_held_query_ends_at_its_deadline_and_can_be_withdrawn() -> None:
    async with routing(query_timeout_s=0.05) as place:
        launch, _ = await place.worker()
        place.asked.ask("q")
        sequence = place.asked.ask("withdrawn")
        place.router.drop(launch, "died")
        assert sequence is not None
        place.router.withdraw(sequence)
        assert (await place.asked.end("q"))[0] is Ending.TIMED_OUT
        assert place.router.in_flight == 0
        assert place.asked.came("withdrawn") == []


async def test_queries_are_held_while_a_worker_hands_over_to_its_successor() -> None:
    async with routing(max_in_flight=2) as place:
        launch, peer = await place.worker()
        standby = place.expect(incarnation=2, standby=True)
        successor = place.peer(standby.routing_id)
        successor.up(state="standby")
        place.asked.ask("before")
        assert place.router.drain(launch, hand_over=True)
        assert isinstance(await peer.hear(), Queries)
        assert await peer.hear() == Drain(True)
        for query in ("held 1", "held 2"):
            assert place.asked.ask(query) is not None
        assert place.asked.ask("one too many") is None
        peer.say(ipc.Legacy(b"memory"))
        await until(lambda: place.desk.legacies)
        place.router.promote(standby, b"memory")
        assert await successor.hear() == ipc.Go(b"memory")
        successor.say(Status("connecting", "", Counters()))
        message = await successor.hear()
        assert isinstance(message, Queries)
        assert [query for _, query in message.items] == ["held 1", "held 2"]


async def test_total_in_flight_is_bounded() -> None:
    async with routing(max_in_flight_total=3) as place:
        await place.worker()
        await place.worker("other")
        assert [place.asked.ask(str(n), "echo_server" if n % 2 else "other") is None for n in range(5)] == [
            False, False, False, True, True,
        ]  # fmt: skip
        assert place.asked.came("4")[0][0] is Ending.REFUSED


async def test_dropping_an_old_incarnation_leaves_its_successor_alone() -> None:
    async with routing() as place:
        first, _ = await place.worker(incarnation=1)
        await place.worker(incarnation=2)
        place.router.drop(first, "died")
        assert place.router.accepts("echo_server")


async def test_reply_callback_may_withdraw_a_neighbour_that_is_about_to_end() -> None:
    async with routing() as place:
        launch, peer = await place.worker()
        seen: list[str] = []
        second = 0

        def first_ends(_: Reply) -> None:
            seen.append("first")
            place.router.withdraw(second)

        place.router.submit("echo_server", "q", first_ends)
        second = place.router.submit("echo_server", "q", lambda _: seen.append("second")) or 0
        await peer.hear()
        place.router.drop(launch, "died")
        assert seen == ["first"]


async def test_withdrawn_query_is_never_answered_and_the_worker_may_skip_it() -> None:
    async with routing(max_in_flight=1) as place:
        _, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        await peer.hear()
        place.router.withdraw(sequence)
        place.router.withdraw(sequence)
        assert place.router.in_flight == 0
        assert await peer.hear() == Cancel([sequence])
        peer.reply(sequence)
        peer.say(ipc.RecycleRequest("the mark"))
        await until(lambda: place.desk.failed)
        assert place.asked.came("q") == []
        assert place.asked.ask("next") is not None


async def test_query_withdrawn_before_it_left_does_not_leave() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        first, second = place.asked.ask("a"), place.asked.ask("b")
        assert first is not None
        assert second is not None
        place.router.withdraw(first)
        assert await peer.hear() == Queries([(second, "b")])
        assert await peer.hear() == Cancel([first])


async def test_worker_that_cannot_be_reached_is_an_error_to_the_caller() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        peer.socket.close()
        place.asked.ask("q0")
        number = 0

        def refused() -> bool:
            nonlocal number
            if place.asked.came(f"q{number}"):
                return True
            number += 1  # it left before the ROUTER saw the end of its peer
            place.asked.ask(f"q{number}")
            return False

        await until(refused)
        assert place.asked.came(f"q{number}") == [(Ending.WORKER_GONE, b"the worker cannot be reached")]


async def test_closed_router_answers_what_still_waits() -> None:
    async with routing() as place:
        await place.worker()
        place.asked.ask("q")
    assert place.asked.came("q") == [(Ending.WORKER_GONE, b"the runner is shutting down")]


# --- one message a loop turn, and the mark at its end ---


async def test_queries_of_one_loop_turn_leave_as_one_message_for_each_worker() -> None:
    async with routing() as place:
        peers = {name: (await place.worker(name))[1] for name in ("one", "two")}
        sent: dict[str, list[Any]] = {"one": [], "two": []}
        for number in range(100):
            for name in sent:
                sent[name].append((place.asked.ask(f"{name}-{number}", name), f"{name}-{number}"))
        for name, peer in peers.items():
            assert await peer.hear() == Queries(sent[name])
        later = place.asked.ask("later", "one")
        assert await peers["one"].hear() == Queries([(later, "later")])


async def test_replies_of_one_message_end_their_queries_each() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        sequences = [place.asked.ask(f"q{number}") for number in range(50)]
        await peer.hear()
        peer.reply(*[sequence for sequence in sequences if sequence is not None])
        for number in range(50):
            assert await place.asked.end(f"q{number}") == (Ending.OK, b"1")


async def test_drain_comes_after_the_queries_before_it_and_no_query_after_it() -> None:
    async with routing() as place:
        launch, peer = await place.worker()
        sequence = place.asked.ask("q")
        assert sequence is not None
        assert place.router.drain(launch)
        assert place.router.drain(launch), "told already"
        assert not place.router.accepts("echo_server")
        assert place.asked.ask("too late") is None
        assert place.asked.came("too late") == [(Ending.WORKER_GONE, b"the worker is not up")]
        assert await peer.hear() == Queries([(sequence, "q")])
        assert await peer.hear() == Drain()
        peer.say(Status("ready", "", Counters()))  # sent before it had read the mark
        peer.reply(sequence)
        assert await place.asked.end("q") == (Ending.OK, b"1")
        assert not place.router.accepts("echo_server")
        place.router.withdraw(sequence)
        assert peer._receive() is None, "one mark is enough"


async def test_worker_that_asks_to_leave_gets_the_mark_after_its_queries() -> None:
    async with routing() as place:
        _, peer = await place.worker()
        peer.say(DrainRequest(), DrainRequest())
        select.select([place.router._fd], [], [], LIMIT_S)
        sequence = place.asked.ask("q")  # in the turn in which the request is read
        assert await peer.hear() == Queries([(sequence, "q")])
        assert await peer.hear() == Drain()
        assert not place.router.accepts("echo_server")


async def test_worker_that_is_not_known_cannot_be_told_to_drain() -> None:
    async with routing() as place:
        launch = place.expect()
        assert not place.router.drain(launch), "it has not said hello"
        place.router.drop(launch, "died")
        assert not place.router.drain(launch)


# --- whatever happens, exactly once ---

steps = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "turn", "reply", "withdraw", "drop", "drain"]),
        st.integers(0, 15),
    ),
    max_size=30,
)


@settings(max_examples=40)
@given(steps)
def test_each_query_ends_exactly_once_unless_it_is_withdrawn(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with routing(max_in_flight=6) as place:
            incarnation = 1
            launch, peer = await place.worker()
            sequences: dict[str, int | None] = {}
            withdrawn: set[str] = set()
            for step, number in steps:
                query = f"q{number % max(len(sequences), 1)}"
                match step:
                    case "submit":
                        query = f"q{len(sequences)}"
                        sequences[query] = place.asked.ask(query)
                    case "turn":
                        await asyncio.sleep(0)
                    case "reply" if sequences.get(query):
                        peer.reply(sequences[query] or 0)
                        await asyncio.sleep(0)
                    case "withdraw" if sequences.get(query) and not place.asked.came(query):
                        place.router.withdraw(sequences[query] or 0)
                        withdrawn.add(query)
                    case "drop":
                        place.router.drop(launch, "died")
                        incarnation += 1
                        launch, peer = await place.worker(incarnation=incarnation)
                    case "drain":
                        place.router.drain(launch)
        for query in sequences:
            assert len(place.asked.came(query)) == (0 if query in withdrawn else 1)
        assert place.router.in_flight == 0

    anyio.run(main, backend_options={"use_uvloop": True})


# --- held queries and their end ---


async def test_queries_are_held_until_the_successor_takes_them_and_not_only_until_it_is_named() -> None:
    async with routing() as place:
        launch, peer = await place.worker()
        standby = place.expect(incarnation=2, standby=True)
        successor = place.peer(standby.routing_id)
        successor.up(state="standby")
        await until(lambda: (2, "standby") in place.desk.states)
        assert place.router.drain(launch, hand_over=True)
        assert isinstance(await peer.hear(), Drain)
        place.router.drop(launch, "it has left")
        place.router.promote(standby, None)
        place.asked.ask("between")
        assert place.router.accepts("echo_server")
        assert place.asked.came("between") == [], "it is held, not refused"
        successor.say(Status("connecting", "", Counters()))
        assert isinstance(await successor.hear(), ipc.Go)
        message = await successor.hear()
        assert isinstance(message, Queries)
        successor.reply(*(sequence for sequence, _ in message.items))
        assert await place.asked.end("between") == (Ending.OK, b"1")


async def test_successor_that_dies_before_it_takes_queries_has_nothing_more_held_for_it() -> None:
    async with routing() as place:
        launch, _ = await place.worker()
        standby = place.expect(incarnation=2, standby=True)
        place.peer(standby.routing_id).up(state="standby")
        await until(lambda: (2, "standby") in place.desk.states)
        place.router.drain(launch, hand_over=True)
        place.router.drop(launch, "it has left")
        place.router.promote(standby, None)
        place.router.drop(standby, "it died")
        assert not place.router.accepts("echo_server")
        place.asked.ask("too late")
        assert place.asked.came("too late") == [(Ending.WORKER_GONE, b"the worker is not up")]


async def test_held_queries_of_a_worker_that_does_not_come_back_are_refused_at_once() -> None:
    async with routing() as place:
        launch, _ = await place.worker()
        place.router.drain(launch, hand_over=True)
        place.asked.ask("held")
        assert place.asked.came("held") == []
        place.router.retire("echo_server")
        assert place.asked.came("held") == [(Ending.WORKER_GONE, b"the worker is not up")]
        assert place.router.in_flight == 0
        assert not place.router.accepts("echo_server")


async def test_whatever_waits_when_the_runner_ends_is_refused_exactly_once() -> None:
    async with routing() as place:
        launch, _ = await place.worker()
        place.asked.ask("at the worker")
        place.router.drain(launch, hand_over=True)
        place.asked.ask("held")
        place.router.refuse_all()
        place.router.drop(launch, "it has left")
        for query in ("at the worker", "held"):
            assert place.asked.came(query) == [(Ending.WORKER_GONE, b"the runner is shutting down")]
