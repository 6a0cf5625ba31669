"""Keeping workers alive: which run, how each one starts, how it ends, and what follows."""
