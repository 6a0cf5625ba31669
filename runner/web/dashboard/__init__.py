"""The status page for operators. It also works in a browser without scripts."""

from typing import Final

ASSETS: Final = ("dashboard.css", "dashboard.js", "icon.svg")
PATHS: Final = frozenset({"/", "/events", *(f"/assets/{name}" for name in ASSETS)})
"""The paths that a browser requests. On these, it asks its user for the token if one is needed."""
