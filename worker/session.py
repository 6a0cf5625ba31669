"""What one connection to a node means, without a socket: bytes in, queries out; answers in, bytes out.

Sans-I/O: `websockets` decides about frames (RFC 6455), this module about what is in them. Whole text
frames, which are nearly all there is, take the short way past it (`worker.framing`). It holds no
clock and never raises for what a node sends; a session that cannot go on says why in `ended`.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final, Literal
from urllib.parse import quote

import msgspec
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import OPEN
from websockets.uri import parse_uri

from shared import frames
from shared.logs import printable_line
from shared.nodes import NodeAddress
from shared.redaction import redact
from worker.framing import Splitter, TextFrames

SessionState = Literal["connecting", "registering", "ready", "closed"]

# websockets logs the request line, and with it the token, at debug level. No configuration can
# wake a logger that is not in the tree.
_SILENT: Final = logging.Logger("worker.session.wire")
_SILENT.disabled = True

_ADVICE: Final = {
    "name_taken": "another client holds this agent's name at the node; it is tried again until the name is free",
    "name_mismatch": "the token was issued for another agent: its 'sub' must be this agent's name",
    "not_registered": "the node did not take the registration",
}
_STATUS_ADVICE: Final = {
    401: "the node refused the token (401); is it missing, expired, or signed with another secret?",
    403: "the node forbids the connection (403)",
    404: "there is no em_disco at this address (404): check host and port",
    429: "the node limits how often one may connect (429)",
}

SAID_CHARS: Final = 8192
"""How much of a peer's words is looked at: what is told of them is less."""

_END_OF_HEAD: Final = b"\r\n\r\n"

Query = tuple[bytes, str]
"""A query's id, as the JSON it came in, and its body."""


class Session:
    """One WebSocket connection of an agent to a node, from the upgrade request to the close.

    Attributes:
        state: `connecting` until the upgrade is answered, `registering` until `agent_registered`.
        ended: why the session cannot go on, in words for an operator; None while it can.
        ignored: how many frames meant nothing here, by reason.
        ponged: whether the last ping has been answered.
    """

    def __init__(
        self, node: NodeAddress, agent: str, capabilities: tuple[str, ...], token: str | None, max_frame_bytes: int
    ) -> None:
        self.state: SessionState = "connecting"
        self.ended: str | None = None
        self.ignored: Counter[str] = Counter()
        self.ponged = True
        self._agent = agent
        self._token = token
        self._capabilities = capabilities
        self._message: bytearray | None = None
        self._message_is_text = False
        self._splitter = Splitter(max_frame_bytes)
        self._text_frames = TextFrames()
        self._output: list[bytes] = []
        self._head_end = b""
        self._leaving = False
        query = f"?token={quote(token, safe='', errors='surrogateescape')}" if token else ""
        self._protocol = ClientProtocol(parse_uri(node.url + query), max_size=max_frame_bytes, logger=_SILENT)
        self._protocol.send_request(self._protocol.connect())
        self._put_output()

    # --- to the node ---

    def answer(self, query_id: bytes, data: bytes) -> bool:
        """Queue the result of a query; `data` is JSON. Return False when the session is over."""
        if self._protocol.state is not OPEN:
            return False
        self._output.append(self._text_frames.frame(frames.result(query_id, data)))
        return True

    def ping(self) -> None:
        """Queue a ping; `ponged` is false until the node answers it."""
        if self._protocol.state is OPEN:
            self.ponged = False
            self._protocol.send_ping(b"em-runner")
            self._put_output()

    def close(self, code: int, reason: str = "") -> None:
        """Begin the closing handshake."""
        if self._protocol.state is OPEN:
            self._leaving = True
            self._protocol.send_close(code, reason)
            self._put_output()

    def take_output(self) -> bytes:
        """Return what is to be written now; `b""` when there is nothing."""
        output, self._output = self._output, []
        return b"".join(output)

    def _put_output(self) -> None:
        """Queue what `websockets` wants sent, behind the answers that were queued before."""
        self._output += self._protocol.data_to_send()

    # --- from the node ---

    def receive(self, data: bytes) -> list[Query]:
        """Take what the socket read (`b""` for its end) and return the queries in it, in order."""
        queries: list[Query] = []
        try:
            if not data:
                self._protocol.receive_data(self._splitter.take_rest())
                self._protocol.receive_eof()
                self._take_events(queries)
            elif self._protocol.state is OPEN:
                self._receive_frames(data, queries)
            elif self.state == "connecting":
                self._receive_head(data, queries)
            else:  # we are about to leave: what matters is the node's own close, wherever it comes
                self._protocol.receive_data(self._splitter.take_rest() + data)
                self._take_events(queries)
        except Exception as exc:  # noqa: BLE001 - whatever a node provokes ends its session, not the worker
            self._end(f"the node's bytes could not be read: {self._said(exc)}")
        self._put_output()
        self._look_for_end(eof=not data)
        return queries

    def _receive_head(self, data: bytes, queries: list[Query]) -> None:
        """Take the answer to the upgrade request; what comes behind it in the same read is frames already."""
        seen = self._head_end + data
        found = seen.find(_END_OF_HEAD)
        end = len(data) if found < 0 else found + len(_END_OF_HEAD) - len(self._head_end)
        self._head_end = seen[1 - len(_END_OF_HEAD) :]
        self._protocol.receive_data(data[:end])
        self._take_events(queries)
        if end == len(data):
            return
        if self._protocol.state is OPEN:
            self._receive_frames(data[end:], queries)
        else:
            self._protocol.receive_data(data[end:])
            self._take_events(queries)

    def _receive_frames(self, data: bytes, queries: list[Query]) -> None:
        for is_text, piece in self._splitter.split(data):
            if self.ended is not None or self._protocol.state is not OPEN:
                return  # what follows the frame that ended the session means nothing
            if is_text:
                self._text(piece, queries)
            else:
                self._protocol.receive_data(piece)
                self._take_events(queries)

    def _take_events(self, queries: list[Query]) -> None:
        for event in self._protocol.events_received():
            if self.ended is not None:
                return
            if isinstance(event, Frame):
                self._frame(event, queries)
            elif isinstance(event, Response) and self._protocol.handshake_exc is None:
                self._upgraded()

    def _upgraded(self) -> None:
        # Both frames at once, without waiting for the answer to the first.
        if self._protocol.state is not OPEN:
            return  # the close came right behind the upgrade
        self.state = "registering"
        self._protocol.send_text(frames.encode(frames.Register(self._agent)))
        self._protocol.send_text(frames.encode(frames.AgentHello(self._capabilities)))
        self._put_output()

    def _frame(self, frame: Frame, queries: list[Query]) -> None:
        opcode = frame.opcode
        if opcode is Opcode.TEXT and frame.fin:
            self._text(bytes(frame.data), queries)
        elif opcode is Opcode.TEXT or opcode is Opcode.BINARY:
            self._begin(frame, text=opcode is Opcode.TEXT)
        elif opcode is Opcode.CONT:
            self._continue(frame, queries)
        elif opcode is Opcode.PONG:
            self.ponged = True

    def _begin(self, frame: Frame, *, text: bool) -> None:
        if frame.fin:
            self.ignored["binary"] += 1
            return
        self._message = bytearray(frame.data if text else b"")
        self._message_is_text = text

    def _continue(self, frame: Frame, queries: list[Query]) -> None:
        if self._message is None:
            return
        if self._message_is_text:
            self._message += frame.data
        if not frame.fin:
            return
        message, self._message = bytes(self._message), None
        if self._message_is_text:
            self._text(message, queries)
        else:
            self.ignored["binary"] += 1

    def _text(self, text: bytes, queries: list[Query]) -> None:
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError:  # RFC 6455, 8.1: the connection must be failed
                self._protocol.fail(CloseCode.INVALID_DATA, "not UTF-8")
                self._end("the node sent text that is not UTF-8")
                self.ignored["not_utf8"] += 1
                return
        try:
            frame = frames.decode_node_frame(text)
        except (msgspec.DecodeError, RecursionError):
            self._undecodable(text, queries)
            return
        if frame.action == frames.QUERY:
            self._query(frame, text, queries)
        elif frame.error is not None or frame.status == "error":
            self._error(frame)
        elif frame.action == frames.AGENT_REGISTERED and self.state == "registering":
            self.state = "ready"
        elif frame.action != frames.REGISTERED:
            self.ignored["unknown_action"] += 1

    def _query(self, frame: frames.NodeFrame, text: bytes, queries: list[Query]) -> None:
        query_id = bytes(frame.id)
        if not query_id:
            self.ignored["query_without_id"] += 1
        elif type(frame.body) is str:
            queries.append((query_id, frame.body))
        elif frame.body is msgspec.UNSET:
            # Nobody can answer it, but the node waits: `null` is the harmless answer.
            self.ignored["query_without_body"] += 1
            self.answer(query_id, b"null")
        else:
            # A handler is promised text: the JSON of a body that is none.
            queries.append((query_id, bytes(frames.decode_raw_query(text).body).decode()))

    def _undecodable(self, text: bytes, queries: list[Query]) -> None:
        """Take a frame with a value that Python's types cannot hold, such as 1e999; a query in it is answered."""
        try:
            frame = frames.decode_raw_query(text)
        except (msgspec.DecodeError, RecursionError):
            self.ignored["malformed"] += 1
            return
        query_id, body = bytes(frame.id), bytes(frame.body)
        if frame.action == frames.QUERY and query_id and body and not body.startswith(b'"'):
            queries.append((query_id, body.decode()))
            return
        self.ignored["malformed"] += 1
        if frame.action == frames.QUERY and query_id:
            self.answer(query_id, b"null")

    def _error(self, frame: frames.NodeFrame) -> None:
        said = frame.reason if frame.reason is not None else frame.error
        reason = "" if said is None else str(said)
        if self.state == "registering":
            self._end(self._not_registered(reason))
            self.close(CloseCode.NORMAL_CLOSURE)
        else:
            self.ignored["error_frame"] += 1

    def _not_registered(self, reason: str) -> str:
        if reason in _ADVICE:
            return f"{reason}: {_ADVICE[reason]}"
        # The node's own words last: they may be others each time, and are no kind by which lines are folded.
        return f"the node refused the registration: {self._said(reason) if reason else 'it did not say why'}"

    def _look_for_end(self, *, eof: bool) -> None:
        protocol = self._protocol
        if protocol.handshake_exc is not None:
            self._end(self._refusal(protocol.handshake_exc))
        elif protocol.close_rcvd is not None:
            self._end(f"the node closed the connection ({self._said(protocol.close_rcvd)})")
        elif protocol.close_sent is not None and not self._leaving:
            self._end(f"the connection was closed ({self._said(protocol.close_sent)})")
        elif eof:
            self._end("the node cut the connection")

    def _end(self, why: str) -> None:
        self.state = "closed"
        if self.ended is None:
            self.ended = why

    def _refusal(self, exc: Exception) -> str:
        """Return why the upgrade failed, from what the node answered instead."""
        if isinstance(exc, InvalidStatus):
            status = exc.response.status_code
            if 300 <= status < 400:
                return f"the node redirects elsewhere ({status}), which is not followed: configure its own address"
            return _STATUS_ADVICE.get(status, f"the node answered {status} instead of the upgrade")
        return f"what answers at this address is no em_disco: {self._said(exc)}"

    def _said(self, text: object) -> str:
        """Return a peer's words as one short printable line, without our token: it may quote what it was told."""
        line = printable_line(redact(str(text)[:SAID_CHARS], self._token))  # a node may say megabytes
        return line if len(line) <= 200 else line[:197] + "..."
