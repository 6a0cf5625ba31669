"""An embedded em_disco node: the server's side of the wire, for development, the demo and the tests.

`serve` runs one inside another program, `disco.main.run` runs one alone. Imports `shared` only.
"""

from disco.node import Node, serve
from disco.settings import NodeSettings

__all__ = ["Node", "NodeSettings", "serve"]
