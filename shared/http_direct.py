"""An HTTP request that is answered by callbacks, without ASGI: no task, no scope, no events.

For the one route that everything else waits for. It stands in a connection where uvicorn has its
`RequestResponseCycle`, so that limits, time-outs and pipelining hold for both kinds alike.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shared.http_connection import HttpConnection

_STATUS_LINES: Final = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}
JOIN_BYTES: Final = 64 * 1024
"""Up to this size head and body are joined, which is faster; past it copying the body costs more."""

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class DirectExchange:
    """One request and its answer. Made when the head is whole; `proceed` is called whenever there is news.

    Args:
        connection: whose request it is.
        keep_alive: whether the client may send another one after it.
        expects_continue: whether the client waits for leave to send the body (RFC 9110, 10.1.1).

    Attributes:
        body: what has come of the body.
        more_body: whether there is more to come.
        disconnected: whether the client has gone.
        response_complete: whether it is answered.
    """

    __slots__ = (
        "body",
        "connection",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "response_started",
        "started",
        "waiting_for_100_continue",
    )

    def __init__(self, connection: HttpConnection, *, keep_alive: bool, expects_continue: bool) -> None:
        self.connection = connection
        self.body = bytearray()
        self.more_body = True
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_started = False
        self.response_complete = False
        self.started = False
        self.waiting_for_100_continue = expects_continue

    def take_body(self, piece: bytes) -> None:
        """Take a piece of the body. Who looks at no piece before the last leaves this as it is."""
        if not self.response_complete:
            self.body += piece

    @property
    def message_event(self) -> DirectExchange:
        """What uvicorn sets when there is news."""
        return self

    def set(self) -> None:
        """Take the news: the end of the body, or of the client."""
        if self.started and not self.response_complete:
            self.proceed()

    def start(self) -> None:
        """Begin to answer: whatever came before on this connection is answered."""
        self.started = True
        self.proceed()

    def proceed(self) -> None:
        """Do what can be done now. Each kind of exchange has its own."""
        raise NotImplementedError

    def ask_for_body(self) -> None:
        """Tell a client that waits for it to send the body, and read on."""
        if self.waiting_for_100_continue:
            self.waiting_for_100_continue = False
            self.connection.transport.write(_CONTINUE)

    def answer(self, status: int, headers: bytes, *body: bytes) -> None:
        """Answer; `headers` are whole lines, those of HTTP itself are added."""
        self.response_started = self.response_complete = True
        connection = self.connection
        if self.waiting_for_100_continue:
            # The client may send the body that it announced, or its next request: nobody could tell which.
            self.keep_alive = False
        if not (self.disconnected or connection.transport.is_closing()):
            length = sum(map(len, body))
            ends = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
            head = (_STATUS_LINES[status], connection.date, headers, b"content-length: %d\r\n" % length, ends)
            if length <= JOIN_BYTES:
                connection.transport.write(b"".join((*head, *body)))
            else:
                connection.transport.writelines((b"".join(head), *body))
            if not self.keep_alive:
                connection.transport.close()
        connection.on_response_complete()
