"""`benchmarks`: a load generator that accepted wrong answers would make the figures worthless."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from benchmarks import targets
from benchmarks.load_node import LoadNode, Workload, WrongAnswer
from benchmarks.measure import Figure, Results, interleave, quantile
from benchmarks.raw_http import parse

Answer = Callable[[ClientConnection, dict[str, Any], int], None]


def right(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    ws.send(json.dumps({"action": "result", "id": query["id"], "data": query["body"]}))


def twice(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    right(ws, query, number)
    if number == 50:
        right(ws, query, number)


def unknown_id(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    right(ws, query | {"id": "99999999"} if number == 50 else query, number)


def wrong(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    right(ws, query | {"body": "another"} if number >= 250 else query, number)


def never(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    if number != 50:
        right(ws, query, number)


def disconnect(ws: ClientConnection, query: dict[str, Any], number: int) -> None:
    if number == 50:
        ws.close()
    else:
        right(ws, query, number)


@contextmanager
def agent(address: str, answer: Answer) -> Iterator[None]:
    def serve() -> None:
        with (
            contextlib.suppress(ConnectionClosed, OSError),
            connect(f"ws://{address}/ws", proxy=None) as ws,
        ):
            ws.send('{"action":"register","name":"a"}')
            ws.send('{"action":"agent_hello","capabilities":[]}')
            number = 0
            for text in ws:
                query = json.loads(text)
                if query["action"] == "query":
                    number += 1
                    answer(ws, query, number)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("size", [40, 1000, 70_000])
def test_load_node_counts_answers_of_any_size(size: int) -> None:
    body = "x" * size
    with contextlib.ExitStack() as stack:
        node = LoadNode()
        stack.enter_context(agent(node.addresses[0], right))
        stack.enter_context(node)
        node.wait_registered()
        node.blast_count(Workload(body, lambda data: data == body), 8, 300, 60)
        found = node.blast(Workload(body, lambda data: data == body), 8, 0.5, 0.0)
        assert found.answers > 0
        assert node.peers[0].in_flight == 0


@pytest.mark.parametrize("answer", [twice, unknown_id, wrong, never, disconnect])
def test_load_node_rejects_a_wrong_answer(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.load_node.TIMEOUT_S", 0.5)
    with contextlib.ExitStack() as stack:
        node = LoadNode()
        stack.enter_context(agent(node.addresses[0], answer))
        stack.enter_context(node)
        node.wait_registered()
        with pytest.raises(WrongAnswer):
            node.blast_count(Workload("x", lambda data: data == "x"), 8, 600, 2)


def test_systems_take_turns_and_keep_the_order_of_their_runs() -> None:
    turns: list[str] = []

    def once(name: str) -> dict[str, float]:
        turns.append(name)
        return {"rate": float(len(turns))}

    found = interleave({"a": lambda: once("a"), "b": lambda: once("b")}, 3, lambda line: None)
    assert turns == ["a", "b"] * 3
    assert found == {"a": {"rate": [1, 3, 5]}, "b": {"rate": [2, 4, 6]}}


def figure(system: str, *runs: float) -> Figure:
    return Figure(suite="ws", name="W=64, 40 B", system=system, unit="queries/s", runs=list(runs))


RESULTS = Results(
    date="",
    machine={},
    versions={},
    figures=[figure("em-runner, async", 90, 100, 400), figure("SDK technique", 19, 20, 21)],
)


def test_targets_compare_medians_of_one_run() -> None:
    table = targets.table(RESULTS)
    assert "| WebSocket, W=64, async echo / the SDK's technique | 5 x | 8 x | 5 x | met |" in table


def test_target_without_a_figure_is_shown_as_not_measured() -> None:
    assert targets.table(RESULTS).count("not measured") == len(targets.TARGETS) - 1


@pytest.mark.parametrize(
    ("found", "verdict"), [(8.0, "goal reached"), (7.9, "met"), (5.0, "met"), (4.9, "MISSED")]
)
def test_verdict_compares_a_figure_with_goal_and_minimum(found: float, verdict: str) -> None:
    assert targets.TARGETS[0].verdict(found) == verdict


def test_table_of_medians_has_the_lowest_and_highest_run() -> None:
    line = "| ws | W=64, 40 B | em-runner, async | 100 queries/s | 90 | 400 |"
    assert line in targets.medians(RESULTS)


def test_readme_shows_the_measured_results() -> None:
    root = Path(__file__).parents[2]
    results = msgspec.json.decode(
        (root / "benchmarks" / "results" / "results.json").read_bytes(), type=Results
    )
    table = targets.table(results)
    assert table in (root / "benchmarks" / "README.md").read_text()
    assert table in (root / "benchmarks" / "results" / "results.md").read_text()
    assert "not measured" not in table
    assert all(len(figure.runs) >= 5 for figure in results.figures if figure.suite != "endurance")


def test_quantile_is_one_of_the_values() -> None:
    assert quantile([5, 1, 3], 0.5) == 3
    assert quantile(list(range(1, 101)), 0.99) in (99, 100)


def test_http_answer_is_parsed_only_when_complete() -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    answer = parse(whole + b"HTTP/1.1")
    assert answer is not None
    assert (answer.status, answer.body, answer.size) == (200, b"ok", len(whole))
    assert parse(whole[:-1]) is None
    with pytest.raises(ValueError, match="content-length"):
        parse(b"HTTP/1.1 200 OK\r\n\r\n")
