"""The parts of the reference that are generated from em-runner's sources, so that they stay true.

A page has such a part between the marks `<!-- generated: NAME -->` and `<!-- /generated -->`. NAME
is a key of `PARTS`. `parts.py` writes the text between the marks.
"""

from __future__ import annotations

import inspect
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

from runner.cli import cli
from runner.supervision.sample import Sample
from runner.table import WorkerRow
from runner.web import metrics
from shared.config.schema import (
    AgentSection,
    ConnectionSection,
    RunnerSection,
    SupervisionSection,
    expected,
)
from shared.ipc import Counters

_SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "runner": RunnerSection,
    "connection": ConnectionSection,
    "supervision": SupervisionSection,
    "agent": AgentSection,
}


def section(name: str) -> str:
    """Return a table of a configuration section's keys."""
    struct = _SECTIONS[name]
    hints = typing.get_type_hints(struct, include_extras=True)
    lines = ["| key | what it may be | default | meaning |", "| --- | --- | --- | --- |"]
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    for name, text in meanings(struct).items():
        meaning, _, otherwise = text.partition(" Default: ")
        default = _default(fields[name], otherwise.rstrip("."))
        lines.append(f"| `{name}` | {expected(hints[name])} | {default} | {meaning} |")
    return "\n".join(lines)


def meanings(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return the meaning of each key of a section, from its Struct's docstring.

    The order is that of `Attributes:` in the docstring, which includes inherited keys.
    """
    found: dict[str, str] = {}
    key = ""
    _, _, attributes = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    for line in attributes.splitlines():
        match = re.fullmatch(r"    (\w+): (.*)", line)
        if match:
            key = match[1]
            found[key] = match[2]
        elif key:
            found[key] += " " + line.strip()
    return found


def _default(field: msgspec.structs.FieldInfo, otherwise: str) -> str:
    if field.required:
        return "required"
    if field.default is None or field.default is msgspec.UNSET:
        return otherwise or "none"
    value = str(field.default) if isinstance(field.default, Path) else field.default
    return f"`{msgspec.json.encode(value).decode()}`"


def commands() -> str:
    """Return a section for each command with the output of its `--help`."""
    return "\n\n".join(
        f"## em-runner {name}\n\n```text\n{help_of(name)}\n```" for name in sorted(command_names())
    )


def command_names() -> list[str]:
    """Return the names of all commands."""
    return [
        str(each.name or getattr(each.callback, "__name__", "")) for each in cli.registered_commands
    ]


def help_of(name: str) -> str:
    """Return what `em-runner NAME --help` prints."""
    # Without prog_name, the usage line would name the program that runs this code.
    ended = CliRunner().invoke(
        cli, [name, "--help"], prog_name="em-runner", terminal_width=100, max_content_width=100
    )
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
    row |= {
        "name": "echo_server",
        "agent": "echo",
        "node": "ws://localhost:8080",
        "state": "ready",
        "reason": "",
    }
    worker = msgspec.convert(
        row | {"pid": os.getpid(), "ignored": {}, "last_error": "", "last_errors": []}, WorkerRow
    )
    counted = Counters(ignored={"binary": 1})
    yield from metrics.metric_families(
        [Sample(worker, counted, {"killed": 1}, 0, 0.0, {}, {})], metrics.RunnerSample({}, 0)
    )


PARTS: Final[dict[str, Callable[[], str]]] = {
    **{f"section-{name}": partial(section, name) for name in _SECTIONS},
    "commands": commands,
    "metrics": metrics_table,
}


def part(name: str) -> str:
    """Return the part with that name.

    Raises:
        ValueError: no part has that name.
    """
    if name not in PARTS:
        raise ValueError(f"unknown generated part {name!r}; the parts are: {', '.join(PARTS)}")
    return PARTS[name]()
