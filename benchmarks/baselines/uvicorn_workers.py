"""uvicorn's supervisor of worker processes, with one.

The command line starts it for two workers and more only; with a second one that goes on answering,
it would be chance when the successor of the first is noticed.

    python -m benchmarks.baselines.uvicorn_workers PORT
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from uvicorn.supervisors import Multiprocess

if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024)
    config = uvicorn.Config(
        "benchmarks.baselines.http_worker:asgi", workers=1, ws="none", lifespan="off", access_log=False
    )
    Multiprocess(config, [listener]).run()
