"""The handshake and the results of one agent: from its frames to decisions. It has no socket."""

from __future__ import annotations

from typing import Final, TypeGuard

import msgspec

from disco._registry import (
    AgentConnection,
    RegisteredAgent,
    Registry,
)
from shared import frames

MAX_NAME_CHARS: Final = 255
"""The longest name of an agent or capability."""

MAX_CAPABILITIES: Final = 256

# The reference node fails on text that is not JSON, and closes with the code of an internal error
# (RFC 6455, 7.4.1). This node closes with the same code.
_NOT_JSON_CLOSE_CODE: Final = 1011

_REGISTERED = frames.encode({"status": "ok", "action": frames.REGISTERED})
_UNKNOWN_ACTION = frames.encode({"error": "unknown_action"})
_NOT_REGISTERED = frames.encode({"error": "must register before agent_hello"})


class Send(msgspec.Struct, frozen=True):
    """Send `frame`."""

    frame: bytes


class Refuse(msgspec.Struct, frozen=True):
    """Send `frame`, and log the refusal.

    Attributes:
        frame: the error frame.
        name: the name that the agent asked for.
        reason: the error in `frame`.
    """

    frame: bytes
    name: str
    reason: str


class Registered(msgspec.Struct, frozen=True):
    """Send `frame`: the agent is registered.

    Attributes:
        frame: the confirmation.
        agent: the agent.
        is_new: whether the agent was not registered before.
    """

    frame: bytes
    agent: RegisteredAgent
    is_new: bool


class Result(msgspec.Struct, frozen=True):
    """The agent's result for a query.

    Attributes:
        query_id: the query's id, decoded.
        data: the JSON that the agent sent.
    """

    query_id: str
    data: msgspec.Raw


class Close(msgspec.Struct, frozen=True):
    """Close the socket with `code`; `reason` is for the log."""

    code: int
    reason: str


Decision = Send | Refuse | Registered | Result | Close | None


class AgentSession:
    """The handshake and the results of one connection.

    Args:
        registry: the agents.
        connection: the agent's connection.
        subject: the `sub` of the connection's token, None without authentication.
    """

    def __init__(
        self,
        registry: Registry,
        connection: AgentConnection,
        subject: str | None,
    ) -> None:
        self._registry = registry
        self._connection = connection
        self._subject = subject
        self._name: str | None = None

    def receive(self, text: str) -> Decision:
        """Return the decision for one text message; None ignores it."""
        try:
            frame = frames.decode_client_frame(text)
        except (msgspec.DecodeError, RecursionError):
            # JSON of another shape is an unknown action. Only text that is not JSON closes.
            if _is_json(text):
                return Send(_UNKNOWN_ACTION)
            return Close(_NOT_JSON_CLOSE_CODE, "the agent sent text that is not JSON")
        # The most frequent action first.
        if frame.action == frames.RESULT:
            return _result(frame)
        if frame.action == frames.REGISTER:
            return self._register(frame.name)
        if frame.action == frames.AGENT_HELLO:
            return self._hello(frame.capabilities)
        return Send(_UNKNOWN_ACTION)

    def end(self) -> RegisteredAgent | None:
        """Free the name. Returns the agent, or None if it was not registered."""
        return self._registry.release(self._connection)

    def _register(self, name: object) -> Decision:
        if not _is_name(name):
            # The log shows "?": the name may be of any type, length and characters.
            return _refuse("?", "invalid_name")
        # One socket has one agent. The token has the agent's name. Without a token, the first name
        # that the socket has registered is binding in the same way.
        bound = self._subject
        if bound is None:
            bound = self._registry.name_of(self._connection)
        if bound is not None and name != bound:
            return _refuse(name, "name_mismatch")
        # The name is not claimed yet. The registry lists an agent only with its capabilities,
        # and a client that never sends `agent_hello` must not keep a name from its owner.
        self._name = name
        return Send(_REGISTERED)

    def _hello(self, offered: object) -> Decision:
        if self._name is None:
            return Send(_NOT_REGISTERED)
        capabilities = _capabilities(offered)
        if capabilities is None:
            return _refuse(self._name, "invalid_capabilities")
        is_new = self._registry.name_of(self._connection) is None
        agent = self._registry.claim(self._connection, self._name, capabilities)
        if agent is None:
            return _refuse(self._name, "name_taken")
        frame = frames.encode(
            {
                "status": "ok",
                "action": frames.AGENT_REGISTERED,
                "capabilities": capabilities,
            }
        )
        return Registered(frame, agent, is_new)


def _result(frame: frames.ClientFrame) -> Result | None:
    # An agent may write the same string with other escapes, so ids are compared decoded.
    if not bytes(frame.id).startswith(b'"'):
        return None
    return Result(msgspec.json.decode(frame.id, type=str), frame.data)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def _is_name(name: object) -> TypeGuard[str]:
    # Printable, because logs and pages show names: a line break would forge a log line.
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()


def _capabilities(offered: object) -> tuple[str, ...] | None:
    """Return the capabilities in a frame, or None if they are invalid."""
    if offered is None:
        return ()
    # Bounded, because the registry keeps them, and every listing contains them.
    if not isinstance(offered, list) or len(offered) > MAX_CAPABILITIES:
        return None
    for capability in offered:
        if not isinstance(capability, str) or len(capability) > MAX_NAME_CHARS:
            return None
    return tuple(offered)


def _refuse(name: str, reason: str) -> Refuse:
    frame = frames.encode({"status": "error", "reason": reason})
    return Refuse(frame, name, reason)
