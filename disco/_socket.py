"""One agent's WebSocket: from bytes to frames for the session, and back. The session decides.

The HTTP connection makes an `AgentSocket` for each upgrade request, and passes it the request as
bytes.
"""

# This is an asyncio protocol, and not an ASGI application, because the idle timeout must see pings.
# ASGI hides them.

from __future__ import annotations

import asyncio
import http
import logging
from typing import (
    Any,
    Final,
    cast,
)

import msgspec
from websockets.datastructures import Headers
from websockets.frames import (
    CloseCode,
    Frame,
    Opcode,
)
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, SEND_EOF
from websockets.server import ServerProtocol

from disco._hub import Hub
from disco._session import (
    AgentSession,
    Close,
    Decision,
    Refuse,
    Registered,
    Result,
    Send,
)
from disco._upgrade import UpgradeRefused, check_upgrade

_CLOSE_TIMEOUT_S: Final = 1.0
"""How long a peer may take to end a connection that the node has closed. The node then cuts it."""

_IDLE_GRACE_S: Final = 0.02
"""How long the idle timeout waits for data that has arrived but was not read yet."""

# The library logs request lines, which contain tokens. This logger is not in the logging hierarchy,
# so that no configuration can enable it.
_SILENT = logging.Logger("disco.websockets")
_SILENT.disabled = True


class AgentSocket(asyncio.Protocol):
    """The connection of one agent; a `disco._registry.AgentConnection`.

    Args:
        hub: the node.
        connections: the server's set of open connections.
    """

    def __init__(
        self,
        hub: Hub,
        connections: set[Any],
    ) -> None:
        self._hub = hub
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        # `max_size` bounds a message, also one in many fragments (RFC 6455, 5.4).
        self._protocol = ServerProtocol(max_size=hub.settings.max_frame_bytes, logger=_SILENT)
        self._session: AgentSession | None = None
        self._text: bytearray | None = None
        self._flush_due = False
        self._received_s = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport of the HTTP connection."""
        self.transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Process everything that one read returned, then write once."""
        self._received_s = self._loop.time()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Request):
                self._upgrade(event)
            elif isinstance(event, Frame):
                self._receive(event)
        self._flush()

    def eof_received(self) -> None:
        """End the session at once; the transport closes itself."""
        # Not in `connection_lost`, which waits until the peer has read everything. The agent may
        # reconnect before that, and needs its name.
        self._end_session("the connection was lost")

    def connection_lost(self, exc: Exception | None) -> None:
        """End the session, and release everything that refers to the connection."""
        self._end_session("the connection was lost")
        for timer in (self._idle_timer, self._close_timer):
            if timer is not None:
                timer.cancel()
        self._connections.discard(self)

    # Called by the node.

    def send(self, frame: bytes) -> None:
        """Send a text frame, in one write with all others of this loop turn."""
        if self._protocol.state is not OPEN:
            return
        self._protocol.send_text(frame)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def drop(self, reason: str) -> None:
        """Cut the connection without a close frame; `reason` is for the log."""
        self._end_session(reason)
        self.transport.abort()

    def shutdown(self) -> None:
        """Close because the node stops."""
        self._close(CloseCode.GOING_AWAY, "the node stopped")

    # The opening handshake (RFC 6455, 4.2).

    def _upgrade(self, request: Request) -> None:
        try:
            subject = check_upgrade(request.path, self._hub)
        except UpgradeRefused as exc:
            self._hub.log.refused(exc.reason, address=self._address())
            self._protocol.send_response(_json_response(exc.status, exc.error))
            return
        response = self._protocol.accept(request)
        if response.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS:
            # The library's response has a text for people; all other errors of the node are JSON.
            response = _json_response(response.status_code, "invalid_upgrade")
        else:
            self._session = AgentSession(self._hub.registry, self, subject)
            self._check_idle()
        self._protocol.send_response(response)

    # Incoming frames.

    def _receive(self, frame: Frame) -> None:
        # `ServerProtocol` answers pings itself (RFC 6455, 5.5.2), and rejects a fragment without a
        # start. Binary messages are not part of em_disco, and are ignored.
        match frame.opcode:
            case Opcode.TEXT:
                self._text = bytearray(frame.data)
            case Opcode.CONT if self._text is not None:
                self._text += frame.data
            case Opcode.CLOSE:
                self._end_session("the agent closed")
                return
            case _:
                return
        if frame.fin:
            message = bytes(self._text)
            self._text = None
            self._receive_message(message)

    def _receive_message(self, message: bytes) -> None:
        # One read may have further frames after the one that ended the session.
        if self._session is None:
            return
        try:
            text = message.decode()
        except UnicodeDecodeError:
            # RFC 6455, 8.1: text that is not UTF-8 fails the connection. The library does not check
            # this.
            self._close(CloseCode.INVALID_DATA, "the agent sent text that is not UTF-8")
            return
        self._apply(self._session.receive(text))

    def _apply(self, decision: Decision) -> None:
        match decision:
            case Result(query_id, data):
                self._hub.queries.add_result(self, query_id, data)
            case Send(frame):
                self.send(frame)
            case Registered(frame, agent, is_new):
                if is_new:
                    self._hub.log.registered(agent)
                self.send(frame)
            case Refuse(frame, name, reason):
                self._hub.log.refused(reason, agent=name, address=self._address())
                self.send(frame)
            case Close(code, reason):
                self._close(code, reason)

    # Outgoing frames, and the end.

    def _flush(self) -> None:
        self._flush_due = False
        writes = self._protocol.data_to_send()
        if not writes or self.transport.is_closing():
            return
        self.transport.write(b"".join(writes))
        if writes[-1] == SEND_EOF:
            # After a refusal or a close there is no session any more, so only a protocol error gets
            # this reason.
            self._end_session("the agent broke the WebSocket protocol")
            # Close only the sending side, and continue to read. Closing a socket that has unread
            # data resets the connection, and the peer could lose the close frame or the HTTP
            # response.
            self.transport.write_eof()
            self._cut_soon()
        elif self.transport.get_write_buffer_size() > self._hub.settings.max_unsent_bytes:
            # Dropped, and not paused: pausing would make all queries wait for the slowest agent.
            self.drop("the agent does not read what it is sent")

    def _close(
        self,
        code: int,
        reason: str,
    ) -> None:
        # The session ends first. The name is free while the closing handshake is under way, and a
        # peer that never completes the handshake cannot keep it.
        self._end_session(reason)
        if self._protocol.state is OPEN:
            self._protocol.send_close(code)
        self._flush()
        self._cut_soon()

    def _end_session(self, reason: str) -> None:
        # Several ends may follow each other. The first one has the true reason.
        if self._session is None:
            return
        agent = self._session.end()
        self._session = None
        self._hub.queries.forget(self)
        if agent is not None:
            self._hub.log.gone(agent, reason)

    def _cut_soon(self) -> None:
        if self._close_timer is None:
            self._close_timer = self._loop.call_later(_CLOSE_TIMEOUT_S, self.transport.abort)

    def _check_idle(self, after_grace: bool = False) -> None:
        # The timer is not moved at each read, which would cost more than the read. It looks at the
        # time of the last read when it fires, and is set again.
        #
        # After a stall of the process, the loop runs timers before it reads sockets. Data of an
        # agent that is not idle may wait there. So a timer that finds the agent idle looks a second
        # time, after the loop has read.
        now_s = self._loop.time()
        idle_at_s = self._received_s + self._hub.settings.idle_timeout_ms / 1000
        if now_s < idle_at_s:
            self._idle_timer = self._loop.call_at(idle_at_s, self._check_idle)
        elif not after_grace:
            self._idle_timer = self._loop.call_at(now_s + _IDLE_GRACE_S, self._check_idle, True)
        else:
            self._close(CloseCode.NORMAL_CLOSURE, "nothing received for too long")

    def _address(self) -> str:
        peer = self.transport.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if peer else "?"


def _json_response(status: int, error: str) -> Response:
    body = msgspec.json.encode({"error": error})
    headers = Headers(
        {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
    )
    return Response(
        status,
        http.HTTPStatus(status).phrase,
        headers,
        body,
    )
