"""One agent's WebSocket: bytes in, frames to the session, frames out. Decisions are the session's.

An asyncio protocol rather than an ASGI application, because the idle clock must see pings, which
ASGI hides. uvicorn builds one for each upgrade request and hands it the request as bytes.
"""

from __future__ import annotations

import asyncio
import http
import logging
from typing import Any, Final, cast

import msgspec
from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import OPEN, SEND_EOF
from websockets.server import ServerProtocol

from disco.hub import Hub
from disco.session import Answer, Close, Decision, Listed, Refuse, Reply, Session
from disco.upgrade import Admit, Reject, authenticate, is_agent_path

CLOSE_TIMEOUT_S: Final = 1.0
"""How long a peer may take to end a connection that we have closed, before it is cut."""

IDLE_GRACE_S: Final = 0.02
"""After a stall of the loop timers run first: what has arrived is read before the idle clock judges."""

# The library logs request lines, which hold tokens. No logging configuration can wake this logger.
_SILENT = logging.Logger("disco.websockets")
_SILENT.disabled = True


class AgentSocket(asyncio.Protocol):
    """The connection of one agent; a `disco.registry.Peer`."""

    def __init__(self, hub: Hub, *, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        """Take uvicorn's arguments after the `hub`; of those only the set of open connections is used."""
        self._hub = hub
        self._connections = cast("set[asyncio.Protocol]", server_state.connections)
        self._loop = asyncio.get_running_loop()
        self._frames = ServerProtocol(max_size=hub.settings.max_frame_bytes, logger=_SILENT)
        self._session: Session | None = None
        self._text: bytearray | None = None
        self._left = False
        self._flush_due = False
        self._received_s = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport of the HTTP connection."""
        self.transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Act on all that one read holds, then write once."""
        self._received_s = self._loop.time()
        self._frames.receive_data(data)
        for event in self._frames.events_received():
            if isinstance(event, Request):
                self._upgrade(event)
            elif isinstance(event, Frame):
                self._receive(event)
        self._flush()

    def eof_received(self) -> None:
        """Free the name at once; the transport closes itself."""
        self._leave("the connection was lost")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._leave("the connection was lost")
        for timer in (self._idle_timer, self._end_timer):
            if timer is not None:
                timer.cancel()
        self._connections.discard(self)

    # What the node calls.

    def send(self, frame: bytes) -> None:
        """Send a text frame, together with all others of this loop turn."""
        if self._frames.state is not OPEN:
            return
        self._frames.send_text(frame)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def drop(self, why: str) -> None:
        """Cut the connection without a close frame; `why` is for the log."""
        self._leave(why)
        self.transport.abort()

    def shutdown(self) -> None:
        """Close because the node stops."""
        self._close(CloseCode.GOING_AWAY, "the node stopped")

    # The opening handshake.

    def _upgrade(self, request: Request) -> None:
        outcome = self._judge(request)
        if isinstance(outcome, Reject):
            self._hub.journal.refused(outcome.why, address=self._address())
            self._frames.send_response(_json_response(outcome.status, outcome.error))
            return
        response = self._frames.accept(request)
        if response.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self._frames.send_response(_json_response(response.status_code, "invalid_upgrade"))
            return
        self._frames.send_response(response)
        self._session = Session(self._hub.registry, self, outcome.subject)
        self._watch_idle()

    def _judge(self, request: Request) -> Admit | Reject:
        if not is_agent_path(request.path):
            return Reject(404, "not_found", "agents connect to /ws only")
        if not self._hub.admits_connection():
            return Reject(429, "rate_limited", "too many connections a second")
        return authenticate(request.path, self._hub.settings.secret)

    # Frames in.

    def _receive(self, frame: Frame) -> None:
        # Pings are answered by ServerProtocol. Binary messages are not in the protocol, and ignored.
        match frame.opcode:
            case Opcode.TEXT:
                self._text = bytearray(frame.data)
            case Opcode.CONT if self._text is not None:
                self._text += frame.data
            case Opcode.CLOSE:
                self._leave("the agent closed")
                return
            case _:
                return
        if frame.fin:
            message, self._text = bytes(self._text), None
            self._message(message)

    def _message(self, message: bytes) -> None:
        if self._left or self._session is None:
            return
        try:
            text = message.decode()
        except UnicodeDecodeError:
            self._close(CloseCode.INVALID_DATA, "the agent sent text that is not UTF-8")
            return
        self._act(self._session.receive(text))

    def _act(self, decision: Decision) -> None:
        match decision:
            case Answer(query_id, data):
                self._hub.queries.answer(self, query_id, data)
            case Reply(frame):
                self.send(frame)
            case Listed(frame, agent, first):
                if first:
                    self._hub.journal.registered(agent)
                self.send(frame)
            case Refuse(frame, name, reason):
                self._hub.journal.refused(reason, agent=name, address=self._address())
                self.send(frame)
            case Close(code, why):
                self._close(code, why)

    # Frames out, and the end.

    def _flush(self) -> None:
        self._flush_due = False
        writes = self._frames.data_to_send()
        if not writes or self.transport.is_closing():
            return
        self.transport.write(b"".join(writes))
        if writes[-1] == SEND_EOF:
            self._leave("the agent broke the WebSocket protocol")
            # Half-close, and read on: closing with bytes unread would reset the connection, and the peer
            # could lose the close frame or the HTTP answer.
            self.transport.write_eof()
            self._end_soon()
        elif self.transport.get_write_buffer_size() > self._hub.settings.max_unsent_bytes:
            self.drop("the agent does not read what it is sent")

    def _close(self, code: int, why: str) -> None:
        self._leave(why)
        if self._frames.state is OPEN:
            self._frames.send_close(code)
        self._flush()
        self._end_soon()

    def _leave(self, why: str) -> None:
        if self._left:
            return
        self._left = True
        agent = self._session.leave() if self._session is not None else None
        self._hub.queries.forget(self)
        if agent is not None:
            self._hub.journal.gone(agent, why)

    def _end_soon(self) -> None:
        if self._end_timer is None:
            self._end_timer = self._loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def _watch_idle(self, last_look: bool = False) -> None:
        idle_at_s = self._received_s + self._hub.settings.idle_timeout_ms / 1000
        now_s = self._loop.time()
        if now_s < idle_at_s:
            self._idle_timer = self._loop.call_at(idle_at_s, self._watch_idle)
        elif not last_look:
            self._idle_timer = self._loop.call_at(now_s + IDLE_GRACE_S, self._watch_idle, True)
        else:
            self._close(CloseCode.NORMAL_CLOSURE, "nothing received for too long")

    def _address(self) -> str:
        peer = self.transport.get_extra_info("peername")
        return f"{peer[0]}:{peer[1]}" if peer else "?"


def _json_response(status: int, error: str) -> Response:
    body = msgspec.json.encode({"error": error})
    headers = Headers(
        [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
    )
    return Response(status, http.HTTPStatus(status).phrase, headers, body)
