"""`worker.state_log`: the last logged state is soon the real one, and no node floods the log."""

from __future__ import annotations

from typing import Any

from shared.logs.logger import report_suppressed
from tests.logs import capture_logs
from worker.node.losses import Loss, LossKind
from worker.state_log import SETTLED_S, StateLog

CUT = Loss(LossKind.CUT, "lost")


class FakeLog:
    """A logger that records its lines, and a clock. Lines at debug level are not recorded."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.now_s = 1000.0

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: (
            self.lines.append((event, fields)) if level != "debug" else None
        )

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


def state_log() -> tuple[StateLog, FakeLog]:
    log = FakeLog()
    return StateLog(log, clock=lambda: log.now_s), log  # type: ignore[arg-type]


def test_each_change_is_one_line() -> None:
    states, log = state_log()
    states.record("connecting", None)
    states.record("ready", None)
    states.record("backoff", CUT)
    states.record("draining", None)
    states.record("stopped", None)
    assert log.events == ["ready", "backoff", "draining", "stopped"]
    assert log.lines[1][1] == {"kind": "cut", "reason": "lost"}


def test_return_within_a_minute_is_logged_once_it_lasts() -> None:
    states, log = state_log()
    states.record("ready", None)
    states.record("backoff", Loss(LossKind.CONNECT_FAILED, "cannot connect: refused"))
    log.now_s += 3
    states.record("ready", None)
    states.log_if_settled()
    assert log.events == ["ready", "backoff"], "it may flap"
    log.now_s += SETTLED_S
    states.log_if_settled()
    states.log_if_settled()
    assert log.events == ["ready", "backoff", "ready"]


def test_repeated_loss_is_logged_once_it_lasts() -> None:
    states, log = state_log()
    for _ in range(2):
        states.record("backoff", CUT)
        states.record("ready", None)
    states.record("backoff", CUT)
    log.now_s += SETTLED_S
    states.log_if_settled()
    assert log.lines[-1] == ("backoff", {"kind": "cut", "reason": "lost"})


def test_flapping_connection_is_logged_in_few_lines_with_a_count() -> None:
    with capture_logs() as lines:
        states, log = state_log()
        for number in range(500):
            states.record("backoff", Loss(LossKind.CUT, f"the node's text {number}"))
            log.now_s += 0.1
            states.record("ready", None)
            states.log_if_settled()
        assert log.events == ["backoff", "ready"]
        log.now_s += 60
        report_suppressed()
    repeated = {(line["what"], line["like"], line["suppressed"]) for line in lines}
    assert repeated == {("backoff", "cut", 499), ("ready", "", 499)}
