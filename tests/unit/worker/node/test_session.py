"""`worker.node.session` against a `websockets` server without sockets, and invalid bytes."""

from __future__ import annotations

import json
import logging
from collections import Counter
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol

from shared.config.nodes import parse_node
from worker.node.losses import Loss, LossKind
from worker.node.session import Session

MAX_BYTES = 4096
DISABLED_LOGGER = logging.getLogger(f"{__name__}.peer")
DISABLED_LOGGER.disabled = True
READY = (
    {"status": "ok", "action": "registered"},
    {"status": "ok", "action": "agent_registered", "capabilities": []},
)


def session(token: str | None = "tok", capabilities: tuple[str, ...] = ("a", "b")) -> Session:
    return Session(parse_node("localhost:8080"), "echo", capabilities, token, MAX_BYTES)


class NodePeer:
    """A node's end of one session, on top of the server protocol of `websockets`."""

    def __init__(self, client: Session) -> None:
        self.client = client
        self.protocol = ServerProtocol(logger=DISABLED_LOGGER)
        self.protocol.receive_data(client.take_output())
        (request,) = self.protocol.events_received()
        assert isinstance(request, Request)
        self.request = request
        self.protocol.send_response(self.protocol.accept(request))
        self.upgrade = self.output()

    def output(self) -> bytes:
        return b"".join(self.protocol.data_to_send())

    def frames_received(self) -> list[Frame]:
        """Return the frames that the client has written since the last call."""
        if data := self.client.take_output():
            self.protocol.receive_data(data)
        return [event for event in self.protocol.events_received() if isinstance(event, Frame)]

    def texts(self) -> list[Any]:
        return [
            json.loads(frame.data)
            for frame in self.frames_received()
            if frame.opcode is Opcode.TEXT
        ]

    def send(self, *messages: Any) -> list[tuple[bytes, str]]:
        return self.client.receive(b"".join(text_frame(message) for message in messages))


def text_frame(message: Any) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return Frame(Opcode.TEXT, data).serialize(mask=False)


def upgraded(client: Session | None = None) -> NodePeer:
    peer = NodePeer(client or session())
    assert peer.client.receive(peer.upgrade) == []
    return peer


def ready(client: Session | None = None) -> NodePeer:
    peer = upgraded(client)
    peer.send(*READY)
    peer.frames_received()
    assert peer.client.state == "ready"
    return peer


def loss_of(client: Session) -> Loss:
    assert client.loss is not None
    return client.loss


def close_code(peer: NodePeer) -> int:
    """Return the code of the one close frame that the client has written."""
    (close,) = [frame for frame in peer.frames_received() if frame.opcode is Opcode.CLOSE]
    return int.from_bytes(close.data[:2], "big")


# --- the handshake ---


def test_upgrade_request_holds_the_percent_encoded_token() -> None:
    first = session(token="a+b/c=&d e").take_output().split(b"\r\n")[0]
    assert first == b"GET /ws?token=a%2Bb%2Fc%3D%26d%20e HTTP/1.1"


def test_upgrade_request_without_a_token_has_no_token_parameter() -> None:
    assert session(token=None).take_output().startswith(b"GET /ws HTTP/1.1\r\n")


def test_token_with_undecodable_bytes_is_sent_byte_for_byte() -> None:
    token = b"t\xff".decode("utf-8", "surrogateescape")
    assert session(token=token).take_output().startswith(b"GET /ws?token=t%FF HTTP/1.1\r\n")


def test_token_reaches_no_log(caplog: pytest.LogCaptureFixture) -> None:
    for name in (
        None,
        "websockets",
        "websockets.client",
        "worker.node.session",
        "worker.node.session.wire",
    ):
        caplog.set_level(logging.DEBUG, logger=name)
    peer = ready(session(token="s3cr3t"))
    peer.client.close(CloseCode.NORMAL_CLOSURE)
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("length", [20, 190, 400])
def test_token_quoted_by_a_node_is_redacted(length: int) -> None:
    token = "eyJhbGciOi" + "t0k" * (length // 3)
    peer = upgraded(session(token=token))
    peer.send({"status": "error", "reason": f"the token {token} was not signed by this node"})
    reason = loss_of(peer.client).reason
    assert "t0k" not in reason
    assert "the token *** was not signed" in reason


def test_both_handshake_frames_are_sent_without_waiting_for_an_answer() -> None:
    peer = NodePeer(session())
    assert peer.client.state == "connecting"
    peer.client.receive(peer.upgrade)
    assert peer.client.state == "registering"
    assert peer.texts() == [
        {"action": "register", "name": "echo"},
        {"action": "agent_hello", "capabilities": ["a", "b"]},
    ]


def test_empty_list_of_capabilities_is_still_sent() -> None:
    assert upgraded(session(capabilities=())).texts()[1] == {
        "action": "agent_hello",
        "capabilities": [],
    }


def test_session_is_ready_only_after_agent_registered() -> None:
    peer = upgraded()
    peer.send(READY[0])
    assert peer.client.state == "registering"
    peer.send({"status": "ok", "action": "something_else"})
    assert peer.client.state == "registering"
    peer.send(READY[1])
    assert peer.client.state == "ready"
    assert peer.client.loss is None


def test_agent_registered_without_a_status_makes_the_session_ready() -> None:
    peer = upgraded()
    peer.send({"action": "agent_registered"})
    assert peer.client.state == "ready"


REFUSED_REGISTRATIONS: list[tuple[Any, LossKind, str]] = [
    (
        {"status": "error", "reason": "name_taken"},
        LossKind.NAME_TAKEN,
        "name_taken: another client holds this agent's name",
    ),
    (
        {"status": "error", "reason": "name_mismatch"},
        LossKind.NAME_MISMATCH,
        "name_mismatch: the token was issued for another agent",
    ),
    (
        {"status": "error", "reason": "not_registered"},
        LossKind.NOT_REGISTERED,
        "not_registered: the node did not accept the registration",
    ),
    (
        {"error": "must register before agent_hello"},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: must register before agent_hello",
    ),
    (
        {"error": "unknown_action"},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: unknown_action",
    ),
    (
        {"status": "error"},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: it gave no reason",
    ),
    (
        {"status": "error", "reason": 5},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: 5",
    ),
    (
        {"status": "error", "reason": {"why": ["x"]}},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: {'why': ['x']}",
    ),
    (
        {"status": "error", "reason": "a\n\x1b[31m b"},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: a ?[31m b",
    ),
    (
        {"status": "error", "reason": "x" * 999},
        LossKind.REGISTRATION_REFUSED,
        "the node refused the registration: " + "x" * 197 + "...",
    ),
]


@pytest.mark.parametrize(
    ("frame", "kind"), [(frame, kind) for frame, kind, _ in REFUSED_REGISTRATIONS]
)
def test_refused_registration_ends_the_session_with_a_close(frame: Any, kind: LossKind) -> None:
    peer = upgraded()
    peer.send(READY[0], frame)
    loss = loss_of(peer.client)
    assert loss.kind is kind
    assert loss.reason.isprintable()
    assert peer.client.state == "closed"
    assert close_code(peer) == 1000


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("frame", "text"), [(frame, text) for frame, _, text in REFUSED_REGISTRATIONS]
)
def test_message_for_a_refused_registration_quotes_the_nodes_reason(frame: Any, text: str) -> None:
    peer = upgraded()
    peer.send(READY[0], frame)
    assert loss_of(peer.client).reason.startswith(text)


def test_queries_after_a_handshake_error_are_discarded() -> None:
    peer = upgraded()
    assert peer.send({"error": "x"}, {"action": "query", "id": "1", "body": "q"}) == []


def test_query_before_agent_registered_is_accepted() -> None:
    assert upgraded().send({"action": "query", "id": "1", "body": "q"}) == [(b'"1"', "q")]


def response(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


NOT_EM_DISCO = "the program at this address is not em_disco"
RESPONSES = [
    (
        response("401 Unauthorized", '{"error":"unauthorized"}'),
        LossKind.UNAUTHORIZED,
        "the node refused the token (401)",
    ),
    (response("403 Forbidden"), LossKind.FORBIDDEN, "the node forbids the connection (403)"),
    (
        response("404 Not Found", "nothing here"),
        LossKind.NOT_FOUND,
        "there is no em_disco at this address (404)",
    ),
    (
        response("429 Too Many Requests", "slow"),
        LossKind.RATE_LIMITED,
        "the node limits how often a client may connect (429)",
    ),
    (
        response("302 Found", "", "Location: https://h/"),
        LossKind.REDIRECTED,
        "the node redirects (302)",
    ),
    (
        response("500 Oops"),
        LossKind.UPGRADE_REFUSED,
        "the node answered 500 instead of the upgrade",
    ),
    (
        response("200 OK", "<html>"),
        LossKind.UPGRADE_REFUSED,
        "the node answered 200 instead of the upgrade",
    ),
    (response("101 Switching Protocols"), LossKind.NOT_EM_DISCO, NOT_EM_DISCO),
    (b"SSH-2.0-OpenSSH_9.6\r\n", LossKind.NOT_EM_DISCO, NOT_EM_DISCO),
    (b"\x15\x03\x01\x00\x02\x02\x0a\r\n\r\n", LossKind.NOT_EM_DISCO, NOT_EM_DISCO),
    (b"HTTP/1.1 101 " + b"x" * 100_000, LossKind.NOT_EM_DISCO, NOT_EM_DISCO),
]


@pytest.mark.parametrize(("data", "kind"), [(data, kind) for data, kind, _ in RESPONSES])
@pytest.mark.parametrize("step", [1, 1_000_000])
def test_response_other_than_an_upgrade_ends_the_session(
    data: bytes, kind: LossKind, step: int
) -> None:
    client = session()
    client.take_output()
    for start in range(0, len(data), step):
        assert client.receive(data[start : start + step]) == []
    assert loss_of(client).kind is kind
    assert client.state == "closed"
    assert b"register" not in client.take_output()


@pytest.mark.message_text
@pytest.mark.parametrize(("data", "text"), [(data, text) for data, _, text in RESPONSES])
def test_message_for_a_refused_upgrade_names_the_status(data: bytes, text: str) -> None:
    client = session()
    client.receive(data)
    assert loss_of(client).reason.startswith(text)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\n\r\nunbounded", LossKind.UNAUTHORIZED),
        (b"", LossKind.NOT_EM_DISCO),
        (b"HTTP/1.1 101", LossKind.NOT_EM_DISCO),
    ],
)
def test_connection_lost_during_the_upgrade_ends_the_session(data: bytes, kind: LossKind) -> None:
    client = session()
    if data:
        client.receive(data)
    client.receive(b"")
    assert loss_of(client).kind is kind


def test_upgrade_with_a_wrong_accept_key_is_refused() -> None:
    peer = NodePeer(session())
    accept = next(
        line for line in peer.upgrade.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Accept")
    )
    wrong = b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA="
    peer.client.receive(peer.upgrade.replace(accept, wrong))
    assert loss_of(peer.client).kind is LossKind.NOT_EM_DISCO


# --- queries and answers ---


@pytest.mark.parametrize(
    "raw",
    [
        '"YWJj=="',
        '""',
        '"\\u00e9\\/ \\n"',
        '"é"',
        "17",
        "-1.50e+3",
        "1e400",
        "true",
        "null",
        '{"a" : [1,  2.0]}',
        "[[]]",
    ],
)
def test_id_of_any_json_type_is_echoed_verbatim(raw: str) -> None:
    peer = ready()
    ((query_id, body),) = peer.send(f'{{"action":"query", "id" : {raw} ,"body":"q"}}'.encode())
    assert body == "q"
    assert peer.client.answer(query_id, b"[1.10]")
    (frame,) = peer.frames_received()
    assert bytes(frame.data) == b'{"action":"result","id":%b,"data":[1.10]}' % raw.encode()


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        ('"  plain, not trimmed \\n"', "  plain, not trimmed \n"),
        ('""', ""),
        ('"{\\"tool\\": [1]}"', '{"tool": [1]}'),
        ('"\\ud83d\\ude00 é"', "\N{GRINNING FACE} é"),
        ('{"tool" :  [1.50]}', '{"tool" :  [1.50]}'),
        ("[]", "[]"),
        ("17", "17"),
        ("false", "false"),
        ("null", "null"),
    ],
)
def test_body_of_any_json_type_is_passed_on_as_text(raw: str, body: str) -> None:
    assert ready().send(f'{{"action":"query","id":1,"body":{raw},"extra":{{}}}}'.encode()) == [
        (b"1", body)
    ]


def test_query_without_a_body_is_answered_with_null() -> None:
    peer = ready()
    assert peer.send({"action": "query", "id": "x"}) == []
    assert peer.texts() == [{"action": "result", "id": "x", "data": None}]
    assert peer.client.ignored == {"query_without_body": 1}


def test_query_without_an_id_is_counted_and_not_answered() -> None:
    peer = ready()
    assert peer.send({"action": "query", "body": "q"}) == []
    assert peer.frames_received() == []
    assert peer.client.ignored == {"query_without_id": 1}


def test_queries_of_one_read_may_be_answered_in_any_order() -> None:
    peer = ready()
    queries = peer.send(
        *({"action": "query", "id": number, "body": str(number)} for number in range(50))
    )
    assert queries == [(str(number).encode(), str(number)) for number in range(50)]
    for query_id, _ in reversed(queries):
        assert peer.client.answer(query_id, b"null")
    assert [answer["id"] for answer in peer.texts()] == list(reversed(range(50)))


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b"hello", "malformed"),
        (b"", "malformed"),
        (b'{"action":"query","id":1,"body":"q"', "malformed"),
        (b'{"action":"query","id":1,"body":"\\ud800"}', "malformed"),
        (b"[1]", "malformed"),
        (b'"query"', "malformed"),
        (b"[" * 2000 + b"]" * 2000, "malformed"),
        (b'{"action":"query","x":' + b"[" * 2000, "malformed"),
        ({}, "unknown_action"),
        ({"action": "dance"}, "unknown_action"),
        ({"action": ["query"]}, "unknown_action"),
        ({"action": {"query": 1}, "id": 1, "body": "q"}, "unknown_action"),
        ({"action": "agent_registered"}, "unknown_action"),
        ({"status": "error", "reason": "invalid_json"}, "error_frame"),
        ({"error": "unknown_action"}, "error_frame"),
    ],
)
def test_unusable_frame_is_counted_and_the_session_continues(message: Any, kind: str) -> None:
    peer = ready()
    assert peer.send(message, {"action": "query", "id": 1, "body": "q"}) == [(b"1", "q")]
    assert peer.client.ignored == {kind: 1}
    assert (peer.client.state, peer.client.loss) == ("ready", None)
    assert peer.frames_received() == []


def test_late_acknowledgement_is_not_counted_as_ignored() -> None:
    peer = ready()
    peer.send(READY[0])
    assert peer.client.ignored == {}


def test_fragments_with_a_ping_between_them_are_joined() -> None:
    peer = ready()
    text = '{"action":"query","id":1,"body":"é"}'.encode()
    # Between the letter's two bytes.
    middle = text.index("é".encode()) + 1
    parts = [
        Frame(Opcode.TEXT, text[:middle], fin=False),
        Frame(Opcode.PING, b"are you there"),
        Frame(Opcode.CONT, text[middle:], fin=False),
        Frame(Opcode.CONT, b"", fin=True),
    ]
    queries = [query for part in parts for query in peer.client.receive(part.serialize(mask=False))]
    assert queries == [(b"1", "é")]
    (pong,) = peer.frames_received()
    assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"are you there")


def test_binary_messages_are_counted_and_ignored() -> None:
    peer = ready()
    query = b'{"action":"query","id":1,"body":"q"}'
    for frame in (
        Frame(Opcode.BINARY, query),
        Frame(Opcode.BINARY, query[:5], fin=False),
        Frame(Opcode.CONT, query[5:], fin=True),
    ):
        assert peer.client.receive(frame.serialize(mask=False)) == []
    assert peer.client.ignored == {"binary": 2}
    assert peer.send({"action": "query", "id": 1, "body": "q"}) == [(b"1", "q")]


# --- the end ---


@pytest.mark.parametrize("fragmented", [False, True])
def test_text_that_is_not_utf8_closes_with_1007(fragmented: bool) -> None:
    peer = ready()
    bad = b'{"action":"query","id":1,"body":"\xff"}'
    data = (
        Frame(Opcode.TEXT, bad[:9], fin=False).serialize(mask=False)
        + Frame(Opcode.CONT, bad[9:]).serialize(mask=False)
        if fragmented
        else text_frame(bad)
    )
    assert peer.client.receive(data + text_frame({"action": "query", "id": 2, "body": "q"})) == []
    assert peer.client.ignored == {"not_utf8": 1}
    assert loss_of(peer.client).kind is LossKind.NOT_UTF8
    assert close_code(peer) == 1007


@pytest.mark.parametrize("fragmented", [False, True])
def test_message_over_the_limit_closes_with_1009(fragmented: bool) -> None:
    peer = ready()
    half = b"x" * (MAX_BYTES // 2 + 1)
    if fragmented:
        peer.client.receive(Frame(Opcode.TEXT, half, fin=False).serialize(mask=False))
        assert peer.client.loss is None
        peer.client.receive(Frame(Opcode.CONT, half).serialize(mask=False))
    else:
        header = Frame(Opcode.TEXT, half * 2).serialize(mask=False)[:10]
        peer.client.receive(header)
    loss = loss_of(peer.client)
    assert loss.kind is LossKind.PROTOCOL_ERROR
    assert "1009" in loss.reason
    assert close_code(peer) == 1009


def test_message_at_the_limit_is_accepted() -> None:
    frame = {"action": "query", "id": 1, "body": ""}
    body = "x" * (MAX_BYTES - len(json.dumps(frame)))
    assert ready().send({**frame, "body": body}) == [(b"1", body)]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1\x00",  # a compressed frame, without negotiation
        b"\x83\x00",  # an opcode that does not exist
        b"\x81\x80\x00\x00\x00\x00",  # a masked frame from a server
        b"\x80\x00",  # a continuation without a first fragment
        b"\x09\x00",  # a fragmented ping
    ],
)
def test_frame_that_breaks_the_protocol_closes_with_1002(data: bytes) -> None:
    peer = ready()
    assert peer.client.receive(data) == []
    loss = loss_of(peer.client)
    assert loss.kind is LossKind.PROTOCOL_ERROR
    assert "1002" in loss.reason
    assert close_code(peer) == 1002


@pytest.mark.parametrize("state", [upgraded, ready])
def test_ping_is_answered_with_its_payload_in_every_state(state: Any) -> None:
    peer = state()
    peer.frames_received()
    peer.protocol.send_ping(b"now")
    peer.client.receive(peer.output())
    (pong,) = peer.frames_received()
    assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"now")


def test_session_waits_for_the_pong_to_its_ping() -> None:
    peer = ready()
    assert peer.client.ponged
    peer.client.ping()
    assert not peer.client.ponged
    assert [frame.opcode for frame in peer.frames_received()] == [Opcode.PING]
    peer.client.receive(peer.output())
    assert peer.client.ponged


def closed_by_the_node() -> NodePeer:
    peer = ready()
    peer.protocol.send_close(CloseCode.GOING_AWAY, "restarting\n")
    peer.client.receive(peer.output())
    return peer


def test_close_by_the_node_is_answered() -> None:
    assert close_code(closed_by_the_node()) == 1001


def test_close_by_the_node_is_a_loss_with_its_code_and_reason() -> None:
    client = closed_by_the_node().client
    assert client.state == "closed"
    loss = loss_of(client)
    assert loss.kind is LossKind.CLOSED_BY_NODE
    assert "1001" in loss.reason
    assert "restarting" in loss.reason


def test_session_sends_nothing_after_a_close_by_the_node() -> None:
    peer = closed_by_the_node()
    peer.frames_received()
    assert not peer.client.answer(b"1", b"null")
    peer.client.ping()
    assert peer.frames_received() == []


@pytest.mark.message_text
def test_message_for_a_close_by_the_node_starts_with_the_code() -> None:
    reason = loss_of(closed_by_the_node().client).reason
    assert reason.startswith("the node closed the connection (1001")


def test_queries_read_together_with_the_close_are_accepted() -> None:
    peer = ready()
    query = text_frame({"action": "query", "id": 1, "body": "q"})
    assert peer.client.receive(query + Frame(Opcode.CLOSE, b"").serialize(mask=False)) == [
        (b"1", "q")
    ]


def test_session_sends_one_close_and_ends_at_the_nodes_echo() -> None:
    peer = ready()
    peer.client.close(CloseCode.GOING_AWAY, "the agent disconnects")
    peer.client.close(CloseCode.GOING_AWAY, "again")
    assert close_code(peer) == 1001
    assert peer.client.loss is None
    peer.client.receive(peer.output())
    loss = loss_of(peer.client)
    assert loss.kind is LossKind.CLOSED_BY_NODE
    assert "1001" in loss.reason


@pytest.mark.parametrize("cut", [0, 1, 2, 20])
def test_session_that_closes_ends_only_at_the_nodes_close(cut: int) -> None:
    peer = ready()
    late = text_frame({"action": "query", "id": "1", "body": "x"})
    if cut:
        assert peer.client.receive(late[:cut]) == []
    peer.client.close(CloseCode.GOING_AWAY, "the agent disconnects")
    assert peer.client.receive(late[cut:] + Frame(Opcode.PING, b"p").serialize(mask=False)) in (
        [],
        [(b'"1"', "x")],
    )
    assert peer.client.loss is None, "the node may not have read every answer yet"
    opcodes = [frame.opcode for frame in peer.frames_received()]
    assert opcodes == [Opcode.CLOSE]
    peer.client.receive(peer.output())
    loss = loss_of(peer.client)
    assert loss.kind is LossKind.CLOSED_BY_NODE
    assert "1001" in loss.reason


def test_connection_lost_without_a_close_is_a_cut() -> None:
    client = ready().client
    client.receive(b"")
    assert client.state == "closed"
    loss = loss_of(client)
    assert loss.kind is LossKind.CUT
    assert client.receive(b"") == []
    assert client.loss is loss


@pytest.mark.message_text
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (text_frame(b"\xff"), "the node sent text that is not UTF-8"),
        (b"", "the node cut the connection"),
    ],
)
def test_message_for_a_lost_connection(data: bytes, text: str) -> None:
    client = ready().client
    client.receive(data)
    assert loss_of(client).reason == text


# --- any messages, split at any byte ---


class Message(NamedTuple):
    """What a node sends, and the expected effect."""

    frames: list[Frame]
    query: tuple[bytes, str] | None = None
    ignored: str | None = None
    answered: bytes | None = None
    last: bool = False


def encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def text(data: bytes, **outcome: Any) -> Message:
    return Message([Frame(Opcode.TEXT, data)], **outcome)


json_ids = st.text(max_size=5) | st.integers() | st.none() | st.lists(st.booleans(), max_size=2)
query_messages = st.builds(
    lambda query_id, body: text(
        encoded({"action": "query", "id": query_id, "body": body}), query=(encoded(query_id), body)
    ),
    json_ids,
    st.text(max_size=20),
)
bodiless = st.builds(
    lambda query_id: text(
        encoded({"action": "query", "id": query_id}),
        ignored="query_without_body",
        answered=encoded(query_id),
    ),
    json_ids,
)
one_frame_messages = (
    query_messages
    | bodiless
    | st.sampled_from(
        [
            text(encoded(READY[0])),
            text(b'{"error":"x"}', ignored="error_frame"),
            text(b'{"status":"error","reason":"name_taken"}', ignored="error_frame"),
            text(b'{"action":"dance"}', ignored="unknown_action"),
            text(b'{"action":"query","body":"q"}', ignored="query_without_id"),
            text(b"{", ignored="malformed"),
            text(b"", ignored="malformed"),
            text("é".encode(), ignored="malformed"),
            Message([Frame(Opcode.BINARY, b"\xff\x00")], ignored="binary"),
        ]
    )
)


@st.composite
def fragmented(draw: st.DrawFn) -> Message:
    """Return a message in fragments, with pings and pongs between them."""
    message = draw(one_frame_messages)
    (whole,) = message.frames
    cuts = sorted(draw(st.lists(st.integers(0, len(whole.data)), max_size=4)))
    parts = [
        whole.data[start:end]
        for start, end in zip([0, *cuts], [*cuts, len(whole.data)], strict=True)
    ]
    frames: list[Frame] = []
    for number, part in enumerate(parts):
        opcode = whole.opcode if number == 0 else Opcode.CONT
        frames.append(Frame(opcode, part, fin=number == len(parts) - 1))
        if number < len(parts) - 1:
            frames += draw(st.lists(st.sampled_from(CONTROL), max_size=2))
    return message._replace(frames=frames)


CONTROL = [
    Frame(Opcode.PING, b""),
    Frame(Opcode.PING, b"p" * 125),
    Frame(Opcode.PONG, b"em-runner"),
]
messages = (
    one_frame_messages | fragmented() | st.sampled_from([Message([frame]) for frame in CONTROL])
)
ends = st.sampled_from(
    [
        text(b'{"action":"query","id":1,"body":"\xff"}', ignored="not_utf8", last=True),
        text(b"x" * (MAX_BYTES + 1), last=True),
        Message([Frame(Opcode.CLOSE, b"\x03\xe8")], last=True),
        Message([Frame(Opcode.CONT, b"x")], last=True),
    ]
)


class Observed(NamedTuple):
    """What a session did with its input."""

    queries: list[tuple[bytes, str]]
    ignored: Counter[str]
    state: str
    loss: Loss | None
    answers: list[bytes]
    pongs: list[bytes]


def run(client: Session, peer: NodePeer, pieces: list[bytes]) -> Observed:
    queries: list[tuple[bytes, str]] = []
    received: list[Frame] = []
    for piece in pieces:
        # The connection reads nothing after the end.
        if not piece or client.loss is not None:
            continue
        queries += client.receive(piece)
        received += peer.frames_received()
    return Observed(
        queries,
        client.ignored,
        client.state,
        client.loss,
        [bytes(frame.data) for frame in received if frame.opcode is Opcode.TEXT][2:],
        [bytes(frame.data) for frame in received if frame.opcode is Opcode.PONG],
    )


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(messages, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_frames_split_at_any_byte_have_the_same_effect(
    sent: list[Message], cuts: list[int]
) -> None:
    frames = [frame.serialize(mask=False) for message in sent for frame in message.frames]
    whole, cut = NodePeer(session()), NodePeer(session())
    registered = b"".join(text_frame(message) for message in READY)
    whole_frames = run(whole.client, whole, [whole.upgrade, registered, *frames])
    split_frames = run(
        cut.client, cut, pieces_of(cut.upgrade + registered + b"".join(frames), cuts)
    )
    assert split_frames == whole_frames
    assert whole_frames.queries == [message.query for message in sent if message.query is not None]
    assert whole_frames.ignored == Counter(
        message.ignored for message in sent if message.ignored is not None
    )
    assert whole_frames.answers == [
        b'{"action":"result","id":%b,"data":null}' % message.answered
        for message in sent
        if message.answered is not None
    ]
    assert len(whole_frames.pongs) == sum(
        frame.opcode is Opcode.PING for message in sent for frame in message.frames
    )
    assert (whole_frames.state, whole_frames.loss) == ("ready", None)


@given(
    st.lists(messages, max_size=5),
    ends,
    st.lists(messages, max_size=5),
    st.lists(st.integers(0, 1 << 20)),
)
def test_frames_after_the_end_have_no_effect(
    before: list[Message], end: Message, after: list[Message], cuts: list[int]
) -> None:
    sent = [*before, end, *after]
    data = b"".join(frame.serialize(mask=False) for message in sent for frame in message.frames)
    peer = ready()
    observed = run(peer.client, peer, pieces_of(data, cuts))
    assert observed.queries == [message.query for message in before if message.query is not None]
    assert observed.ignored == Counter(
        message.ignored for message in [*before, end] if message.ignored is not None
    )
    assert observed.state == "closed"
    assert observed.loss


def raw_frame(opcode: Opcode, data: bytes, fin: bool) -> bytes:
    return bytes([(fin << 7) | opcode, len(data)]) + data


wire = st.one_of(
    st.binary(max_size=200),
    st.builds(raw_frame, st.sampled_from(list(Opcode)), st.binary(max_size=125), st.booleans()),
    messages.map(lambda message: b"".join(frame.serialize(mask=False) for frame in message.frames)),
    st.just(b""),
)


@given(st.lists(wire, max_size=8), st.sampled_from(["connecting", "registering", "ready"]))
@example([b"\x88\x02\x03\xe8", b"", b"\x81\x01\xff", b""], "ready")
@example([b"\x81\x01\xff", b"", b""], "ready")
@example([b"\x01\x01{", b"\x88\x00", b"\x80\x01}"], "ready")
def test_no_input_makes_a_session_raise(pieces: list[bytes], state: str) -> None:
    client = session()
    if state != "connecting":
        (ready if state == "ready" else upgraded)(client)
    for piece in pieces:
        for query_id, _ in client.receive(piece):
            client.answer(query_id, b"null")
        client.ping()
        client.take_output()
    assert client.loss is None or client.loss.reason.isprintable()
    client.close(CloseCode.GOING_AWAY)
    client.receive(b"")
    assert client.loss
    assert client.state == "closed"
