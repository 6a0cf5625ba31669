"""An embedded em_disco node: the server side of the protocol, for development, demo and tests.

`serve` runs a node inside another program, `disco.main.run` runs a node alone. This package imports
only `shared`.
"""

from disco._node import Node, serve
from disco._settings import NodeSettings

__all__ = ["Node", "NodeSettings", "serve"]
