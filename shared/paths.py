"""Paths as a configuration writes them."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ConfigError
from shared.schema import show


def absolute(path: Path, folder: Path, key: str) -> Path:
    """Return a configured path, `~` expanded and relative to `folder`; `key` names the setting in an error.

    Raises:
        ConfigError: when `~user` is nobody's.
    """
    try:
        return folder / path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{key}: found {str(path)!r}, but the home folder of that user is not known; write the whole path"
        ) from None


def existing(path: Path, folder: Path, key: str) -> Path:
    """Return the same of a file that must be there.

    Raises:
        ConfigError: when it is not.
    """
    full = absolute(path, folder, key)
    try:
        found = full.is_file()
    except OSError as exc:  # a name that is too long, a folder that may not be entered
        raise ConfigError(f"{key}: cannot look for {show(str(full))}: {exc.strerror}") from None
    if not found:
        raise ConfigError(f"{key}: there is no file {full}")
    return full
