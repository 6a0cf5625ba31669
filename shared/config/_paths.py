"""Resolves the paths that a configuration contains."""

from __future__ import annotations

from pathlib import Path

from shared.config.schema import show
from shared.errors import ConfigError


def absolute(path: Path, folder: Path, key: str) -> Path:
    """Return a configured path as an absolute one.

    `~` is expanded, and a relative path is taken from `folder`.

    Args:
        path: the path in the configuration.
        folder: the configuration's folder.
        key: the setting, for the error.

    Raises:
        ConfigError: if `~user` names an unknown user.
    """
    try:
        return folder / path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{key}: found {str(path)!r}, but the home folder of that user is not known; "
            "write the whole path"
        ) from None


def existing(path: Path, folder: Path, key: str) -> Path:
    """Return what `absolute` returns, for a file that must exist.

    Raises:
        ConfigError: also if the file does not exist.
    """
    full = absolute(path, folder, key)
    try:
        found = full.is_file()
    except OSError as exc:  # the name is too long, or a folder must not be entered
        raise ConfigError(f"{key}: cannot look for {show(str(full))}: {exc.strerror}") from None
    if not found:
        raise ConfigError(f"{key}: there is no file {full}")
    return full
