"""Answers HTTP requests with an ASGI application: the HTTP part of ASGI 3, without lifespan.

This module decides how a client finds the end of the response (RFC 9112, 6), and whether the
connection is kept. The application decides everything else.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Final
from urllib.parse import unquote

from starlette.types import (
    ASGIApp,
    Message,
    Scope,
)

from shared.http.exchange import (
    STATUS_LINES,
    Channel,
    Responder,
)
from shared.http.head import RequestHead

_MAX_WAITING_BODY_BYTES: Final = 64 * 1024
"""If more of a body waits, the server stops reading until the application has taken it."""

# RFC 9110, 5.5: CR, LF and NUL are dangerous in a header. A line break in a value could add headers
# or a whole response.
_FORBIDDEN: Final = re.compile(rb"[\x00\r\n]")

# RFC 9110, 15.3.5 and 15.4.5.
_WITHOUT_BODY: Final = (204, 304)

_LOGGER: Final = logging.getLogger("http_server")


class AsgiResponder(Responder):
    """Answers one request in a task that runs the application.

    Args:
        head: the request's head.
        channel: the connection.
        app: the application.
        tasks: the set that holds the task while it runs.
    """

    __slots__ = ("_app", "_changed", "_chunked", "_tasks", "_unwritten_bytes")

    def __init__(
        self,
        head: RequestHead,
        channel: Channel,
        app: ASGIApp,
        tasks: set[asyncio.Task[None]],
    ) -> None:
        super().__init__(head, channel)
        self._app = app
        self._tasks = tasks
        self._changed = asyncio.Event()
        self._chunked = False
        self._unwritten_bytes: int | None = None

    def start(self) -> None:
        """Run the application in a task."""
        task = asyncio.get_running_loop().create_task(self._run())
        # The loop has only a weak reference to a task.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        super().start()

    def take_body(self, piece: bytes) -> None:
        """Take a piece of the body, and pause reading if much of it waits."""
        super().take_body(piece)
        if len(self.body) > _MAX_WAITING_BODY_BYTES:
            self.channel.pause_reading()
        self.notify()

    def proceed(self) -> None:
        """Wake the application if it waits in `receive`."""
        self._changed.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope(), self._receive, self._send)
        except Exception:
            _LOGGER.exception("request_fault")
        finally:
            self._end()

    def _end(self) -> None:
        """Complete or abort a response that the application has not completed."""
        # Otherwise the client would wait forever.
        if self.response_complete or self.disconnected:
            return
        self.keep_alive = False
        if self.response_started:
            # RFC 9112, 8: the client sees that the body is incomplete.
            self.channel.transport.close()
        else:
            self.answer(500, b"content-type: text/plain\r\n", b"Internal Server Error")

    def _scope(self) -> Scope:
        head = self.head
        # A client sends no fragment (RFC 9112, 3.2). One that does must not change the route.
        target = head.url.partition(b"#")[0]
        path, _, query = target.partition(b"?")
        server = self.channel.transport.get_extra_info("sockname")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method.decode("latin-1"),
            "scheme": "http",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": head.headers,
            "client": head.client,
            "server": server and server[:2],
        }

    async def _receive(self) -> Message:
        if self.more_body and not self.channel.transport.is_closing():
            self.ask_for_body()
        if not (self.disconnected or self.response_complete):
            # The application has taken what arrived before, so there is room for more.
            self.channel.resume_reading()
            await self._changed.wait()
            self._changed.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = bytes(self.body)
        self.body.clear()
        return {
            "type": "http.request",
            "body": body,
            "more_body": self.more_body,
        }

    async def _send(self, message: Message) -> None:
        # Before each write: an application that sends faster than the client reads must wait, or
        # the server would buffer the whole stream.
        if not self.disconnected:
            await self.channel.drain()
        if self.disconnected:
            return
        expected = "http.response.body" if self.response_started else "http.response.start"
        if self.response_complete or message["type"] != expected:
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")
        if self.response_started:
            self._write_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._write_head(message["status"], message.get("headers", ()))

    def _write_head(
        self,
        status: int,
        headers: list[tuple[bytes, bytes]],
    ) -> None:
        lines = [STATUS_LINES[status], self.channel.date]
        closes = False
        for name, value in headers:
            if _FORBIDDEN.search(name) or _FORBIDDEN.search(value):
                raise RuntimeError("invalid header name or value")
            if name.lower() == b"content-length":
                self._unwritten_bytes = int(value)
            elif name.lower() == b"connection" and value.lower() == b"close":
                closes = True
            lines.append(b"%b: %b\r\n" % (name, value))
        self.start_response()
        self._delimit_body(status, lines)
        # RFC 9112, 9.6: the last response on a connection has `Connection: close`.
        if closes:
            self.keep_alive = False
        elif not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.channel.transport.write(b"".join(lines))

    def _delimit_body(self, status: int, lines: list[bytes]) -> None:
        """Decide how the client finds the end of the body (RFC 9112, 6.3)."""
        if self.head.method == b"HEAD" or status in _WITHOUT_BODY:
            # RFC 9112, 6.3, item 1: these end with the head, even if their headers announce a body.
            self._unwritten_bytes = 0
        elif self._unwritten_bytes is None:
            if self.head.version == "1.1":
                self._chunked = True
                lines.append(b"transfer-encoding: chunked\r\n")
            else:
                # RFC 9112, 6.1: a client of HTTP/1.0 does not know chunks. It reads until the
                # connection ends.
                self.keep_alive = False

    def _write_body(self, body: bytes, more_body: bool) -> None:
        transport = self.channel.transport
        if self._chunked:
            # RFC 9112, 7.1: an empty chunk would end the body, so an empty piece writes none.
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more_body:
                chunk += b"0\r\n\r\n"
            transport.write(chunk)
        elif self.head.method != b"HEAD":
            self._check_length(len(body), more_body)
            transport.write(body)
        if not more_body:
            self.end_response()
            # `notify` does nothing after the response. The application may still wait for
            # `http.disconnect`.
            self.proceed()

    def _check_length(self, length: int, more_body: bool) -> None:
        """Check a piece of the body against the length that the application declared.

        Raises:
            RuntimeError: if the whole body is longer or shorter than declared.
        """
        # RFC 9112, 6.3: the client would take surplus bytes for the next response, and for missing
        # bytes it would take the next response as the rest of this one.
        if self._unwritten_bytes is None:
            return
        self._unwritten_bytes -= length
        if self._unwritten_bytes < 0 or (self._unwritten_bytes and not more_body):
            raise RuntimeError("the body's length differs from its Content-Length")
