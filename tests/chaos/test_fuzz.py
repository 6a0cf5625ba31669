"""Random bytes for a real runner, and for the functions that read files.

The HTTP port, the workers' socket and a worker's WebSocket get them. Nothing crashes or hangs, no
response is a 500, and valid queries are answered in the meantime.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import zmq
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from disco import Node, NodeSettings, serve
from shared import ipc
from shared.config import tokens
from shared.config.load import Config, load
from shared.config.nodes import NodeList, resolve_nodes
from shared.errors import ConfigError
from shared.ipc import Counters
from tests.chaos.load import ECHO, http_load, report
from tests.cluster import Cluster, agent, cluster, until
from tests.integration.wire import Wire, scripted

EXAMPLES = int(os.environ.get("EM_FUZZ_EXAMPLES", "60"))
few = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
many = settings(few, max_examples=EXAMPLES * 5)
HANG_S = 60.0


class Fuzzed:
    """A running runner, for tests in another thread than its event loop.

    Attributes:
        scripts: the bytes that the scripted node sends, one item on each connection.
        port: the port of the HTTP interface.
        endpoint: the address of the workers' socket.
        pids: the workers' process ids at the start.
    """

    def __init__(self, portal: BlockingPortal, running: Cluster, scripts: list[bytes]) -> None:
        self._portal = portal
        self._running = running
        self.scripts = scripts
        self.port = running.http.base_url.port or 0
        self.endpoint = f"ipc://{next(running.state_dir.rglob('router.sock'))}"
        self.pids = {name: row["pid"] for name, row in self.rows().items()}

    def rows(self) -> dict[str, dict[str, Any]]:
        return self._portal.call(self._running.rows)

    def check_health(self) -> None:
        """Check that no worker was restarted, no fault is logged, and a query is answered."""
        assert {name: row["pid"] for name, row in self.rows().items()} == self.pids
        assert "Traceback" not in self._running.log
        assert "internal_error" not in self._running.log
        assert self.ask(b'{"query":"x","agent":"a"}')[0] == 200

    def ask(self, body: bytes) -> tuple[int, bytes]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANG_S) as client:
            head = (
                b"POST /agent/query HTTP/1.0\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n"
                % len(body)
            )
            client.sendall(head + body)
            return parse_response(read_until_end(client))

    def wait_sent(self) -> None:
        """Wait until the scripted node has sent all its scripts."""

        async def sent() -> None:
            await until(lambda: not self.scripts, "all scripts are sent")

        self._portal.call(sent)

    def wait_event(self, name: str, kind: str) -> None:
        """Wait until the runner's log has an event of this kind."""

        def is_logged() -> bool:
            return any(line["kind"] == kind for line in self._running.events(name))

        async def logged() -> None:
            await until(is_logged, f"{name} is logged")

        self._portal.call(logged)


def read_until_end(client: socket.socket) -> bytes:
    """Return all that the server sends until it ends the connection.

    Raises:
        TimeoutError: if it does not end the connection within `HANG_S`.
    """
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65_536):
            received += data
    return received


def parse_response(response: bytes) -> tuple[int, bytes]:
    """Return the status and the body."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """A runner with `a_server` at a normal node, and `b_server` at one that sends `scripts`."""
    scripts: list[bytes] = []
    folder = tmp_path_factory.mktemp("fuzzed")

    async def send_script(wire: Wire) -> None:
        await wire.register()
        while not scripts:  # noqa: ASYNC110 - another thread adds them
            await anyio.sleep(0.002)
        wire.writer.write(scripts.pop(0))
        wire.writer.write_eof()  # the script ends here, so that the worker reconnects
        await wire.until_gone()

    with start_blocking_portal("asyncio", {"use_uvloop": True}) as portal:
        with (
            portal.wrap_async_context_manager(serve(NodeSettings(port=0))) as node,
            portal.wrap_async_context_manager(scripted(send_script, send_script)) as (
                _,
                scripted_url,
            ),
            portal.wrap_async_context_manager(_cluster(folder, node, scripted_url)) as running,
        ):
            portal.call(running.wait_ready)
            with portal.wrap_async_context_manager(
                http_load(running, "/agents/a/query", clients=2)
            ) as others:
                fuzzed = Fuzzed(portal, running, scripts)
                yield fuzzed
                fuzzed.check_health()
            report("fuzz", others)
            others.assert_nothing_lost()
            assert not others.refused


def _cluster(folder: Path, node: Node, scripted_url: str) -> Any:
    return cluster(
        folder,
        agent("a", [node.url], capabilities=["a"]),
        agent("b", [scripted_url]),
        handlers=ECHO,
        connection="reconnect_interval_ms = 5\nping_interval_ms = 600000\nmax_frame_bytes = 65536",
    )


# --- HTTP ---

http_parts = st.sampled_from(
    [
        b"GET ", b"POST ", b"PUT ", b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"/agent/query", b"/workers", b"/health", b"/agents/a/query", b"/workers/a_server/query",
        b"/ready?x=%00", b"/%ff%fe/../", b"//", b"*", b"http://x/",
        b" HTTP/1.1", b" HTTP/1.0", b" HTTP/9.9", b"\r\n", b"\r\n\r\n", b"\n", b"\r",
        b"host: 127.0.0.1\r\n", b"content-length: 5\r\n",
        b"content-length: 18446744073709551616\r\n", b"content-length: -1\r\n",
        b"transfer-encoding: chunked\r\n", b"transfer-encoding: gzip, chunked\r\n",
        b"expect: 100-continue\r\n", b"connection: close\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
        b"upgrade: h2c\r\nconnection: upgrade\r\n", b"sec-websocket-key: x\r\n",
        b"5\r\nhello\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n",
        b'{"query":"x","agent":"a"}', b'{"query":', b"\x00", b"\xff\xfe",
        b"authorization: Bearer x\r\n", b": \r\n", b"a:\r\n b\r\n", b"x" * 5000,
    ]
)  # fmt: skip
http_bytes = st.lists(http_parts | st.binary(max_size=30), max_size=14).map(b"".join)


@many
@given(st.lists(http_bytes, min_size=1, max_size=3))
@example([b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 300])
@example([b"POST /agent/query HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99\r\n\r\n{"])
def test_http_connection_with_any_bytes_is_answered_or_ended(
    fuzzed: Fuzzed, pieces: list[bytes]
) -> None:
    with socket.create_connection(("127.0.0.1", fuzzed.port), timeout=HANG_S) as client:
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        response = read_until_end(client)
    assert not response or response.startswith(b"HTTP/1.1 "), response[:100]
    assert b"HTTP/1.1 5" not in response, response[:300]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


fields = st.sampled_from(["query", "agent", "worker", "value", ""])
bodies = (
    st.binary(max_size=200)
    | st.dictionaries(fields, json_values | st.sampled_from(["a", "b", "a_server"])).map(_json)
    | st.text(alphabet='{}[]",:\\u09aquery', max_size=40).map(str.encode)
)  # fmt: skip
paths = st.sampled_from(
    [
        "/agent/query",
        "/agents/a/query",
        "/agents/%C3%A9%00/query",
        "/workers/a_server/query",
        "/workers",
        "/ready",
        "/",
    ]
) | st.text(alphabet="/%.?&=#;abc0129~", max_size=20).map(lambda text: "/" + text)


@many
@given(st.sampled_from(["GET", "POST", "HEAD", "OPTIONS", "DELETE", "PATCH"]), paths, bodies)
def test_complete_request_gets_one_response_that_is_never_500(
    fuzzed: Fuzzed, method: str, path: str, body: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", fuzzed.port), timeout=HANG_S) as client:
        head = f"{method} {path} HTTP/1.0\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        response = read_until_end(client)
    status, payload = parse_response(response)
    assert status in (200, 400, 401, 403, 404, 405, 413), response[:300]
    assert response.startswith(b"HTTP/1.1 ")
    if method == "HEAD":
        return
    if b"content-type: text/html" in response:
        page = path.partition("?")[0].partition("#")[0]
        assert (method, status, page) == ("GET", 200, "/")
    else:
        assert isinstance(json.loads(payload), dict)


# --- the workers' socket ---

messages = st.one_of(
    st.binary(max_size=60),
    st.builds(ipc.Hello, st.binary(min_size=32, max_size=32)).map(ipc.encode),
    st.builds(
        ipc.Replies,
        st.lists(
            st.tuples(st.integers(0, 10_000), st.integers(-1, 9), st.binary(max_size=9)),
            max_size=20,
        ),
    ).map(ipc.encode),
    st.sampled_from(
        [
            ipc.DrainRequest(),
            ipc.Failed("x"),
            ipc.ReplaceRequest("x"),
            ipc.Handover(b"x"),
            ipc.Status("stopped", "", Counters()),
        ]
    ).map(ipc.encode),
    st.binary(max_size=10).map(lambda tail: b"\x92\x02" + tail),
)


@few
@given(
    st.sampled_from([b"a_server#1", b"b_server#1", b"a_server#2", b"unknown"])
    | st.binary(min_size=1, max_size=40),
    st.lists(st.lists(messages, min_size=1, max_size=3), min_size=1, max_size=8),
)
def test_unknown_peer_on_the_workers_socket_has_no_effect(
    fuzzed: Fuzzed, name: bytes, sent: list[list[bytes]]
) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        if not name.startswith(b"\0"):  # ZeroMQ reserves such names
            peer.setsockopt(zmq.IDENTITY, name)
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.SNDTIMEO, 1000)
        peer.connect(fuzzed.endpoint)
        for parts in sent:
            peer.send_multipart(parts)
        assert fuzzed.ask(b'{"query":"x","agent":"a"}')[0] == 200
        assert not peer.poll(0), "it gets no message"
    assert {name: row["pid"] for name, row in fuzzed.rows().items()} == fuzzed.pids


def test_message_of_an_unknown_peer_is_logged_as_ignored(fuzzed: Fuzzed) -> None:
    """Check that messages arrive: the test above would also pass if none did."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.IDENTITY, b"an_unknown_peer")
        peer.connect(fuzzed.endpoint)
        peer.send(b"hello")
        fuzzed.wait_event("message_ignored", kind="unknown_peer")


@few
@given(st.lists(st.binary(min_size=1, max_size=100), min_size=1, max_size=4))
@example([b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48)])
@example([b"GET / HTTP/1.1\r\n\r\n"])
def test_bytes_that_are_not_zeromq_have_no_effect(fuzzed: Fuzzed, pieces: list[bytes]) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(fuzzed.endpoint.removeprefix("ipc://"))
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                peer.sendall(piece)
        assert fuzzed.ask(b'{"query":"x","agent":"a"}')[0] == 200


# --- the WebSocket of a worker ---

texts = (
    st.sampled_from(
        [
            b'{"action":"query","id":"i","body":"x"}',
            b'{"action":"query","id":',
            b'{"status":"error"}',
            b"{}",
            b"\xff",
        ]
    )
    | st.dictionaries(
        st.sampled_from(["action", "id", "body", "status", "error", "reason"]), json_values
    ).map(_json)
    | st.binary(max_size=50)
)


def _frame(first: int, masked: bool, length: int | None, data: bytes) -> bytes:
    """Return a frame with any opcode and flags, and with a length that may be wrong."""
    size = min(len(data), 125) if length is None else length
    return bytes([first, size | masked << 7]) + data[:125]


opcodes = st.sampled_from(
    [0x81, 0x81, 0x81, 0x01, 0x80, 0x00, 0x82, 0x88, 0x89, 0x8A, 0x09, 0xF1, 0x83]
)
frames = st.builds(
    _frame, opcodes, st.just(False) | st.booleans(), st.none() | st.integers(0, 127), texts
)


@few
@given(st.lists(frames | st.binary(max_size=30), min_size=1, max_size=10).map(b"".join))
def test_worker_survives_any_frames_of_its_node(fuzzed: Fuzzed, script: bytes) -> None:
    fuzzed.scripts.append(script)
    assert fuzzed.ask(b'{"query":"x","agent":"b"}')[0] == 200
    fuzzed.wait_sent()
    row = fuzzed.rows()["b_server"]
    assert (row["pid"], row["restarts"]) == (fuzzed.pids["b_server"], 0)


# --- files ---

toml_keys = st.sampled_from(
    ["agent", "name", "handler", "nodes", "memory", "concurrency", "runner", "http", "connection",
     "jwt_token", "nodse", "reconnect_interval_ms", "capabilities", "max_restarts", "supervision",
     "http_token", "state_dir", "max_rss_mb"]
)  # fmt: skip
toml_values = (
    st.sampled_from(
        [
            '"a"',
            '"a:b"',
            '["x"]',
            "1",
            "-1",
            "1e400",
            "nan",
            "true",
            "2020-01-01",
            '"127.0.0.1:0"',
            '"::"',
            "[]",
            "{}",
        ]
    )
    | st.integers().map(str)
    | st.text(max_size=10).map(json.dumps)
)
toml_lines = st.one_of(
    st.sampled_from(
        ["[[agent]]", "[runner]", "[connection]", "[supervision]", "[agent]", "[[runner]]", "[x.y]"]
    ),
    st.builds("{} = {}".format, toml_keys, toml_values),
    st.text(max_size=20),
)
VALID = ["[[agent]]", 'name = "a"', 'handler = "a:b"', 'nodes = ["x"]']


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError as exc:
        return str(exc)


@many
@given(st.lists(toml_lines, max_size=8), st.booleans(), st.binary(max_size=3))
@example([], True, b"")
def test_any_text_as_configuration_gives_a_config_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], starts_valid: bool, tail: bytes
) -> None:
    path = _file(tmp_path_factory, "em-runner.toml")
    text = "\n".join([*(VALID if starts_valid else []), *lines])
    path.write_bytes(text.encode("utf-8", "surrogatepass") + tail)
    found = _or_error(lambda: load(path, environ={"HOME": "/nonexistent"}))
    assert isinstance(found, Config) or (found.startswith(str(path)) and len(found) < 2000)


@many
@given(
    st.lists(
        st.sampled_from(
            [
                "[em_disco]",
                "[x]",
                "nodes = a, b:9000",
                "nodes = [::1",
                "host = h",
                "port = 99999",
                " x",
                "=",
            ]
        )
        | st.text(max_size=15),
        max_size=6,
    ),
    st.binary(max_size=3),
)
def test_any_text_as_emergence_conf_gives_nodes_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], tail: bytes
) -> None:
    path = _file(tmp_path_factory, "emergence.conf")
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + tail)
    found = _or_error(lambda: resolve_nodes(None, environ={}, emergence_conf=path))
    assert isinstance(found, NodeList) or found.startswith(str(path))


_folders: dict[str, Path] = {}


def _file(factory: pytest.TempPathFactory, name: str) -> Path:
    return _folders.setdefault(name, factory.mktemp("fuzz")) / name


def _sign(claims: Any) -> str:
    import jwt

    return jwt.encode(claims, "a test secret that is long enough for HS256", algorithm="HS256")


jwts = st.text() | st.dictionaries(
    st.sampled_from(["sub", "iat", "exp", "nbf", "aud"]), json_values, max_size=4
).map(_sign)  # fmt: skip


def _corrupt(token: str, at: int, text: str) -> str:
    return token[:at] + text + token[at + 1 :]


@many
@given(jwts | st.builds(_corrupt, jwts, st.integers(0, 200), st.text(max_size=3)))
def test_any_text_as_token_is_read_or_refused(token: str) -> None:
    checks: list[Callable[[], tokens.TokenClaims]] = [
        lambda: tokens.inspect(token),
        lambda: tokens.verify(token, "a test secret that is long enough for HS256"),
    ]
    for check in checks:
        with contextlib.suppress(tokens.TokenError):
            assert isinstance(check().problems("a"), list)
