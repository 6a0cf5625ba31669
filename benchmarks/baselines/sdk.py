"""The Python SDK's technique: one thread per node, with websocket-client and json.

Direct queries use http.server with threads. For each query this does what
https://github.com/EmergenceSystem/em_filter_py does, but without its signatures and its log line,
so it is faster than the SDK. Like the SDK, it speaks HTTP/1.0 with one connection per request.
With `--keep-alive` it speaks HTTP/1.1, which is faster.

    python -m benchmarks.baselines.sdk ws HOST:PORT
    python -m benchmarks.baselines.sdk http PORT_FILE [--keep-alive]
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import websocket


def handle(body: str, memory: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the query."""
    return body, memory


def serve_node(node: str) -> None:
    """Answer one node's queries until it closes the connection."""
    memory: dict[str, Any] = {}
    ws = websocket.create_connection(f"ws://{node}/ws")
    ws.send(json.dumps({"action": "register", "name": "echo"}))
    ws.send(json.dumps({"action": "agent_hello", "capabilities": []}))
    while raw := ws.recv():
        message = json.loads(raw)
        if message.get("action") != "query":
            continue
        result, memory = handle(message["body"], memory)
        ws.send(json.dumps({"action": "result", "id": message["id"], "data": result}))


class Direct(BaseHTTPRequestHandler):
    """Answers POST /agent/query."""

    memory: dict[str, Any] = {}  # noqa: RUF012 - shared by all threads, as in the SDK

    def do_POST(self) -> None:
        """Answer one query."""
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        result, Direct.memory = handle(asked["query"], Direct.memory)
        body = json.dumps({"results": result}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""


class Server(ThreadingHTTPServer):
    """Has a backlog that is large enough for a load generator's connections."""

    request_queue_size = 1024


def serve_http(port_file: str, *, keep_alive: bool) -> None:
    """Serve direct queries until the process is killed."""
    if keep_alive:
        Direct.protocol_version = "HTTP/1.1"
        # Send head and body in one segment. In two segments, Nagle's algorithm and delayed ACKs
        # limit a connection to 25 requests per second.
        Direct.wbufsize = -1
    server = Server(("127.0.0.1", 0), Direct)
    Path(port_file).write_text(str(server.server_address[1]))
    server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "ws":
        thread = threading.Thread(target=serve_node, args=(sys.argv[2],))
        thread.start()
        thread.join()
    else:
        serve_http(sys.argv[2], keep_alive="--keep-alive" in sys.argv)
