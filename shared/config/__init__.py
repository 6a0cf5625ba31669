"""The configuration: its keys, its files, what they mean together."""
