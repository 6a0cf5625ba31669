"""Makes parts of the reference of em-runner's own sources, so that they cannot drift from them.

A line `<!-- generated: NAME -->` in a page is replaced by what `PARTS[NAME]` returns, Markdown as well, before
the page is parsed.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client.core import Metric
from typer.testing import CliRunner

from runner import metrics
from runner.cli import cli
from runner.table import WorkerRow
from shared.ipc import Counters
from shared.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
    expected,
    meanings,
)

if typing.TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK: Final = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "runner": RunnerSection,
    "connection": ConnectionSection,
    "supervision": SupervisionSection,
    "agent": AgentSection,
}


def section(name: str) -> str:
    """Return a table of a configuration section's keys."""
    struct = _SECTIONS[name]
    hints, told = typing.get_type_hints(struct, include_extras=True), meanings(struct)
    lines = ["| key | what it may be | default | meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(struct):
        if field.name in told:
            kind = expected(hints[field.name])
            meaning, _, otherwise = told[field.name].partition(" Default: ")
            lines.append(f"| `{field.name}` | {kind} | {_default(field, otherwise.rstrip('.'))} | {meaning} |")
    return "\n".join(lines)


def _default(field: msgspec.structs.FieldInfo, otherwise: str) -> str:
    if field.required:
        return "required"
    if field.default is None or field.default is msgspec.UNSET:
        return otherwise or "none"
    value = str(field.default) if isinstance(field.default, Path) else field.default
    return f"`{msgspec.json.encode(value).decode()}`"


def commands() -> str:
    """Return a section for each command with what its `--help` says."""
    return "\n\n".join(f"## em-runner {name}\n\n```text\n{help_of(name)}\n```" for name in sorted(command_names()))


def command_names() -> list[str]:
    """Return the names of all commands."""
    return [str(each.name or getattr(each.callback, "__name__", "")) for each in cli.registered_commands]


def help_of(name: str) -> str:
    """Return what `em-runner NAME --help` prints."""
    # prog_name: the program that prints this one is another.
    ended = CliRunner().invoke(cli, [name, "--help"], prog_name="em-runner", terminal_width=100, max_content_width=100)
    assert ended.exit_code == 0, ended.output
    return "\n".join(line.rstrip() for line in ended.output.strip().splitlines())


def metrics_table() -> str:
    """Return a table of the metrics, as a runner with one worker exposes them."""
    lines = ["| metric | type | labels | |", "| --- | --- | --- | --- |"]
    for metric in sorted(_collected(), key=lambda each: each.name):
        labels: dict[str, None] = {}
        for sample in metric.samples:
            labels |= dict.fromkeys(sample.labels)
        shown = ", ".join(f"`{label}`" for label in labels if label != "le")
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        lines.append(f"| `{name}` | {metric.type} | {shown} | {metric.documentation} |")
    return "\n".join(lines)


def _collected() -> Iterator[Metric]:
    row: dict[str, object] = {field.name: 0 for field in msgspec.structs.fields(WorkerRow)}
    row |= {"name": "echo_server", "agent": "echo", "node": "ws://localhost:8080", "state": "ready", "detail": ""}
    worker = msgspec.convert(row | {"pid": os.getpid(), "ignored": {}, "last_error": "", "last_errors": []}, WorkerRow)
    counted = Counters(ignored={"binary": 1})
    yield from metrics.collected([metrics.Sample(worker, counted, {"killed": 1}, 0, 0.0, {}, {})], metrics.Own({}, 0))


PARTS: Final[dict[str, Callable[[], str]]] = {
    **{f"section-{name}": partial(section, name) for name in _SECTIONS},
    "commands": commands,
    "metrics": metrics_table,
}


def filled(text: str) -> str:
    """Return a page with its generated parts in place."""
    return MARK.sub(lambda found: PARTS[found[1]](), text)


def _on_source_read(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = filled(content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
