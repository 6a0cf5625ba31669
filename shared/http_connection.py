"""One HTTP connection whose client may be hostile: uvicorn's protocol, with bounds on time and on memory.

Time is judged by the server's sweep and not by timers of the connection's own, so that a request
costs none. What the bounds are is `HttpLimits`; what is served is the application's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from email.utils import formatdate
from typing import Any, Final, Literal, cast

import httptools
import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from shared.http_direct import DirectExchange
from shared.http_head import BadHead, settled, without_upgrade

LINGER_S: Final = 1.0
"""How long the rest of a request that is already answered is read and dropped."""

PIECE_BYTES: Final = 2048
"""What the parser gets at once: requests that follow it in one read wait as bytes, not as objects."""

# Bad requests are the client's news, not ours; a failure of ours still reaches the log.
_LOGGER = logging.getLogger("http_server")
_LOGGER.setLevel(logging.ERROR)


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What clients may take of a server.

    Attributes:
        header_timeout_s: from a connection's or a request's begin until its head is whole; then 408.
        body_timeout_s: from the head until the body is whole; then 408.
        idle_timeout_s: how long a connection is kept for the next request.
        write_timeout_s: a client that reads nothing of its answer for so long is cut.
        max_header_bytes: the request line and all headers, trailers too; past it 431.
        max_headers: how many of them; past it 431.
        max_connections: past it those that wait for a request make room, longest first; if none does, 503.
        max_unsent_bytes: answers that clients have not read, in all; past it those that are stuck longest are cut.
    """

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 5.0
    write_timeout_s: float = 30.0
    max_header_bytes: int = 64 * 1024
    max_headers: int = 128
    max_connections: int = 4096
    max_unsent_bytes: int = 64 * 1024 * 1024

    @property
    def shortest_s(self) -> float:
        """The shortest of the time-outs."""
        return min(self.header_timeout_s, self.body_timeout_s, self.idle_timeout_s, self.write_timeout_s)


Direct = Callable[["HttpConnection"], DirectExchange | None]


class HeadTooLarge(Exception):
    """The request line and headers are past their bounds."""


class HttpState(ServerState):
    """What uvicorn's connections share, and the `date` header line of this second."""

    date = b""

    def set_date(self) -> None:
        """Renew it. Made once a second, not once an answer."""
        # RFC 9110, 6.6.1: a server with a clock sends Date.
        now = formatdate(usegmt=True).encode()
        self.default_headers = [(b"date", now)]
        self.date = b"date: %b\r\n" % now


class Flow(FlowControl):
    """uvicorn's flow control, which does not go on reading while earlier requests wait for their turn."""

    def __init__(self, transport: asyncio.Transport, is_behind: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_behind = is_behind

    def resume_reading(self) -> None:
        """Read on, unless there is enough to do."""
        if not self._is_behind():
            super().resume_reading()


class HttpConnection(HttpToolsProtocol):
    """uvicorn's HTTP connection, made fit for hostile clients.

    Args:
        config: uvicorn's.
        server_state: uvicorn's.
        limits: what the client may take.
        admit: called with a new connection; returns whether there is a place for it.
        relieve: called when the client leaves much unread.
        direct: given a request whose head is whole, returns what answers it without ASGI, or None.
    """

    def __init__(
        self,
        config: Config,
        server_state: HttpState,
        limits: HttpLimits,
        admit: Callable[[HttpConnection], bool],
        relieve: Callable[[], None],
        direct: Direct | None = None,
    ) -> None:
        super().__init__(config, server_state, {})
        self.logger = _LOGGER
        self._state = server_state
        self._limits = limits
        self._admit = admit
        self._relieve = relieve
        self._direct = direct
        self._turning = False
        self._declined = False
        self._reads: Literal["head", "body", "nothing"] = "head"
        self.waits_since_s = self.stuck_since_s = self.loop.time()
        self._begins = False
        self._unsent_bytes = 0
        self._unheard_bytes = 0  # what the parser was given since it last told of a whole head or of a body
        self._unfed = b""
        self._refused = False
        self._answering: RequestResponseCycle | DirectExchange | None = None
        self.cut_off = False

    # --- what the server asks ---

    @property
    def date(self) -> bytes:
        """The header that every answer has, as a line."""
        return self._state.date

    @property
    def owes_an_answer(self) -> bool:
        """Whether a request has begun to be answered, and is not yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def unsent_bytes(self) -> int:
        """How much the client has left unread."""
        return int(self.transport.get_write_buffer_size())

    def cut(self) -> None:
        """Let the client go without a word."""
        self.cut_off = True
        self.transport.abort()

    def judge(self, now_s: float) -> None:
        """Refuse or cut a client that has taken too long; `now_s` is the loop's time."""
        unsent_bytes = self.unsent_bytes
        if not unsent_bytes or unsent_bytes < self._unsent_bytes:
            self.stuck_since_s = now_s
        self._unsent_bytes = unsent_bytes
        if now_s - self.stuck_since_s >= self._limits.write_timeout_s:
            self.cut()
        elif self._begins or self.flow.read_paused:  # it is we who do not read
            self._begins = False
            self.waits_since_s = now_s
        elif not (self._refused or self.transport.is_closing()):
            self._judge_request(now_s - self.waits_since_s)

    def _judge_request(self, waited_s: float) -> None:
        limits = self._limits
        if self._reads == "body":
            if waited_s >= limits.body_timeout_s:
                self._refuse(408, f"the body was not sent within {limits.body_timeout_s:g} s")
        elif self._reads == "head":
            if waited_s >= limits.header_timeout_s:
                if self._unheard_bytes:
                    self._refuse(408, f"the request was not sent within {limits.header_timeout_s:g} s")
                else:
                    self.transport.close()
        elif not self.owes_an_answer and waited_s >= limits.idle_timeout_s:
            self.transport.close()

    def pardon(self, now_s: float) -> None:
        """Count its time from now: it was the server that did not look."""
        self.waits_since_s = self.stuck_since_s = now_s

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it when there are too many."""
        super().connection_made(transport)
        self.flow = Flow(transport, self._is_behind)
        if not self._admit(self):
            self._refused = True
            self._write_error(503, "too many connections", b"retry-after: 1\r\n")
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Parse what came, as far as it can be acted upon now."""
        if self._refused:
            return
        if self._reads == "nothing" and not self.owes_an_answer:
            self._begin_to_read("head")
        self._feed(self._unfed + data if self._unfed else data)

    def pause_writing(self) -> None:
        """Turn to none of its further requests while a client has left much unread."""
        self.stuck_since_s = self.loop.time()
        super().pause_writing()
        self.flow.pause_reading()
        self._relieve()

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        super().resume_writing()
        if self._answering is None:
            self._turn_to_next()
        self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, and forget what waits for its turn.

        uvicorn tells the request that was read last, which need not be the one that is being answered.
        """
        if self._answering is not None:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self.pipeline.clear()
        self._unfed = b""
        super().connection_lost(exc)

    def _is_behind(self) -> bool:
        return bool(self.pipeline or self._unfed or self.flow.write_paused)

    def _feed(self, data: bytes) -> None:
        start = 0
        self._unfed = b""
        while start < len(data) and not (self._is_behind() or self._refused or self.transport.is_closing()):
            piece = data[start : start + PIECE_BYTES]
            start += self._feed_piece(piece)
        self._unfed = b"" if self._refused else data[start:]

    def _feed_piece(self, piece: bytes) -> int:
        """Parse one piece and return how much of it has been used up."""
        self._unheard_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as exc:
            if not self._should_upgrade():
                self._begin_again_without_upgrade()
                return cast(int, exc.args[0])
            self._refused = True  # for this protocol there is nothing more to read
            self.handle_websocket_upgrade()
        except httptools.HttpParserError as exc:
            self._refuse_for(exc)
        else:
            if self._head_is_too_large() and not self._refused:
                self._refuse_head()
        return len(piece)

    def _begin_again_without_upgrade(self) -> None:
        """Serve a request as if it had not asked for an upgrade: RFC 9110, 7.8. httptools has dropped its body."""
        parser = self.parser
        head = without_upgrade(parser.get_method(), self.url, parser.get_http_version(), self.headers)
        self._declined = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._feed_piece(head)

    def _refuse_for(self, exc: httptools.HttpParserError) -> None:
        cause = exc.__context__
        if isinstance(cause, HeadTooLarge):
            self._refuse_head()
        elif isinstance(cause, BadHead):
            self._refuse(400, str(cause))
        elif isinstance(exc, httptools.HttpParserCallbackError):
            self.logger.error("A request could not be taken", exc_info=cause)
            self._refuse(500, "internal_error")
        else:
            self._refuse(400, "that is not an HTTP request")

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._begin_to_read("head")

    def on_headers_complete(self) -> None:
        """Have the request answered, unless its head is past its bounds."""
        if self._head_is_too_large():
            raise HeadTooLarge
        self._unheard_bytes = 0
        self._begin_to_read("body")
        self.url = settled(self.url, self.parser.get_http_version(), self.headers)
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise BadHead("CONNECT is for proxies, and this is none")
            self._declined = not self._should_upgrade()
            if self._declined:
                return  # and it begins again
        elif self._direct is not None and (exchange := self._direct(self)) is not None:
            self._enqueue(exchange)
            return
        super().on_headers_complete()

    def _enqueue(self, exchange: DirectExchange) -> None:
        """Begin to answer, or wait for the requests before it, or until the client has read their answers."""
        before, self.cycle = self.cycle, cast(RequestResponseCycle, exchange)
        if (before is None or before.response_complete) and not (self.pipeline or self.flow.write_paused):
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unheard_bytes = 0
        cycle: object = self.cycle
        if isinstance(cycle, DirectExchange):
            cycle.take_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the request is whole, also when it was answered before that."""
        if self._head_is_too_large():  # its trailers belong to it
            raise HeadTooLarge
        self._unheard_bytes = 0
        self._begin_to_read("nothing")
        if self._declined:
            return
        cycle: object = self.cycle
        if isinstance(cycle, DirectExchange):
            cycle.more_body = False
            cycle.set()
            return
        if self.cycle is not None:
            self.cycle.more_body = False
        super().on_message_complete()

    def _begin_to_read(self, what: Literal["head", "body", "nothing"]) -> None:
        self._reads = what
        self._begins = True

    def _head_is_too_large(self) -> bool:
        limits = self._limits
        return self._unheard_bytes > limits.max_header_bytes or len(self.headers or ()) > limits.max_headers

    # --- answers ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        if isinstance(cycle, DirectExchange):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Turn to the next request, or wait for one. Replaces uvicorn's, which would set a timer each time."""
        self._answering = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not self.pipeline and self.cycle.more_body:
            # A client that was refused in mid-request gets a moment to see why: closing at once would
            # reset the connection under what it still sends, and the answer with it.
            self.loop.call_later(LINGER_S, self._stop_lingering, self.cycle)
        self._begins = True
        self._turn_to_next()
        self.flow.resume_reading()

    def _turn_to_next(self) -> None:
        """Begin to answer the requests that have come, one after the other, unless the client reads no answers."""
        if self._turning:
            return  # a request was answered as soon as it began: the loop below goes on
        self._turning = True
        try:
            while not (self.flow.write_paused or self.transport.is_closing()):
                if self.pipeline and self._answering is None:
                    self._start_asgi_task(*self.pipeline.pop())
                elif self._unfed and not self.pipeline:
                    self._feed(self._unfed)
                else:
                    break
        finally:
            self._turning = False

    def _stop_lingering(self, answered: Any) -> None:
        if self.cycle is answered and answered.more_body:
            self.transport.close()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection to the WebSocket protocol, unless an answer is still being written to it.

        uvicorn would let both write, and would never tell the first that its client has gone.
        """
        if self.owes_an_answer:
            self.transport.abort()
            return
        super().handle_websocket_upgrade()

    def _refuse_head(self) -> None:
        limits = self._limits
        self._refuse(431, f"at most {limits.max_header_bytes} bytes and {limits.max_headers} headers are read")

    def _refuse(self, status: int, why: str) -> None:
        """Say what is wrong with the request that is being read, and read no more."""
        self._refused = True
        self._unfed = b""
        if self.owes_an_answer and not self.cycle.more_body:
            self.cycle.keep_alive = False  # what is owed for earlier requests leaves first, and is the last to leave
            return
        if self.owes_an_answer:
            if self.cycle.response_started or self.pipeline:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._write_error(status, why)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # and read on for a moment: see `on_response_complete`
        self.loop.call_later(LINGER_S, self.transport.close)

    def _write_error(self, status: int, why: str, headers: bytes = b"") -> None:
        """Answer as every other error is answered."""
        body = msgspec.json.encode({"error": why})
        self.transport.write(
            STATUS_LINE[status]
            + self.date
            + b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%b\r\n%b"
            % (len(body), headers, body)
        )
