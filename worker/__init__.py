"""The child: one agent, one node, one connection.

Never imports `runner`. A bad node, a bad frame or a bad handler costs at most a query or a
connection here, never the process.
"""
