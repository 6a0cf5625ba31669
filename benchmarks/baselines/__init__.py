"""Alternatives that answer the same queries. Each is as small and as fair as possible."""
