"""`runner.process`: what is kept of the processes that load a handler once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.process import ForkServer
from shared.errors import ConfigError
from shared.handlers import HandlerRef


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "source",
    ["def handle(body, memory): return body, memory", "raise ValueError", "import os; os._exit(3)"],
    ids=["good", "broken", "ends its process"],
)
def test_nothing_is_kept_of_a_process_that_has_loaded_a_handler(source: str, tmp_path: Path) -> None:
    (tmp_path / "h.py").write_text(source)
    ref = HandlerRef(None, tmp_path / "h.py", "handle", tmp_path)
    server = ForkServer()
    server.start()

    def load_once() -> None:
        try:
            server.probe(ref)
        except ConfigError:
            assert not source.startswith("def")

    load_once()
    before = open_files()
    for _ in range(4):
        load_once()
    assert open_files() == before
    assert not server._probes
