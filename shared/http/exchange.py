"""How one HTTP request is answered: the interface between a connection and the answering code.

A responder never sees the connection's class, its parser or other requests. The connection enforces
limits, timeouts and pipelining for every kind of responder.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import Final, Protocol

from shared.http.head import RequestHead

STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}

_JOIN_BYTES: Final = 64 * 1024
"""Up to this size, joining head and body is faster. Past it, copying the body costs more."""

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Channel(Protocol):
    """What a responder uses of its connection.

    Attributes:
        transport: where the response is written.
    """

    transport: asyncio.Transport

    @property
    def date(self) -> bytes:
        """The `date` header, as a line."""

    def pause_reading(self) -> None:
        """Read no more of the request for now."""

    def resume_reading(self) -> None:
        """Continue to read, unless other requests wait."""

    async def drain(self) -> None:
        """Wait until the client has read enough of the response."""

    def on_response_complete(self) -> None:
        """Start the next request."""


class Responder(ABC):
    """Answers one request. The connection makes it when the head is complete.

    The connection calls `start` when all earlier requests are answered. It may call `take_body`,
    `end_body` and `disconnect` before that.

    Attributes:
        head: the request's head.
        body: the part of the body that has arrived.
        more_body: whether the body is incomplete.
        keep_alive: whether the connection is kept after the response.
        disconnected: whether the client has disconnected.
        response_started: whether a part of the response was written.
        response_complete: whether the whole response was written.
    """

    __slots__ = (
        "_awaits_continue",
        "_has_turn",
        "body",
        "channel",
        "disconnected",
        "head",
        "keep_alive",
        "more_body",
        "response_complete",
        "response_started",
    )

    def __init__(self, head: RequestHead, channel: Channel) -> None:
        self.head = head
        self.channel = channel
        self.body = bytearray()
        self.more_body = True
        self.keep_alive = head.keep_alive
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self._has_turn = False
        self._awaits_continue = head.expects_continue

    # Called by the connection.

    def start(self) -> None:
        """Start to answer. It is the request's turn: all earlier ones are answered."""
        self._has_turn = True
        self.proceed()

    def take_body(self, piece: bytes) -> None:
        """Take a piece of the body."""
        # A client may send the rest of a request that was already refused. It is dropped.
        if not self.response_complete:
            self.body += piece

    def end_body(self) -> None:
        """Note that the body is complete."""
        self.more_body = False
        # RFC 9110, 10.1.1: no 100 Continue to a client that has sent the body without it.
        self._awaits_continue = False
        self.notify()

    def disconnect(self) -> None:
        """Note that the client has disconnected."""
        self.disconnected = True
        self.notify()

    # Called or implemented by subclasses.

    @abstractmethod
    def proceed(self) -> None:
        """Take the next step, if it is possible. Called by `start`, and by `notify` on a change."""

    def notify(self) -> None:
        """Proceed, if it is the request's turn and its response is incomplete."""
        if self._has_turn and not self.response_complete:
            self.proceed()

    def ask_for_body(self) -> None:
        """Send `100 Continue` to a client that waits for it (RFC 9110, 10.1.1)."""
        # Only when the body is needed: the client of a request that is refused because of its head
        # does not send the body.
        if self._awaits_continue:
            self._awaits_continue = False
            self.channel.transport.write(_CONTINUE)

    def start_response(self) -> None:
        """Note that the response starts, and decide whether the connection is kept after it.

        Call it before the status line is written.
        """
        self.response_started = True
        # RFC 9110, 10.1.1: a client that gets a final response instead of 100 Continue may or may
        # not send the body. The server could take a body for the next request (request smuggling),
        # so the connection ends.
        if self._awaits_continue:
            self.keep_alive = False

    def end_response(self) -> None:
        """Note that the response is complete. Close the connection, or start its next request."""
        self.response_complete = True
        if not self.keep_alive:
            self.channel.transport.close()
        self.channel.on_response_complete()

    def answer(
        self,
        status: int,
        headers: bytes,
        *body: bytes,
    ) -> None:
        """Write the whole response.

        Args:
            status: the HTTP status.
            headers: complete lines. The headers that HTTP itself needs are added.
            body: the parts of the body.
        """
        self.start_response()
        transport = self.channel.transport
        if not (self.disconnected or transport.is_closing()):
            length = sum(map(len, body))
            head = (
                STATUS_LINES[status],
                self.channel.date,
                headers,
                b"content-length: %d\r\n" % length,
                b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
            )
            # Before the write: the transport may call `pause_writing` from within it, and the
            # server may then cut this connection. The request must not look unanswered.
            self.response_complete = True
            if length <= _JOIN_BYTES:
                transport.write(b"".join((*head, *body)))
            else:
                transport.writelines((b"".join(head), *body))
        self.end_response()
