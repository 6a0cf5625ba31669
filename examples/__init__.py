"""Handlers to copy: what `handler = "examples.echo:handle"` names."""
