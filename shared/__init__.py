"""What both sides must agree on: configuration, frames, tokens, logs.

Imports neither `runner` nor `worker`, so that either can change without the other.
"""
