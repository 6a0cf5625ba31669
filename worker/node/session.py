"""What the bytes of one connection to a node mean. It needs no socket and no clock.

`Session` turns bytes into queries, and answers into bytes. `websockets` decides about frames (RFC
6455), this module about their content. Whole text frames, which are nearly all, are read and
written by `worker.node._framing` instead. Nothing that a node sends makes a session raise: `loss`
says why it cannot continue.
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
from shared.config.nodes import NodeAddress
from shared.logs.logger import printable_line
from shared.logs.redaction import redact
from worker.node._framing import TextFraming
from worker.node.losses import Loss, LossKind

SessionState = Literal["connecting", "registering", "ready", "closed"]

_SEARCHED_CHARS: Final = 8192
"""How much of a node's text is searched for the token. At most 200 characters are quoted."""

# websockets logs the request line, which has the token, at debug level. A logger that is not in the
# tree of loggers cannot be enabled by any configuration.
_SILENT: Final = logging.Logger("worker.node.session.wire")
_SILENT.disabled = True

_REGISTRATION_LOSSES: Final = {
    "name_taken": Loss(
        LossKind.NAME_TAKEN,
        "name_taken: another client holds this agent's name at the node; "
        "the worker retries until it is free",
    ),
    "name_mismatch": Loss(
        LossKind.NAME_MISMATCH,
        "name_mismatch: the token was issued for another agent: "
        "its 'sub' must be this agent's name",
    ),
    "not_registered": Loss(
        LossKind.NOT_REGISTERED,
        "not_registered: the node did not accept the registration",
    ),
}
_STATUS_LOSSES: Final = {
    401: Loss(
        LossKind.UNAUTHORIZED,
        "the node refused the token (401); is it missing, expired, or signed with another secret?",
    ),
    403: Loss(
        LossKind.FORBIDDEN,
        "the node forbids the connection (403)",
    ),
    404: Loss(
        LossKind.NOT_FOUND,
        "there is no em_disco at this address (404): check host and port",
    ),
    429: Loss(
        LossKind.RATE_LIMITED,
        "the node limits how often a client may connect (429)",
    ),
}

_END_OF_HEAD: Final = b"\r\n\r\n"

ReceivedQuery = tuple[bytes, str]
"""A query's id, as the JSON that the node sent, and its body."""


class Session:
    """One WebSocket connection of an agent to a node, from the upgrade request to the close.

    Attributes:
        state: `connecting` until the upgrade is answered, `registering` until `agent_registered`.
        loss: why the session cannot continue. None while it can.
        ignored: how many frames were invalid or unknown, by kind.
        ponged: whether the last ping has been answered.
    """

    def __init__(
        self,
        node: NodeAddress,
        agent: str,
        capabilities: tuple[str, ...],
        token: str | None,
        max_frame_bytes: int,
    ) -> None:
        self.state: SessionState = "connecting"
        self.loss: Loss | None = None
        self.ignored: Counter[str] = Counter()
        self.ponged = True
        self._agent = agent
        self._token = token
        self._capabilities = capabilities
        self._queries: list[ReceivedQuery] = []
        self._message: bytearray | None = None
        self._framing = TextFraming(max_frame_bytes)
        self._output: list[bytes] = []
        self._last_head_bytes = b""
        self._closing = False
        # `surrogateescape`: a token from the environment may have bytes that are not UTF-8, and the
        # node must get these bytes.
        query = f"?token={quote(token, safe='', errors='surrogateescape')}" if token else ""
        self._protocol = ClientProtocol(
            parse_uri(node.url + query),
            max_size=max_frame_bytes,
            logger=_SILENT,
        )
        self._protocol.send_request(self._protocol.connect())
        self._queue_output()

    # --- to the node ---

    def answer(self, query_id: bytes, data: bytes) -> bool:
        """Queue the result of a query. `data` is JSON. Return False if the session is over."""
        if self._protocol.state is not OPEN:
            return False
        self._output.append(self._framing.frame(frames.result(query_id, data)))
        return True

    def ping(self) -> None:
        """Queue a ping. `ponged` is False until the node answers it."""
        if self._protocol.state is OPEN:
            self.ponged = False
            self._protocol.send_ping(b"em-runner")
            self._queue_output()

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake."""
        if self._protocol.state is OPEN:
            self._closing = True
            self._protocol.send_close(code, reason)
            self._queue_output()

    def take_output(self) -> bytes:
        """Return the bytes to write now. `b""` if there are none."""
        output = self._output
        self._output = []
        return b"".join(output)

    def _queue_output(self) -> None:
        """Queue what `websockets` wants to send."""
        # Answers do not pass through `websockets`. To keep the order, its output is queued at once.
        self._output += self._protocol.data_to_send()

    # --- from the node ---

    def receive(self, data: bytes) -> list[ReceivedQuery]:
        """Process what the socket read (`b""` at its end). Return the queries in it, in order."""
        try:
            if not data:
                self._feed(self._framing.take_rest())
                self._protocol.receive_eof()
                self._take_events()
            elif self._protocol.state is OPEN:
                self._receive_frames(data)
            elif self.state == "connecting":
                self._receive_head(data)
            else:
                # The session is closing. Only the node's close frame matters, wherever it is in the
                # data.
                self._feed(self._framing.take_rest() + data)
        except Exception as exc:  # noqa: BLE001 - a node can end its session, not the worker
            reason = f"the node's bytes cannot be read: {self._quote(exc)}"
            self._end(LossKind.UNREADABLE, reason)
        self._queue_output()
        self._check_end(not data)
        queries = self._queries
        self._queries = []
        return queries

    def _feed(self, data: bytes) -> None:
        """Have `websockets` read bytes, and act on what it finds."""
        self._protocol.receive_data(data)
        self._take_events()

    def _receive_head(self, data: bytes) -> None:
        """Process the response to the upgrade request."""
        # The same read may contain frames after the response. `websockets` must not get them: it
        # would keep the start of an incomplete frame, and the framing would mistake the rest of it
        # for the start of another frame. The blank line that ends the response may be split between
        # two reads.
        seen = self._last_head_bytes + data
        found = seen.find(_END_OF_HEAD)
        end = len(data) if found < 0 else found + len(_END_OF_HEAD) - len(self._last_head_bytes)
        self._last_head_bytes = seen[1 - len(_END_OF_HEAD) :]
        self._feed(data[:end])
        if self._protocol.state is OPEN:
            self._receive_frames(data[end:])
        else:
            self._feed(data[end:])

    def _receive_frames(self, data: bytes) -> None:
        for is_text, piece in self._framing.split(data):
            # A frame may have ended the session. The frames after it are ignored.
            if self.loss is not None or self._protocol.state is not OPEN:
                return
            if is_text:
                self._receive_text(piece)
            else:
                self._feed(piece)

    def _take_events(self) -> None:
        for event in self._protocol.events_received():
            if self.loss is not None:
                return
            if isinstance(event, Frame):
                self._receive_frame(event)
            elif isinstance(event, Response) and self._protocol.handshake_exc is None:
                self._register()

    def _register(self) -> None:
        if self._protocol.state is not OPEN:
            return  # the node's close came in the same read
        self.state = "registering"
        # Both frames at once: waiting for the answer to the first would cost a round trip. The name
        # must equal the token's `sub`. An empty list of capabilities is sent, too.
        register = {"action": frames.REGISTER, "name": self._agent}
        hello = {"action": frames.AGENT_HELLO, "capabilities": self._capabilities}
        self._protocol.send_text(frames.encode(register))
        self._protocol.send_text(frames.encode(hello))
        self._queue_output()

    def _receive_frame(self, frame: Frame) -> None:
        """Process a frame that the framing has left to `websockets`."""
        # `websockets` has checked the order of fragments, and their total size. It answers pings
        # and closes. Control frames may come between two fragments (RFC 6455, 5.4).
        if frame.opcode is Opcode.PONG:
            self.ponged = True
            return
        if frame.opcode is Opcode.TEXT:
            self._message = bytearray(frame.data)
        elif frame.opcode is Opcode.BINARY:
            self._message = None  # it is only counted, so its data is not kept
        elif frame.opcode is not Opcode.CONT:
            return
        elif self._message is not None:
            self._message += frame.data
        if not frame.fin:
            return
        message = self._message
        self._message = None
        if message is None:
            self.ignored["binary"] += 1
        else:
            self._receive_text(message)

    def _receive_text(self, text: bytes | bytearray) -> None:
        # The JSON decoder skips values that are not needed, and does not check their UTF-8.
        if not text.isascii():
            try:
                text.decode()
            except UnicodeDecodeError:  # RFC 6455, 8.1: the connection must be failed
                self._protocol.fail(CloseCode.INVALID_DATA, "not UTF-8")
                self._end(LossKind.NOT_UTF8, "the node sent text that is not UTF-8")
                self.ignored["not_utf8"] += 1
                return
        try:
            frame = frames.decode_node_frame(text)
        except (msgspec.DecodeError, RecursionError):
            self._receive_undecodable(text)
            return
        if frame.action == frames.QUERY:
            self._receive_query(frame, text)
        elif frame.error is not None or frame.status == "error":
            self._receive_error(frame)
        elif frame.action == frames.AGENT_REGISTERED and self.state == "registering":
            self.state = "ready"
        elif frame.action != frames.REGISTERED:
            self.ignored["unknown_action"] += 1

    def _receive_query(self, frame: frames.NodeFrame, text: bytes | bytearray) -> None:
        query_id = bytes(frame.id)
        if not query_id:
            self.ignored["query_without_id"] += 1
        elif type(frame.body) is str:
            self._queries.append((query_id, frame.body))
        elif frame.body is msgspec.UNSET:
            # No handler can answer it. Without the `null`, the node would wait for its timeout.
            self.ignored["query_without_body"] += 1
            self.answer(query_id, b"null")
        else:
            # A handler gets text. It gets any other body as JSON, exactly as the node sent it.
            body = frames.decode_raw_query(text).body
            self._queries.append((query_id, bytes(body).decode()))

    def _receive_undecodable(self, text: bytes | bytearray) -> None:
        """Process a frame that is not JSON, or has a number that msgspec refuses, such as 1e999."""
        # If it is a query, it is still answered. A body that is not a string goes to the handler as
        # JSON. If the body is a string, no text can be decoded from it, so the answer is `null`.
        try:
            frame = frames.decode_raw_query(text)
        except (msgspec.DecodeError, RecursionError):
            self.ignored["malformed"] += 1
            return
        query_id = bytes(frame.id)
        body = bytes(frame.body)
        is_query = frame.action == frames.QUERY and query_id
        if is_query and body and not body.startswith(b'"'):
            self._queries.append((query_id, body.decode()))
            return
        self.ignored["malformed"] += 1
        if is_query:
            self.answer(query_id, b"null")

    def _receive_error(self, frame: frames.NodeFrame) -> None:
        if self.state != "registering":
            self.ignored["error_frame"] += 1
            return
        reason = frame.error if frame.reason is None else frame.reason
        self._end(*self._registration_loss(None if reason is None else str(reason)))
        self.close(CloseCode.NORMAL_CLOSURE)

    def _registration_loss(self, reason: str | None) -> Loss:
        if reason in _REGISTRATION_LOSSES:
            return _REGISTRATION_LOSSES[reason]
        quoted = self._quote(reason) if reason else "it gave no reason"
        return Loss(LossKind.REGISTRATION_REFUSED, f"the node refused the registration: {quoted}")

    def _check_end(self, eof: bool) -> None:
        # The order matters, because a node often does several of these in one read. The first that
        # applies is the cause, and the others follow from it.
        protocol = self._protocol
        if protocol.handshake_exc is not None:
            self._end(*self._upgrade_loss(protocol.handshake_exc))
        elif protocol.close_rcvd is not None:
            quoted = self._quote(protocol.close_rcvd)
            self._end(LossKind.CLOSED_BY_NODE, f"the node closed the connection ({quoted})")
        elif protocol.close_sent is not None and not self._closing:
            quoted = self._quote(protocol.close_sent)
            self._end(LossKind.PROTOCOL_ERROR, f"the worker refused what the node sent ({quoted})")
        elif eof:
            self._end(LossKind.CUT, "the node cut the connection")

    def _end(self, kind: LossKind, reason: str) -> None:
        self.state = "closed"
        if self.loss is None:
            self.loss = Loss(kind, reason)

    def _upgrade_loss(self, exc: Exception) -> Loss:
        """Return why the upgrade failed, from the node's response to it."""
        if not isinstance(exc, InvalidStatus):
            reason = f"the program at this address is not em_disco: {self._quote(exc)}"
            return Loss(LossKind.NOT_EM_DISCO, reason)
        status = exc.response.status_code
        if status in _STATUS_LOSSES:
            return _STATUS_LOSSES[status]
        if 300 <= status < 400:
            # A redirect is not followed, because the request for it would carry the token.
            return Loss(
                LossKind.REDIRECTED,
                f"the node redirects ({status}), and workers follow no redirect: "
                "configure the address to which it redirects",
            )
        reason = f"the node answered {status} instead of the upgrade"
        return Loss(LossKind.UPGRADE_REFUSED, reason)

    def _quote(self, text: object) -> str:
        """Return a node's text as one short printable line.

        The agent's token is removed, because a node may quote what it received.
        """
        # A node may send megabytes, so the text is cut before the search. The token is removed
        # before the cut to 200 characters. After that cut, a part of the token could remain that is
        # too short for the search.
        line = printable_line(redact(str(text)[:_SEARCHED_CHARS], self._token))
        return line if len(line) <= 200 else line[:197] + "..."
