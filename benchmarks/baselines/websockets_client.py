"""websockets' own asyncio client with msgspec and uvloop: what one would write first.

python -m benchmarks.baselines.websockets_client HOST:PORT
"""

from __future__ import annotations

import sys

import msgspec
import uvloop
from websockets.asyncio.client import connect

from benchmarks.handlers import echo


class Query(msgspec.Struct):
    """A node's frame."""

    action: str
    id: str = ""
    body: str = ""


class Result(msgspec.Struct, tag_field="action", tag="result"):
    """The answer to a query."""

    id: str
    data: str


async def main(node: str) -> None:
    """Answer one node's queries until it goes."""
    decode, encode = msgspec.json.Decoder(Query).decode, msgspec.json.Encoder().encode
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
