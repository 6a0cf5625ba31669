"""Handlers to copy. The configuration names them, as in `handler = "examples.echo:handle"`."""
