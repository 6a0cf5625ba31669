"""Why a worker has no connection to its node: a kind for decisions, and a reason for people.

The reason is written where the fault is detected, and may quote the node. Code decides by the kind
and never by the reason, for example whether a log line repeats an earlier one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class LossKind(StrEnum):
    """What ended a connection, or prevented it."""

    # Before the upgrade request.
    NO_TOKEN = "no_token"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_FAILED = "connect_failed"
    CERTIFICATE_REFUSED = "certificate_refused"
    TLS_FAILED = "tls_failed"

    # Between the upgrade request and `agent_registered`.
    UPGRADE_TIMEOUT = "upgrade_timeout"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    REDIRECTED = "redirected"
    UPGRADE_REFUSED = "upgrade_refused"
    NOT_EM_DISCO = "not_em_disco"
    REGISTRATION_TIMEOUT = "registration_timeout"
    NAME_TAKEN = "name_taken"
    NAME_MISMATCH = "name_mismatch"
    NOT_REGISTERED = "not_registered"
    REGISTRATION_REFUSED = "registration_refused"

    # At any time after the TCP connection is open.
    CLOSED_BY_NODE = "closed_by_node"
    PROTOCOL_ERROR = "protocol_error"
    NOT_UTF8 = "not_utf8"
    UNREADABLE = "unreadable"
    # The node ended the TCP connection without a close frame.
    CUT = "cut"
    # The socket failed, for example because the node reset it.
    BROKEN = "broken"
    NO_PONG = "no_pong"
    INTERNAL_ERROR = "internal_error"
    UNKNOWN = "unknown"


class Loss(NamedTuple):
    """Why a connection ended or could not be made."""

    kind: LossKind
    reason: str
