"""`runner.supervision.probes`: processes that load a handler leave nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.supervision.fork_server import ForkServer
from runner.supervision.probes import Probes
from shared.config.handlers import HandlerRef
from shared.errors import ConfigError


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "source",
    ["def handle(body, memory): return body, memory", "raise ValueError", "import os; os._exit(3)"],
    ids=["good", "broken", "ends its process"],
)
def test_process_that_loaded_a_handler_leaves_nothing_open(source: str, tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(source)
    ref = HandlerRef(None, tmp_path / "h.py", "handle", tmp_path)
    server = ForkServer()
    server.start()
    probes = Probes(server)

    def load_once() -> None:
        try:
            probes.probe(ref)
        except ConfigError:
            assert not source.startswith("def")

    load_once()
    before = open_files()
    for _ in range(4):
        load_once()
    assert open_files() == before
    assert not probes._processes
