"""The child process: one agent at one node, over one connection.

It never imports `runner`. A hostile node, an invalid frame or a failing query costs at most one
query or one connection. The process ends if a handler hangs, its `setup` fails or its memory cannot
be opened. The runner then restarts it.
"""
