"""uvicorn's supervisor of worker processes, with one worker.

uvicorn's command line starts the supervisor only for two or more workers. With two, the surviving
worker would continue to answer, so the moment at which the new worker is noticed would be random.

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
        "benchmarks.baselines.http_worker:asgi",
        workers=1,
        ws="none",
        lifespan="off",
        access_log=False,
    )
    Multiprocess(config, [listener]).run()
