"""picows and msgspec: the upper bound. The protocol is in C.

This client has no memory, no timeout and no isolation, and checks nothing.

python -m benchmarks.baselines.picows_client HOST:PORT
"""

from __future__ import annotations

import sys

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from benchmarks.baselines.frames import Result, decode, encode


class EchoListener(WSListener):
    """Answers in the callback."""

    def on_ws_connected(self, transport: WSTransport) -> None:
        """Register."""
        transport.send(WSMsgType.TEXT, b'{"action":"register","name":"echo"}')
        transport.send(WSMsgType.TEXT, b'{"action":"agent_hello","capabilities":[]}')

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        """Answer one query."""
        if frame.msg_type == WSMsgType.TEXT:
            query = decode(frame.get_payload_as_memoryview())
            if query.action == "query":
                transport.send(WSMsgType.TEXT, encode(Result(query.id, query.body)))


async def main(node: str) -> None:
    """Answer one node's queries until it closes the connection."""
    transport, _ = await ws_connect(EchoListener, f"ws://{node}/ws", max_frame_size=16 << 20)
    await transport.wait_disconnected()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
