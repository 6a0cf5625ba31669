"""The configuration of Sphinx, which `scripts/docs.sh` runs."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "em-runner"
author = "the em-runner maintainers"
copyright = "the em-runner maintainers, Apache License 2.0"
release = version = metadata.version("em-runner")

extensions = ["myst_parser", "included"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

html_theme = "furo"
html_title = f"em-runner {release}"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "default"
highlight_language = "none"
