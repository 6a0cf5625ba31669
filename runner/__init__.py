"""The parent process: supervises the workers, routes queries to them, serves HTTP.

It never connects to an em_disco node and never imports a handler, so neither can make it fail.
"""

from __future__ import annotations

from functools import cache


@cache
def version() -> str:
    """Return em-runner's version, `unknown` if em-runner is not installed as a package."""
    # `importlib.metadata` takes milliseconds to import, which most commands do not need.
    from importlib import metadata

    try:
        return metadata.version("em-runner")
    except metadata.PackageNotFoundError:
        return "unknown"
