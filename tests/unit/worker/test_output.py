"""`worker.output`: printed lines become log events."""

from __future__ import annotations

import threading
from typing import Any

from worker.output import _LogStream


def test_thread_prints_while_another_one_logs_its_line() -> None:
    lines: list[str] = []

    def log(event: str, *, text: str, stream: str) -> None:
        if text == "first":
            thread = threading.Thread(target=printed.write, args=("second\n",), daemon=True)
            thread.start()
            thread.join(5)
        lines.append(text)

    printed: Any = _LogStream("stdout", log, None)
    printed.write("first\n")
    assert lines == ["second", "first"]
