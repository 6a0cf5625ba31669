"""One agent's frames in, what to do about each out (PROTOCOL.md, 2 and 3). No socket here."""

from __future__ import annotations

from typing import Final, TypeGuard

import msgspec

from disco.registry import Agent, Peer, Registry
from shared import frames

MAX_NAME_CHARS: Final = 255
MAX_CAPABILITIES: Final = 256

NOT_JSON_CLOSE_CODE: Final = 1011
"""The running reference crashes on text that is not JSON; to its clients that is an internal error."""

_REGISTERED = frames.encode({"status": "ok", "action": frames.REGISTERED})
_UNKNOWN_ACTION = frames.encode({"error": "unknown_action"})
_NOT_REGISTERED = frames.encode({"error": "must register before agent_hello"})


class Reply(msgspec.Struct, frozen=True):
    """Send `frame`."""

    frame: bytes


class Refuse(msgspec.Struct, frozen=True):
    """Send `frame`, which says `reason` to an agent that calls itself `name`."""

    frame: bytes
    name: str
    reason: str


class Listed(msgspec.Struct, frozen=True):
    """Send `frame`; `agent` is listed from now on, `first` says whether it was not before."""

    frame: bytes
    agent: Agent
    first: bool


class Answer(msgspec.Struct, frozen=True):
    """`data`, JSON as it came, is the agent's answer to the query `query_id`."""

    query_id: str
    data: msgspec.Raw


class Close(msgspec.Struct, frozen=True):
    """Close the socket with `code`, for the reason `why`."""

    code: int
    why: str


Decision = Reply | Refuse | Listed | Answer | Close | None


class Session:
    """The handshake and the answers of one connection."""

    def __init__(self, registry: Registry, peer: Peer, subject: str | None) -> None:
        """`subject` is the `sub` of the token that the connection came with, None without authentication."""
        self._registry = registry
        self._peer = peer
        self._subject = subject
        self._name: str | None = None

    def receive(self, text: str) -> Decision:
        """Return what one text message asks for; None when it is to be ignored."""
        try:
            frame = frames.decode_client_frame(text)
        except (msgspec.DecodeError, RecursionError):
            if _is_json(text):
                return Reply(_UNKNOWN_ACTION)
            return Close(NOT_JSON_CLOSE_CODE, "the agent sent text that is not JSON")
        if frame.action == frames.RESULT:
            return _answer(frame)
        if frame.action == frames.REGISTER:
            return self._register(frame.name)
        if frame.action == frames.AGENT_HELLO:
            return self._hello(frame.capabilities)
        return Reply(_UNKNOWN_ACTION)

    def leave(self) -> Agent | None:
        """Free the name; returns what the connection was listed as, or None when it was not."""
        return self._registry.release(self._peer)

    def _register(self, name: object) -> Decision:
        if not _is_name(name):
            return Refuse(_error("invalid_name"), "?", "invalid_name")
        # Without a token the first name that was listed binds as one would: a socket is one agent.
        bound = self._subject if self._subject is not None else self._registry.name_of(self._peer)
        if bound is not None and name != bound:
            return Refuse(_error("name_mismatch"), name, "name_mismatch")
        self._name = name
        return Reply(_REGISTERED)

    def _hello(self, capabilities: object) -> Decision:
        if self._name is None:
            return Reply(_NOT_REGISTERED)
        offered = _capabilities(capabilities)
        if offered is None:
            return Refuse(_error("invalid_capabilities"), self._name, "invalid_capabilities")
        first = self._registry.name_of(self._peer) is None
        agent = self._registry.claim(self._peer, self._name, offered)
        if agent is None:
            return Refuse(_error("name_taken"), self._name, "name_taken")
        frame = frames.encode({"status": "ok", "action": frames.AGENT_REGISTERED, "capabilities": offered})
        return Listed(frame, agent, first)


def _answer(frame: frames.ClientFrame) -> Answer | None:
    # An agent may write the same string with other escapes, so the id is compared decoded.
    query_id = msgspec.json.decode(frame.id) if bytes(frame.id).startswith(b'"') else None
    return Answer(query_id, frame.data) if isinstance(query_id, str) else None


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_name(name: object) -> TypeGuard[str]:
    # Printable, because names are logged and shown.
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _capabilities(value: object) -> tuple[str, ...] | None:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_CAPABILITIES:
        return None
    return tuple(value) if all(isinstance(word, str) and len(word) <= MAX_NAME_CHARS for word in value) else None


def _error(reason: str) -> bytes:
    return frames.encode({"status": "error", "reason": reason})
