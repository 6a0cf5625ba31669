"""One worker's connection to its node."""
