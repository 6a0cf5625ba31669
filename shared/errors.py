"""The errors that are a user's to mend, and the exit statuses of the commands."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HANDLER_FAILED = 3
EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h


class ConfigError(Exception):
    """Something that the user configured cannot work.

    Its text is one line that says where, what was found, and what to do; commands print it as it
    is and leave with status 78.
    """


class StartError(Exception):
    """Something outside the configuration keeps a command from starting: a port in use, a full disk.

    Its text is one line as a `ConfigError`'s is; the command leaves with status 1, because trying
    again later may succeed.
    """
