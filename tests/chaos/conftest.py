"""Nodes for the chaos tests: the same as for the integration tests."""

from __future__ import annotations

from tests.integration.conftest import node, other_node

__all__ = ["node", "other_node"]
