"""`worker.states`: the last line about a worker's state is never wrong for long, and no node floods the log."""

from __future__ import annotations

from typing import Any

from worker.states import SETTLED_S, StateLog


class Told:
    """A logger that keeps what it is told, and a clock."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.now_s = 1000.0

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append((event, fields)) if level != "debug" else None

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


def state_log() -> tuple[StateLog, Told]:
    told = Told()
    return StateLog(told, clock=lambda: told.now_s), told  # type: ignore[arg-type]


def test_each_change_is_one_line() -> None:
    states, told = state_log()
    for state, detail in (("connecting", ""), ("ready", ""), ("backoff", "gone"), ("draining", ""), ("stopped", "")):
        states.note(state, detail)  # type: ignore[arg-type]
    assert told.events == ["ready", "backoff", "draining", "stopped"]
    assert told.lines[1][1] == {"reason": "gone"}


def test_worker_that_is_back_within_a_minute_is_said_to_be() -> None:
    states, told = state_log()
    states.note("ready", "")
    states.note("backoff", "cannot connect: refused")
    told.now_s += 3
    states.note("ready", "")
    states.catch_up()
    assert told.events == ["ready", "backoff"], "it may flap"
    told.now_s += SETTLED_S
    states.catch_up()
    states.catch_up()
    assert told.events == ["ready", "backoff", "ready"]


def test_node_that_is_away_again_is_said_to_be() -> None:
    states, told = state_log()
    for _ in range(2):
        states.note("backoff", "gone")
        states.note("ready", "")
    states.note("backoff", "gone")
    told.now_s += SETTLED_S
    states.catch_up()
    assert told.lines[-1] == ("backoff", {"reason": "gone"})


def test_connection_that_flaps_is_told_of_in_few_lines_with_how_often() -> None:
    states, told = state_log()
    for number in range(500):
        states.note("backoff", f"gone: {number}")
        told.now_s += 0.1
        states.note("ready", "")
        states.catch_up()
    assert told.events == ["backoff", "ready"]
    told.now_s += 60
    states.catch_up()
    repeated = {fields["state"]: fields["more"] for event, fields in told.lines if event == "state_repeated"}
    assert repeated == {"backoff gone": 499, "ready": 499}
