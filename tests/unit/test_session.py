"""`worker.session` against a real WebSocket server without its socket, and against bytes that no server sends."""

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

from shared.nodes import parse_node
from worker.session import Session

MAX_BYTES = 4096
QUIET = logging.getLogger(f"{__name__}.peer")  # what the peer logs is not the session's doing
QUIET.disabled = True
READY = ({"status": "ok", "action": "registered"}, {"status": "ok", "action": "agent_registered", "capabilities": []})


def session(token: str | None = "tok", capabilities: tuple[str, ...] = ("a", "b")) -> Session:
    return Session(parse_node("localhost:8080"), "echo", capabilities, token, MAX_BYTES)


class Peer:
    """A node's end of one session: what the client wrote is decoded by `websockets` as a server decodes it."""

    def __init__(self, client: Session) -> None:
        self.client = client
        self.protocol = ServerProtocol(logger=QUIET)
        self.protocol.receive_data(client.take_output())
        (request,) = self.protocol.events_received()
        assert isinstance(request, Request)
        self.request = request
        self.protocol.send_response(self.protocol.accept(request))
        self.upgrade = self.output()

    def output(self) -> bytes:
        return b"".join(self.protocol.data_to_send())

    def heard(self) -> list[Frame]:
        """Return the frames that the client wrote since the last time."""
        if data := self.client.take_output():
            self.protocol.receive_data(data)
        return [event for event in self.protocol.events_received() if isinstance(event, Frame)]

    def texts(self) -> list[Any]:
        return [json.loads(frame.data) for frame in self.heard() if frame.opcode is Opcode.TEXT]

    def say(self, *messages: Any) -> list[tuple[bytes, str]]:
        return self.client.receive(b"".join(text_frame(message) for message in messages))


def text_frame(message: Any) -> bytes:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    return Frame(Opcode.TEXT, data).serialize(mask=False)


def upgraded(client: Session | None = None) -> Peer:
    peer = Peer(client or session())
    assert peer.client.receive(peer.upgrade) == []
    return peer


def ready(client: Session | None = None) -> Peer:
    peer = upgraded(client)
    peer.say(*READY)
    peer.heard()
    assert peer.client.state == "ready"
    return peer


# --- the handshake ---


def test_session_asks_for_the_upgrade_with_its_token_quoted() -> None:
    first = session(token="a+b/c=&d e").take_output().split(b"\r\n")[0]
    assert first == b"GET /ws?token=a%2Bb%2Fc%3D%26d%20e HTTP/1.1"


def test_session_without_a_token_still_connects_without_the_parameter() -> None:
    assert session(token=None).take_output().startswith(b"GET /ws HTTP/1.1\r\n")


def test_token_of_undecodable_bytes_from_the_environment_is_sent_as_the_bytes_it_was() -> None:
    token = b"t\xff".decode("utf-8", "surrogateescape")
    assert session(token=token).take_output().startswith(b"GET /ws?token=t%FF HTTP/1.1\r\n")


def test_token_reaches_no_log(caplog: pytest.LogCaptureFixture) -> None:
    for name in (None, "websockets", "websockets.client", "worker.session", "worker.session.wire"):
        caplog.set_level(logging.DEBUG, logger=name)
    peer = ready(session(token="s3cr3t"))
    peer.client.close(CloseCode.NORMAL_CLOSURE)
    assert "s3cr3t" not in caplog.text


@pytest.mark.parametrize("length", [20, 190, 400])
def test_token_that_a_node_quotes_is_in_no_reason(length: int) -> None:
    token = "eyJhbGciOi" + "t0k" * (length // 3)
    peer = upgraded(session(token=token))
    peer.say({"status": "error", "reason": f"the token {token} was not signed by this node"})
    assert peer.client.ended is not None
    assert "t0k" not in peer.client.ended
    assert "the token *** was not signed" in peer.client.ended


def test_both_handshake_frames_leave_in_order_without_waiting_for_an_answer() -> None:
    peer = Peer(session())
    assert peer.client.state == "connecting"
    peer.client.receive(peer.upgrade)
    assert peer.client.state == "registering"
    assert peer.texts() == [
        {"action": "register", "name": "echo"},
        {"action": "agent_hello", "capabilities": ["a", "b"]},
    ]


def test_empty_list_of_capabilities_is_still_sent() -> None:
    assert upgraded(session(capabilities=())).texts()[1] == {"action": "agent_hello", "capabilities": []}


def test_session_is_ready_only_once_agent_registered_has_arrived() -> None:
    peer = upgraded()
    peer.say(READY[0])
    assert peer.client.state == "registering"
    peer.say({"status": "ok", "action": "something_else"})
    assert peer.client.state == "registering"
    peer.say(READY[1])
    assert peer.client.state == "ready"
    assert peer.client.ended is None


def test_session_is_ready_by_a_bare_agent_registered_too() -> None:
    peer = upgraded()
    peer.say({"action": "agent_registered"})
    assert peer.client.state == "ready"


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        ({"status": "error", "reason": "name_taken"}, "name_taken: another client holds this agent's name"),
        ({"status": "error", "reason": "name_mismatch"}, "name_mismatch: the token was issued for another agent"),
        ({"status": "error", "reason": "not_registered"}, "not_registered: the node did not take the registration"),
        (
            {"error": "must register before agent_hello"},
            "the node refused the registration: must register before agent_hello",
        ),
        ({"error": "unknown_action"}, "the node refused the registration: unknown_action"),
        ({"status": "error"}, "the node refused the registration: it did not say why"),
        ({"status": "error", "reason": 5}, "the node refused the registration: 5"),
        ({"status": "error", "reason": {"why": ["x"]}}, "the node refused the registration: {'why': ['x']}"),
        ({"status": "error", "reason": "a\n\x1b[31m b"}, "the node refused the registration: a ?[31m b"),
        ({"status": "error", "reason": "x" * 999}, "the node refused the registration: " + "x" * 197 + "..."),
    ],
)
def test_error_in_the_handshake_ends_the_session_with_advice_and_an_orderly_close(frame: Any, says: str) -> None:
    peer = upgraded()
    peer.say(READY[0], frame)
    assert peer.client.ended is not None
    assert peer.client.ended.startswith(says)
    assert peer.client.ended.isprintable()
    assert peer.client.state == "closed"
    closes = [frame for frame in peer.heard() if frame.opcode is Opcode.CLOSE]
    assert len(closes) == 1
    assert closes[0].data[:2] == b"\x03\xe8"


def test_queries_behind_the_error_that_ended_the_handshake_are_not_taken() -> None:
    peer = upgraded()
    assert peer.say({"error": "x"}, {"action": "query", "id": "1", "body": "q"}) == []


def test_query_before_agent_registered_is_taken() -> None:
    assert upgraded().say({"action": "query", "id": "1", "body": "q"}) == [(b'"1"', "q")]


def response(status: str, body: str = "", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (response("401 Unauthorized", '{"error":"unauthorized"}'), "the node refused the token (401)"),
        (response("403 Forbidden"), "the node forbids the connection (403)"),
        (response("404 Not Found", "nothing here"), "there is no em_disco at this address (404)"),
        (response("429 Too Many Requests", "slow"), "the node limits how often one may connect (429)"),
        (response("302 Found", "", "Location: https://h/"), "the node redirects elsewhere (302)"),
        (response("500 Oops"), "the node answered 500 instead of the upgrade"),
        (response("200 OK", "<html>"), "the node answered 200 instead of the upgrade"),
        (response("101 Switching Protocols"), "what answers at this address is no em_disco"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what answers at this address is no em_disco"),
        (b"\x15\x03\x01\x00\x02\x02\x0a\r\n\r\n", "what answers at this address is no em_disco"),
        (b"HTTP/1.1 101 " + b"x" * 100_000, "what answers at this address is no em_disco"),
    ],
)
@pytest.mark.parametrize("step", [1, 1_000_000])
def test_what_is_no_upgrade_ends_the_session_with_what_it_was(data: bytes, says: str, step: int) -> None:
    client = session()
    client.take_output()
    for start in range(0, len(data), step):
        assert client.receive(data[start : start + step]) == []
    assert client.ended is not None
    assert client.ended.startswith(says)
    assert client.state == "closed"
    assert b"register" not in client.take_output()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"HTTP/1.1 401 Unauthorized\r\n\r\nunbounded", "the node refused the token (401)"),
        (b"", "what answers at this address is no em_disco"),
        (b"HTTP/1.1 101", "what answers at this address is no em_disco"),
    ],
)
def test_end_of_the_socket_during_the_upgrade_ends_the_session(data: bytes, says: str) -> None:
    client = session()
    if data:
        client.receive(data)
    client.receive(b"")
    assert client.ended is not None
    assert client.ended.startswith(says)


def test_upgrade_with_a_wrong_accept_key_is_no_em_disco() -> None:
    peer = Peer(session())
    accept = next(line for line in peer.upgrade.split(b"\r\n") if line.startswith(b"Sec-WebSocket-Accept"))
    peer.client.receive(peer.upgrade.replace(accept, b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA="))
    assert peer.client.ended is not None
    assert peer.client.ended.startswith("what answers at this address is no em_disco")


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
    ((query_id, body),) = peer.say(f'{{"action":"query", "id" : {raw} ,"body":"q"}}'.encode())
    assert body == "q"
    assert peer.client.answer(query_id, b"[1.10]")
    (frame,) = peer.heard()
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
def test_body_of_any_json_type_is_handed_on_as_text(raw: str, body: str) -> None:
    assert ready().say(f'{{"action":"query","id":1,"body":{raw},"extra":{{}}}}'.encode()) == [(b"1", body)]


def test_query_without_a_body_is_answered_null_at_once() -> None:
    peer = ready()
    assert peer.say({"action": "query", "id": "x"}) == []
    assert peer.texts() == [{"action": "result", "id": "x", "data": None}]
    assert peer.client.ignored == {"query_without_body": 1}


def test_query_without_an_id_is_counted_and_not_answered() -> None:
    peer = ready()
    assert peer.say({"action": "query", "body": "q"}) == []
    assert peer.heard() == []
    assert peer.client.ignored == {"query_without_id": 1}


def test_queries_of_one_read_come_in_order_and_may_be_answered_in_any() -> None:
    peer = ready()
    queries = peer.say(*({"action": "query", "id": number, "body": str(number)} for number in range(50)))
    assert queries == [(str(number).encode(), str(number)) for number in range(50)]
    for query_id, _ in reversed(queries):
        assert peer.client.answer(query_id, b"null")
    assert [answer["id"] for answer in peer.texts()] == list(reversed(range(50)))


@pytest.mark.parametrize(
    ("message", "reason"),
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
def test_frame_that_means_nothing_is_counted_and_the_session_goes_on(message: Any, reason: str) -> None:
    peer = ready()
    assert peer.say(message, {"action": "query", "id": 1, "body": "q"}) == [(b"1", "q")]
    assert peer.client.ignored == {reason: 1}
    assert (peer.client.state, peer.client.ended) == ("ready", None)
    assert peer.heard() == []


def test_late_acknowledgement_is_nothing_to_count() -> None:
    peer = ready()
    peer.say(READY[0])
    assert peer.client.ignored == {}


def test_fragments_are_put_together_with_a_ping_between_them() -> None:
    peer = ready()
    text = '{"action":"query","id":1,"body":"é"}'.encode()
    middle = text.index("é".encode()) + 1  # within the letter's two bytes
    parts = [
        Frame(Opcode.TEXT, text[:middle], fin=False),
        Frame(Opcode.PING, b"are you there"),
        Frame(Opcode.CONT, text[middle:], fin=False),
        Frame(Opcode.CONT, b"", fin=True),
    ]
    queries = [query for part in parts for query in peer.client.receive(part.serialize(mask=False))]
    assert queries == [(b"1", "é")]
    assert [(frame.opcode, bytes(frame.data)) for frame in peer.heard()] == [(Opcode.PONG, b"are you there")]


def test_binary_messages_are_counted_whole_or_in_fragments() -> None:
    peer = ready()
    query = b'{"action":"query","id":1,"body":"q"}'
    for frame in (
        Frame(Opcode.BINARY, query),
        Frame(Opcode.BINARY, query[:5], fin=False),
        Frame(Opcode.CONT, query[5:], fin=True),
    ):
        assert peer.client.receive(frame.serialize(mask=False)) == []
    assert peer.client.ignored == {"binary": 2}
    assert peer.say({"action": "query", "id": 1, "body": "q"}) == [(b"1", "q")]


# --- the end ---


def closed_with(peer: Peer) -> int:
    (close,) = [frame for frame in peer.heard() if frame.opcode is Opcode.CLOSE]
    return int.from_bytes(close.data[:2], "big")


@pytest.mark.parametrize("fragmented", [False, True])
def test_text_that_is_not_utf8_is_answered_with_1007_and_nothing_after_it_is_read(fragmented: bool) -> None:
    peer = ready()
    bad = b'{"action":"query","id":1,"body":"\xff"}'
    data = (
        Frame(Opcode.TEXT, bad[:9], fin=False).serialize(mask=False) + Frame(Opcode.CONT, bad[9:]).serialize(mask=False)
        if fragmented
        else text_frame(bad)
    )
    assert peer.client.receive(data + text_frame({"action": "query", "id": 2, "body": "q"})) == []
    assert peer.client.ignored == {"not_utf8": 1}
    assert peer.client.ended == "the node sent text that is not UTF-8"
    assert closed_with(peer) == 1007


@pytest.mark.parametrize("fragmented", [False, True])
def test_message_over_the_limit_is_answered_with_1009(fragmented: bool) -> None:
    peer = ready()
    half = b"x" * (MAX_BYTES // 2 + 1)
    if fragmented:
        peer.client.receive(Frame(Opcode.TEXT, half, fin=False).serialize(mask=False))
        assert peer.client.ended is None
        peer.client.receive(Frame(Opcode.CONT, half).serialize(mask=False))
    else:
        peer.client.receive(Frame(Opcode.TEXT, half * 2).serialize(mask=False)[:10])  # the header says enough
    assert peer.client.ended is not None
    assert "1009" in peer.client.ended
    assert closed_with(peer) == 1009


def test_message_at_the_limit_is_read() -> None:
    frame = {"action": "query", "id": 1, "body": ""}
    body = "x" * (MAX_BYTES - len(json.dumps(frame)))
    assert ready().say({**frame, "body": body}) == [(b"1", body)]


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1\x00",  # a compressed frame, which nobody negotiated
        b"\x83\x00",  # an opcode that does not exist
        b"\x81\x80\x00\x00\x00\x00",  # a masked frame from a server
        b"\x80\x00",  # the continuation of nothing
        b"\x09\x00",  # a ping in fragments
    ],
)
def test_frame_that_breaks_the_protocol_is_answered_with_1002(data: bytes) -> None:
    peer = ready()
    assert peer.client.receive(data) == []
    assert peer.client.ended is not None
    assert "1002" in peer.client.ended
    assert closed_with(peer) == 1002


@pytest.mark.parametrize("state", [upgraded, ready])
def test_ping_is_answered_with_its_payload_in_every_state(state: Any) -> None:
    peer = state()
    peer.heard()
    peer.protocol.send_ping(b"now")
    peer.client.receive(peer.output())
    assert [(frame.opcode, bytes(frame.data)) for frame in peer.heard()] == [(Opcode.PONG, b"now")]


def test_own_ping_is_open_until_the_node_answers_it() -> None:
    peer = ready()
    assert peer.client.ponged
    peer.client.ping()
    assert not peer.client.ponged
    assert [frame.opcode for frame in peer.heard()] == [Opcode.PING]
    peer.client.receive(peer.output())
    assert peer.client.ponged


def test_close_of_the_node_is_answered_and_its_words_are_kept() -> None:
    peer = ready()
    peer.protocol.send_close(CloseCode.GOING_AWAY, "restarting\n")
    peer.client.receive(peer.output())
    assert peer.client.state == "closed"
    assert peer.client.ended is not None
    assert peer.client.ended.startswith("the node closed the connection (1001")
    assert "restarting" in peer.client.ended
    assert closed_with(peer) == 1001
    assert not peer.client.answer(b"1", b"null"), "the session is over"
    peer.client.ping()
    assert peer.heard() == []


def test_queries_read_together_with_the_close_are_still_taken() -> None:
    peer = ready()
    query = text_frame({"action": "query", "id": 1, "body": "q"})
    assert peer.client.receive(query + Frame(Opcode.CLOSE, b"").serialize(mask=False)) == [(b"1", "q")]


def test_own_close_is_sent_once_and_ends_the_session_once_the_node_echoes_it() -> None:
    peer = ready()
    peer.client.close(CloseCode.GOING_AWAY, "the agent leaves")
    peer.client.close(CloseCode.GOING_AWAY, "again")
    assert closed_with(peer) == 1001
    assert peer.client.ended is None
    peer.client.receive(peer.output())
    assert peer.client.ended is not None
    assert peer.client.ended.startswith("the node closed the connection (1001")


@pytest.mark.parametrize("cut", [0, 1, 2, 20])
def test_what_a_node_sends_after_our_close_does_not_end_the_session_before_its_own(cut: int) -> None:
    peer = ready()
    late = text_frame({"action": "query", "id": "1", "body": "x"})
    if cut:
        assert peer.client.receive(late[:cut]) == []
    peer.client.close(CloseCode.GOING_AWAY, "the agent leaves")
    assert peer.client.receive(late[cut:] + Frame(Opcode.PING, b"p").serialize(mask=False)) in ([], [(b'"1"', "x")])
    assert peer.client.ended is None, "its answers may still lie unread at the node"
    heard = [frame.opcode for frame in peer.heard()]
    assert heard == [Opcode.CLOSE]
    peer.client.receive(peer.output())
    assert peer.client.ended is not None
    assert "1001" in peer.client.ended


def test_socket_that_ends_without_a_close_is_a_cut() -> None:
    peer = ready()
    peer.client.receive(b"")
    assert (peer.client.state, peer.client.ended) == ("closed", "the node cut the connection")
    assert peer.client.receive(b"") == [], "the end may be told twice"


# --- whatever comes, cut wherever ---


class Message(NamedTuple):
    """What a node sends, and what must come of it: a query, or a reason to ignore it, or nothing."""

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
        encoded({"action": "query", "id": query_id}), ignored="query_without_body", answered=encoded(query_id)
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
    parts = [whole.data[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole.data)], strict=True)]
    frames: list[Frame] = []
    for number, part in enumerate(parts):
        opcode = whole.opcode if number == 0 else Opcode.CONT
        frames.append(Frame(opcode, part, fin=number == len(parts) - 1))
        if number < len(parts) - 1:
            frames += draw(st.lists(st.sampled_from(CONTROL), max_size=2))
    return message._replace(frames=frames)


CONTROL = [Frame(Opcode.PING, b""), Frame(Opcode.PING, b"p" * 125), Frame(Opcode.PONG, b"em-runner")]
messages = one_frame_messages | fragmented() | st.sampled_from([Message([frame]) for frame in CONTROL])
ends = st.sampled_from(
    [
        text(b'{"action":"query","id":1,"body":"\xff"}', ignored="not_utf8", last=True),
        text(b"x" * (MAX_BYTES + 1), last=True),
        Message([Frame(Opcode.CLOSE, b"\x03\xe8")], last=True),
        Message([Frame(Opcode.CONT, b"x")], last=True),
    ]
)


class Told(NamedTuple):
    """What came of a run."""

    queries: list[tuple[bytes, str]]
    ignored: Counter[str]
    state: str
    ended: str | None
    answers: list[bytes]
    pongs: list[bytes]


def run(client: Session, peer: Peer, pieces: list[bytes]) -> Told:
    queries: list[tuple[bytes, str]] = []
    heard: list[Frame] = []
    for piece in pieces:
        if not piece or client.ended is not None:
            continue  # nobody reads on after the end
        queries += client.receive(piece)
        heard += peer.heard()
    return Told(
        queries,
        client.ignored,
        client.state,
        client.ended,
        [bytes(frame.data) for frame in heard if frame.opcode is Opcode.TEXT][2:],
        [bytes(frame.data) for frame in heard if frame.opcode is Opcode.PONG],
    )


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.lists(messages, max_size=12), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_frames_cut_at_any_byte_mean_what_they_mean_one_by_one(sent: list[Message], cuts: list[int]) -> None:
    frames = [frame.serialize(mask=False) for message in sent for frame in message.frames]
    whole, cut = Peer(session()), Peer(session())
    registered = b"".join(text_frame(message) for message in READY)
    one_by_one = run(whole.client, whole, [whole.upgrade, registered, *frames])
    at_any_byte = run(cut.client, cut, pieces_of(cut.upgrade + registered + b"".join(frames), cuts))
    assert at_any_byte == one_by_one
    assert one_by_one.queries == [message.query for message in sent if message.query is not None]
    assert one_by_one.ignored == Counter(message.ignored for message in sent if message.ignored is not None)
    assert one_by_one.answers == [
        b'{"action":"result","id":%b,"data":null}' % message.answered
        for message in sent
        if message.answered is not None
    ]
    assert len(one_by_one.pongs) == sum(frame.opcode is Opcode.PING for message in sent for frame in message.frames)
    assert (one_by_one.state, one_by_one.ended) == ("ready", None)


@given(st.lists(messages, max_size=5), ends, st.lists(messages, max_size=5), st.lists(st.integers(0, 1 << 20)))
def test_frames_behind_the_end_mean_nothing_wherever_they_are_cut(
    before: list[Message], end: Message, after: list[Message], cuts: list[int]
) -> None:
    sent = [*before, end, *after]
    data = b"".join(frame.serialize(mask=False) for message in sent for frame in message.frames)
    peer = ready()
    told = run(peer.client, peer, pieces_of(data, cuts))
    assert told.queries == [message.query for message in before if message.query is not None]
    assert told.ignored == Counter(message.ignored for message in [*before, end] if message.ignored is not None)
    assert told.state == "closed"
    assert told.ended


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
def test_no_bytes_make_a_session_raise(pieces: list[bytes], state: str) -> None:
    client = session()
    if state != "connecting":
        (ready if state == "ready" else upgraded)(client)
    for piece in pieces:
        for query_id, _ in client.receive(piece):
            client.answer(query_id, b"null")
        client.ping()
        client.take_output()
    assert client.ended is None or client.ended.isprintable()
    client.close(CloseCode.GOING_AWAY)
    client.receive(b"")
    assert client.ended
    assert client.state == "closed"
