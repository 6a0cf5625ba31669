"""References to handlers: how a configuration names one. Loading it is the worker's."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from shared.errors import ConfigError
from shared.paths import existing

OUR_PACKAGES: Final = ("runner", "worker", "shared", "disco")


class HandlerRef(msgspec.Struct, frozen=True):
    """Where an agent's handler is: `module` (a dotted name) or `file` (absolute), and `attribute` in it.

    `search_dir` is looked in before the Python path: the folder of the configuration or of `file`.
    """

    module: str | None
    file: Path | None
    attribute: str
    search_dir: Path

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.attribute}"


def parse_handler(text: str, folder: Path, key: str = "handler") -> HandlerRef:
    """Return the handler that `module:attribute` or `path/to/file.py:attribute` names.

    Whether it can be imported is found out later, in a process of its own.

    Args:
        text: the reference.
        folder: where the configuration is; files are relative to it, modules are looked up in it first.
        key: how to name the setting in an error.

    Raises:
        ConfigError: when it has another form, the file does not exist, or a module beside it hides one of ours.
    """
    target, colon, attribute = text.rpartition(":")
    if not colon or not target or not all(part.isidentifier() for part in attribute.split(".")):
        raise ConfigError(
            f"{key}: found {text!r}, expected module:attribute or path/to/file.py:attribute, "
            'such as "examples.echo:handle"'
        )
    if target.endswith(".py") or "/" in target:
        file = existing(Path(target), folder, key)
        _check_not_hiding(file.parent, key)
        return HandlerRef(None, file, attribute, file.parent)
    if not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{key}: {target!r} is not a module's name; a file is written path/to/file.py:{attribute}")
    _check_not_hiding(folder, key)
    return HandlerRef(target, None, attribute, folder)


def _check_not_hiding(folder: Path, key: str) -> None:
    """Refuse a folder whose modules bear our packages' names: an import would get ours, or break ours."""
    ours = Path(__file__).resolve().parent.parent
    if folder.resolve() == ours:
        return
    for name in OUR_PACKAGES:
        for hiding in (folder / f"{name}.py", folder / name):
            if hiding.is_file() or (hiding.is_dir() and any(hiding.glob("*.py"))):
                raise ConfigError(
                    f"{key}: {hiding} has the name of one of em-runner's own packages ({', '.join(OUR_PACKAGES)}) "
                    "and cannot be imported beside it; rename it"
                )
