"""The status page: what an operator looks at in a browser, with a script or without one."""

from typing import Final

ASSETS: Final = ("dashboard.css", "dashboard.js", "icon.svg")
PATHS: Final = frozenset({"/", "/events", *(f"/assets/{name}" for name in ASSETS)})
"""What a browser asks for: where a token is needed, it is told to ask its user for it."""
