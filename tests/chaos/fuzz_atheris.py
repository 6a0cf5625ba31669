"""Coverage-guided fuzzing of the functions that read untrusted bytes. Run it by hand.

    python -m venv /tmp/atheris && /tmp/atheris/bin/pip install atheris msgspec websockets PyJWT
    cd CHECKOUT && /tmp/atheris/bin/python tests/chaos/fuzz_atheris.py TARGET -max_total_time=60

TARGET is session, config, ipc, node or token. An exception that the target does not document is a
finding: libFuzzer then stops and writes the input to a file.
"""

from __future__ import annotations

import contextlib
import sys
import tomllib
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

with atheris.instrument_imports(
    include=[
        "shared",
        "worker.node.session",
        "websockets.protocol",
        "websockets.frames",
        "websockets.client",
        "jwt",
    ]
):
    from shared import ipc
    from shared.config import load as config
    from shared.config import tokens
    from shared.config.nodes import parse_node
    from shared.errors import ConfigError
    from worker.node.session import Session

import msgspec

FOLDER = Path("/tmp")
NODE = parse_node("localhost:8080")


def session(data: bytes) -> None:
    """Read bytes from a node in pieces, before or after the upgrade."""
    provider = atheris.FuzzedDataProvider(data)
    client = Session(NODE, "echo", ("a",), None, 65_536)
    request = client.take_output()
    if provider.ConsumeBool():
        client.receive(_upgrade(request))
    while client.loss is None and provider.remaining_bytes():
        for query_id, body in client.receive(
            provider.ConsumeBytes(provider.ConsumeIntInRange(1, 300))
        ):
            assert isinstance(body, str)
            client.answer(query_id, b"null")
        client.take_output()
    client.receive(b"")
    assert client.loss


def _upgrade(request: bytes) -> bytes:
    from websockets.utils import accept_key

    key = request.partition(b"Sec-WebSocket-Key: ")[2].split(b"\r\n")[0].decode()
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept_key(key).encode()
    )


def config_text(data: bytes) -> None:
    """Read TOML text as a configuration."""
    try:
        table = tomllib.loads(data.decode("utf-8", "replace"))
    except (tomllib.TOMLDecodeError, RecursionError):
        return
    with contextlib.suppress(ConfigError):
        config.parse(table, FOLDER, environ={"HOME": "/nonexistent"})


def ipc_message(data: bytes) -> None:
    """Decode a message from a worker, and one from a runner."""
    for decode in (ipc.decode_worker_message, ipc.decode_runner_message):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            decode(data)


def node(data: bytes) -> None:
    """Parse the address of a node."""
    try:
        address = parse_node(data.decode("utf-8", "replace"))
    except ValueError:
        return
    assert 1 <= address.port <= 65535
    assert parse_node(str(address)) == address


def token(data: bytes) -> None:
    """Inspect a token."""
    with contextlib.suppress(tokens.TokenError):
        tokens.inspect(data.decode("utf-8", "surrogateescape")).problems("echo")


TARGETS = {
    "session": session,
    "config": config_text,
    "ipc": ipc_message,
    "node": node,
    "token": token,
}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
