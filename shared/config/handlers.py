"""Parses references to handlers. The worker loads the handler."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from shared.config._paths import existing
from shared.errors import ConfigError

_OUR_PACKAGES: Final = ("em_runner", "runner", "worker", "shared", "disco")


class HandlerRef(msgspec.Struct, frozen=True):
    """Where an agent's handler is.

    Attributes:
        module: the dotted name of a module, or None.
        file: the absolute path of a file, or None. Exactly one of the two is set.
        attribute: the handler's name in the module or file; it may contain dots.
        search_dir: the folder that is searched before the Python path: that of the configuration,
            or of `file`.
    """

    module: str | None
    file: Path | None
    attribute: str
    search_dir: Path

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.attribute}"


def parse_handler(text: str, folder: Path, key: str = "handler") -> HandlerRef:
    """Return the handler that `module:attribute` or `path/to/file.py:attribute` names.

    A separate process imports it later. This process must not: an import may run any code.

    Args:
        text: the reference.
        folder: the configuration's folder. Files are relative to it, modules are searched in it.
        key: the setting, for the error.

    Raises:
        ConfigError: if the text has another form, the file does not exist, or a module beside it
            has the name of one of em-runner's packages.
    """
    target, colon, attribute = text.rpartition(":")
    if not colon or not target or not _is_dotted_name(attribute):
        raise ConfigError(
            f"{key}: found {text!r}, expected module:attribute or path/to/file.py:attribute, "
            'such as "examples.echo:handle"'
        )
    if target.endswith(".py") or "/" in target:
        file = existing(Path(target), folder, key)
        _check_names_beside(file.parent, key)
        return HandlerRef(None, file, attribute, file.parent)
    if not _is_dotted_name(target):
        raise ConfigError(
            f"{key}: {target!r} is not the name of a module; "
            f"for a file, write path/to/file.py:{attribute}"
        )
    _check_names_beside(folder, key)
    return HandlerRef(target, None, attribute, folder)


def _is_dotted_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _check_names_beside(folder: Path, key: str) -> None:
    """Refuse a folder that contains a module with the name of one of em-runner's packages.

    A worker has em-runner's packages in `sys.modules` already. So a handler that imports its module
    `shared` would get em-runner's.
    """
    if folder.resolve() == Path(__file__).resolve().parents[2]:  # em-runner's checkout
        return
    for name in _OUR_PACKAGES:
        for module in (folder / f"{name}.py", folder / name):
            # A folder without Python files, such as `shared/` for data, is not imported.
            is_package = module.is_dir() and any(module.glob("*.py"))
            if module.is_file() or is_package:
                raise ConfigError(
                    f"{key}: {module} has the name of one of em-runner's own packages "
                    f"({', '.join(_OUR_PACKAGES)}) and cannot be imported beside it; rename it"
                )
