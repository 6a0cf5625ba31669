"""What the processes must agree on: messages, frames, configuration, logs.

It imports neither `runner` nor `worker`, so that each can change without the other.
"""
