"""One HTTP connection: limits for a client that may be hostile, and requests in order.

httptools parses, and a `Responder` answers. The limits are in `HttpLimits`. The server's sweep
checks the timeouts: a timer for each request would cost more than the rest of this module.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import (
    Any,
    Final,
    Protocol,
    cast,
)

import httptools
import msgspec

from shared.http.errors import INTERNAL_ERROR_TEXT, ErrorCode
from shared.http.exchange import (
    STATUS_LINES,
    Channel,
    Responder,
)
from shared.http.head import (
    BadHead,
    Headers,
    RequestHead,
    offers_websocket,
    resolve_target,
)
from shared.http.limits import HttpLimits

_LINGER_S: Final = 1.0
"""How long a connection stays open after an early response, so that its client can read it."""

PIECE_BYTES: Final = 2048
"""How many bytes the parser gets at once. Later requests of a read wait as bytes, not objects."""

# The log has only the server's faults. Invalid requests are the clients' faults, and a client can
# send any number of them.
_LOGGER: Final = logging.getLogger("http_server")


class _HeadTooLarge(Exception):
    """The request line and headers are over their limits."""


class _State(enum.Enum):
    """What the connection reads next."""

    HEAD = enum.auto()
    BODY = enum.auto()
    IDLE = enum.auto()
    """The next request. The last one is complete."""
    ENDED = enum.auto()
    """Nothing. A request was refused, or another protocol has taken over."""


class _Server(Protocol):
    """What a connection uses of its server. `HttpServer` describes the members."""

    limits: HttpLimits
    upgrade: Callable[[set[Any]], asyncio.Protocol] | None
    date: bytes

    @property
    def connections(self) -> set[Any]: ...

    def respond(self, head: RequestHead, channel: Channel) -> Responder: ...

    def admit(self, newcomer: HttpConnection) -> bool: ...

    def limit_unsent_bytes(self) -> None: ...


class HttpConnection(asyncio.Protocol):
    """One client's connection, and the `Channel` of its responders.

    A client may send requests before the earlier ones are answered (RFC 9112, 9.3.2). They are
    answered one at a time and in order.

    Args:
        server: the server that accepted the connection.

    Attributes:
        pipeline: the parsed requests that wait for their turn, the next one first.
        waits_since_s: when the server started to wait for the client, by the loop's clock.
        stuck_since_s: when the client last read anything of what was sent to it.
        write_paused: whether the client has left so much unread that no response may start.
    """

    transport: asyncio.Transport

    def __init__(self, server: _Server) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        # RFC 9112, 9.6: a server ignores requests after one with `Connection: close`. By default,
        # the parser reports them as an error instead. If they arrive in the same read, that error
        # would replace the response. So they are parsed, and dropped when the connection closes.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

        self.write_paused = False
        self._read_paused = False
        self._writable = asyncio.Event()
        self._writable.set()

        self._state = _State.HEAD
        self._state_is_new = False  # whether `_state` was entered since the last sweep
        self.waits_since_s = self.stuck_since_s = self._loop.time()
        self._swept_unsent_bytes = 0  # `unsent_bytes` at the last sweep

        # The request that is being parsed.
        self._url = b""
        self._headers: Headers = []
        self._trailers = 0
        self._head_bytes = 0  # parsed since the last complete head or piece of a body
        self._unparsed = b""

        self.pipeline: deque[Responder] = deque()
        self._last: Responder | None = None  # of the last request whose head was read
        self._current: Responder | None = None
        self._starting_next = False

    # --- called by the server ---

    @property
    def owes_response(self) -> bool:
        """Whether the head of a request was read whose response is incomplete."""
        return self._last is not None and not self._last.response_complete

    @property
    def unsent_bytes(self) -> int:
        """How many bytes the client has left unread."""
        return int(self.transport.get_write_buffer_size())

    def cut(self) -> None:
        """Close the connection at once, and drop what was not sent."""
        # Removed now, and not in `connection_lost`, which the loop calls later. The server must not
        # count or cut this connection again.
        self._server.connections.discard(self)
        self.transport.abort()

    def shutdown(self) -> None:
        """Close the connection after the response that it owes."""
        if self._last is None or self._last.response_complete:
            self.transport.close()
        else:
            self._last.keep_alive = False

    def check_timeouts(self, now_s: float) -> None:
        """Refuse or cut a client that has taken too long.

        Args:
            now_s: the loop's time.
        """
        unsent_bytes = self.unsent_bytes
        if not unsent_bytes or unsent_bytes < self._swept_unsent_bytes:
            self.stuck_since_s = now_s
        self._swept_unsent_bytes = unsent_bytes
        # First, because it also holds for connections that are closing: a close waits until the
        # client has read the rest.
        if now_s - self.stuck_since_s >= self._limits.write_timeout_s:
            self.cut()
        elif self._state_is_new or self._read_paused:
            # While reading is paused, the client cannot send. Its time does not count.
            self._state_is_new = False
            self.waits_since_s = now_s
        elif not self.transport.is_closing():
            self._check_request(now_s - self.waits_since_s)

    def _check_request(self, waited_s: float) -> None:
        limits = self._limits
        match self._state:
            case _State.BODY if waited_s >= limits.body_timeout_s:
                text = f"the body was not sent within {limits.body_timeout_s:g} s"
                self._refuse(ErrorCode.REQUEST_TIMEOUT, text)
            case _State.HEAD if waited_s >= limits.header_timeout_s:
                if self._head_bytes:
                    text = f"the request was not sent within {limits.header_timeout_s:g} s"
                    self._refuse(ErrorCode.REQUEST_TIMEOUT, text)
                else:
                    # RFC 9110, 15.5.9: 408 is for a request. A client that sent none might take it
                    # for the response to a request that it is about to send.
                    self.transport.close()
            case _State.IDLE if waited_s >= limits.idle_timeout_s and not self.owes_response:
                self.transport.close()

    def reset_timers(self, now_s: float) -> None:
        """Restart the client's timeouts, because the server itself has not read for a while."""
        self.waits_since_s = self.stuck_since_s = now_s

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection, or refuse it if there are too many."""
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._client = (str(peer[0]), int(peer[1])) if peer else None
        self._server.connections.add(self)
        if not self._server.admit(self):
            self._state = _State.ENDED
            self._write_error(
                ErrorCode.TOO_MANY_CONNECTIONS,
                "too many connections",
                b"retry-after: 1\r\n",
            )
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived. What the server cannot answer yet stays unparsed."""
        if self._state is _State.ENDED:
            return
        if self._state is _State.IDLE and not self.owes_response:
            # The header timeout starts with the first byte, and later bytes do not restart it. So a
            # client cannot keep the connection by sending a byte from time to time.
            self._enter(_State.HEAD)
        self._parse(self._unparsed + data if self._unparsed else data)

    def pause_writing(self) -> None:
        """Start no further response: the client has left much unread."""
        self.stuck_since_s = self._loop.time()
        self.write_paused = True
        self._writable.clear()
        self.pause_reading()
        self._server.limit_unsent_bytes()

    def resume_writing(self) -> None:
        """Continue, because the client has read most of what was sent."""
        self.write_paused = False
        self._writable.set()
        if self._current is None:
            self._start_next()
        self.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the waiting requests, and notify the one that is being answered."""
        self._server.connections.discard(self)
        self.pipeline.clear()
        self._unparsed = b""
        # A responder that waits in `drain` then sees that its client has disconnected.
        self._writable.set()
        if self._current is not None:
            self._current.disconnect()
        # The parser refers to this object. Without the cycle, both are freed at once, and not when
        # the garbage collector runs.
        del self._parser

    # --- reading ---

    def _is_behind(self) -> bool:
        return bool(self.pipeline or self._unparsed or self.write_paused)

    def _parse(self, data: bytes) -> None:
        # Piece by piece. One read of 256 KB can contain thousands of requests, and a responder for
        # each would take many times their memory. A piece is parsed only when no earlier
        # request waits for its turn.
        start = 0
        # `_unparsed` is empty while this runs, because `data` already includes it. Otherwise
        # `_may_parse` would find that bytes wait, and `_start_next`, which a response calls, would
        # parse them a second time.
        self._unparsed = b""
        while start < len(data) and self._may_parse():
            start += self._parse_piece(data[start : start + PIECE_BYTES])
        self._unparsed = b"" if self._state is _State.ENDED else data[start:]

    def _may_parse(self) -> bool:
        if self._is_behind() or self._state is _State.ENDED:
            return False
        return not self.transport.is_closing()

    def _parse_piece(self, piece: bytes) -> int:
        """Parse one piece, and return how many of its bytes are used."""
        self._head_bytes += len(piece)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as exc:
            if not self._is_websocket():
                # The request has no body (see `_check_ignorable_upgrade`), so the next one follows.
                return cast(int, exc.args[0])
            self._switch_to_websocket()
        except httptools.HttpParserError as exc:
            self._refuse_for(exc)
        else:
            # Also after each piece, because a head without an end calls none of the callbacks.
            if self._head_is_too_large() and self._state is not _State.ENDED:
                self._refuse_head()
        return len(piece)

    def _is_websocket(self) -> bool:
        return self._server.upgrade is not None and offers_websocket(self._headers)

    def _switch_to_websocket(self) -> None:
        """Pass the connection to the WebSocket protocol (RFC 9110, 7.8).

        If a response is unfinished, the connection is aborted.
        """
        self._state = _State.ENDED
        # Otherwise both would write, and the unfinished request would never see that its client has
        # disconnected. This affects no ordinary client: it offers a WebSocket in its first request.
        if self.owes_response:
            self.transport.abort()
            return
        assert self._server.upgrade is not None
        self._server.connections.discard(self)
        lines = [b"%b %b HTTP/1.1" % (self._parser.get_method(), self._url)]
        lines += [b"%b: %b" % header for header in self._headers]
        protocol = self._server.upgrade(self._server.connections)
        protocol.connection_made(self.transport)
        protocol.data_received(b"\r\n".join([*lines, b"", b""]))
        self.transport.set_protocol(protocol)

    def _refuse_for(self, exc: httptools.HttpParserError) -> None:
        # httptools wraps an error of a callback in its own.
        cause = exc.__context__
        if isinstance(cause, _HeadTooLarge):
            self._refuse_head()
        elif isinstance(cause, BadHead):
            self._refuse(ErrorCode.INVALID_REQUEST, str(cause))
        elif isinstance(exc, httptools.HttpParserCallbackError):
            _LOGGER.error("request_fault", exc_info=cause)
            self._refuse(ErrorCode.INTERNAL_ERROR, INTERNAL_ERROR_TEXT)
        else:
            self._refuse(ErrorCode.INVALID_REQUEST, "this is not a valid HTTP request")

    def pause_reading(self) -> None:
        """Stop reading for now."""
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Continue to read, unless parsed requests or unparsed bytes still wait."""
        if self._read_paused and not self._is_behind():
            self._read_paused = False
            self.transport.resume_reading()

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        """Start a request."""
        self._url = b""
        self._headers = []
        self._trailers = 0
        self._enter(_State.HEAD)

    def on_url(self, url: bytes) -> None:
        """Take a piece of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or count and drop a trailer."""
        # RFC 9110, 6.5.1: a trailer must not be merged into the headers. It could override one that
        # was already checked, such as Authorization or Host.
        if self._state is _State.BODY:
            self._trailers += 1
        else:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Start or queue the request, unless its head is invalid or too large."""
        if self._head_is_too_large():
            raise _HeadTooLarge
        self._head_bytes = 0
        self._enter(_State.BODY)
        version = self._parser.get_http_version()
        self._url, self._headers = resolve_target(self._url, version, self._headers)
        if self._parser.should_upgrade():
            if self._is_websocket():
                return  # `_parse_piece` continues
            self._check_ignorable_upgrade()
        head = RequestHead(
            self._parser.get_method(),
            self._url,
            version,
            self._headers,
            # RFC 9112, 9.3 allows `Connection: keep-alive` in HTTP/1.0, but it is not required.
            version != "1.0" and self._parser.should_keep_alive(),
            self._client,
        )
        self._enqueue(self._server.respond(head, self))

    def _check_ignorable_upgrade(self) -> None:
        """Check that a request can be served as if it had offered no upgrade (RFC 9110, 7.8).

        Raises:
            BadHead: if the offer cannot be ignored.
        """
        if self._parser.get_method() == b"CONNECT":
            raise BadHead("CONNECT is for proxies; this server is not a proxy")
        # The parser does not parse the body of a request that offers an upgrade. The server would
        # take it for the next request, which a client could use to smuggle one past a proxy
        # (RFC 9112, 11.2).
        for name, value in self._headers:
            # RFC 9112, 6.3: these announce a body.
            if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
                raise BadHead(
                    "a request with a body cannot offer an upgrade; send it without Upgrade"
                )

    def _enqueue(self, responder: Responder) -> None:
        """Answer a request now, or later if others come first or the client has to read first."""
        # RFC 9112, 9.3.2: responses have the order of their requests.
        must_wait = self.owes_response or self.pipeline or self.write_paused
        self._last = responder
        if not must_wait:
            self._start(responder)
        else:
            self.pause_reading()
            self.pipeline.append(responder)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._head_bytes = 0
        if self._last is not None:
            self._last.take_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is complete. It may already be answered."""
        # Again, because the trailers come after the head and count too.
        if self._head_is_too_large():
            raise _HeadTooLarge
        self._head_bytes = 0
        self._enter(_State.IDLE)
        if self._last is not None:
            self._last.end_body()

    def _enter(self, state: _State) -> None:
        # The next sweep sets the time. Asking the clock here would cost time for each request.
        self._state = state
        self._state_is_new = True

    def _head_is_too_large(self) -> bool:
        # Both are limited: a small header takes many times its bytes as an object.
        limits = self._limits
        if self._head_bytes > limits.max_header_bytes:
            return True
        return len(self._headers) + self._trailers > limits.max_headers

    # --- responses ---

    @property
    def date(self) -> bytes:
        """The `date` header, as a line."""
        return self._server.date

    async def drain(self) -> None:
        """Wait until the client has read enough of what was written."""
        await self._writable.wait()

    def _start(self, responder: Responder) -> None:
        self._current = responder
        responder.start()

    def on_response_complete(self) -> None:
        """Start the next request, or wait for one."""
        self._current = None
        if self.transport.is_closing():
            return
        if not self.pipeline and self._last is not None and self._last.more_body:
            # A client that is refused before it has sent its body gets time to read the response.
            # Closing a socket that has unread data resets the connection, and the client could lose
            # the response (RFC 9112, 9.6).
            self._loop.call_later(_LINGER_S, self._stop_lingering, self._last)
        self._state_is_new = True
        self._start_next()
        self.resume_reading()

    def _start_next(self) -> None:
        """Start the waiting requests, one at a time, until the client leaves too much unread."""
        # A request may be answered while it is started, which calls this method again. That call
        # returns, and the loop of the first one continues. With recursion instead, a client that
        # pipelines many requests could exhaust the stack.
        if self._starting_next:
            return
        self._starting_next = True
        try:
            while not (self.write_paused or self.transport.is_closing()):
                if self.pipeline and self._current is None:
                    self._start(self.pipeline.popleft())
                elif self._unparsed and not self.pipeline:
                    self._parse(self._unparsed)
                else:
                    break
        finally:
            self._starting_next = False

    def _stop_lingering(self, answered: Responder) -> None:
        if self._last is answered and answered.more_body:
            self.transport.close()

    def _refuse_head(self) -> None:
        limits = self._limits
        self._refuse(
            ErrorCode.HEAD_TOO_LARGE,
            "the request's head is too large: "
            f"the limits are {limits.max_header_bytes} bytes and {limits.max_headers} headers",
        )

    def _refuse(self, code: ErrorCode, text: str) -> None:
        """Respond that the request that is being read is invalid, and read no more.

        `_last` is either that request, if its head is complete, or the one before it. Three cases
        must not be confused, or a client gets a response to another of its requests:

        - `_last` is the invalid request, and its response has started, or earlier requests wait. An
          error response would be read as a part of it, or as that of another request. So the
          connection closes.
        - `_last` is complete, but not answered: it comes before the invalid request. It is
          answered, and the connection then closes. The invalid request gets no response.
        - Otherwise it is the turn of the invalid request, and the error is its response.
        """
        self._state = _State.ENDED
        self._unparsed = b""
        last = self._last
        if last is not None and last.more_body:
            if last.response_started or self.pipeline:
                self.transport.close()
                return
            last.disconnect()
        elif last is not None and not last.response_complete:
            last.keep_alive = False
            return
        self._write_error(code, text)
        # RFC 9112, 9.6: close the sending side, and read for a moment before closing the other, so
        # that the client gets the response. See `on_response_complete`.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._loop.call_later(_LINGER_S, self.transport.close)

    def _write_error(
        self,
        code: ErrorCode,
        text: str,
        headers: bytes = b"",
    ) -> None:
        """Write an error response after which the connection closes."""
        body = msgspec.json.encode({"error": text, "code": code})
        lines = (
            STATUS_LINES[code.status],
            self.date,
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"connection: close\r\n",
            headers,
            b"\r\n",
            body,
        )
        self.transport.write(b"".join(lines))
