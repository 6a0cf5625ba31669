"""The errors that a user can fix, the exit statuses, and how messages name a user's objects."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_HANDLER_FAILED = 3
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h


class ConfigError(Exception):
    """The configuration has a value that cannot work.

    The message is one line: where the error is, what was found, and what to do. Commands print it
    unchanged and exit with status 78.
    """


class StartError(Exception):
    """The runner or a process cannot start, though the configuration is valid.

    Examples are a port in use and a full disk. The message is one line, as for `ConfigError`.
    Commands exit with status 1, because a later attempt may succeed.
    """


class CommandError(Exception):
    """A command cannot do its work, for example because no runner answers.

    The message is one line, as for `ConfigError`. Most commands exit with status 1.
    """


def with_hint(text: str, hint: str | None) -> str:
    """Return a message, followed by a hint if there is one."""
    return text if hint is None else f"{text}; {hint}"


def text_of(exc: BaseException) -> str:
    """Return an exception's message. It may be of a user's class, whose `__str__` may raise."""
    try:
        return str(exc)
    except (Exception, SystemExit):  # noqa: BLE001 - a user's code may raise anything
        return "(its __str__ failed)"


def kind_of(value: object) -> str:
    """Return what a value is, with its article: `a list`, `an int`, `None`."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"an {name}" if name.startswith(tuple("aeioAEIO")) else f"a {name}"
