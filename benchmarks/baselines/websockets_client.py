"""websockets' asyncio client with msgspec and uvloop: what a programmer would write first.

python -m benchmarks.baselines.websockets_client HOST:PORT
"""

from __future__ import annotations

import sys

import uvloop
from websockets.asyncio.client import connect

from benchmarks.baselines.frames import Result, decode, encode
from benchmarks.handlers import echo


async def main(node: str) -> None:
    """Answer one node's queries until it closes the connection."""
    memory: dict[str, object] = {}
    async with connect(f"ws://{node}/ws", compression=None, max_size=16 << 20) as ws:
        await ws.send('{"action":"register","name":"echo"}')
        await ws.send('{"action":"agent_hello","capabilities":[]}')
        async for text in ws:
            query = decode(text)
            if query.action == "query":
                result, memory = await echo(query.body, memory)
                await ws.send(encode(Result(query.id, result)), text=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
