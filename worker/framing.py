"""The WebSocket frames that a worker meets a hundred thousand times a second, without a parser's detours.

A node's query is one unmasked text frame, an answer one masked text frame. Only these are read and
written here; every other byte goes to `websockets`, which knows all of RFC 6455 and says what is
wrong. So this decides nothing: it finds where frames begin and end (RFC 6455, 5.2), no more.
"""

from __future__ import annotations

import os
from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:  # websockets is installed without its C extension
    from websockets.utils import apply_mask

TEXT: Final = 0x81  # FIN and opcode 1, nothing reserved
MAX_BYTES: Final = 256 * 1024
"""Text frames up to this size are kept here until they are whole; larger ones are `websockets`' to gather."""

_FIN: Final = 0x80
_CONTROL: Final = 0x08
_MASKED: Final = 0x80
_MASK_BYTES: Final = 4
_MASKS: Final = 1024
_SHORT_HEADS: Final = tuple(bytes((TEXT, _MASKED | length)) for length in range(126))


Piece = tuple[bool, bytes]
"""A part of what was read: (True, the payload of a whole text frame), or (False, bytes for `websockets`)."""


class Splitter:
    """Splits what a node sends after the upgrade into text frames and all else, in order.

    Args:
        max_frame_bytes: a text frame that is larger is left to `websockets`, which refuses it.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_bytes = min(max_frame_bytes, MAX_BYTES)
        self._rest = b""
        self._owed = 0  # what is still to come of a frame whose begin was passed on
        self._in_message = False
        self._lost = False

    def split(self, data: bytes) -> list[Piece]:
        """Take what was read and return what can be acted upon; what is not whole is kept."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        pieces: list[Piece] = []
        at, end = 0, len(data)
        if self._owed:
            at = min(self._owed, end)
            self._owed -= at
            pieces.append((False, data[:at]))
        while at < end:
            if end - at < 2:
                break
            first, length = data[at], data[at + 1]
            start = at + 2
            if length == 126:
                start += 2
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length == 127:
                start += 8
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length > 127:  # it is masked, which no server may do
                self._lost = True
            if self._lost:
                pieces.append((False, data[at:]))
                return pieces
            if start > end:
                break
            stop = start + length
            if first == TEXT and length <= self._max_bytes and not self._in_message:
                if stop > end:
                    break
                pieces.append((True, data[start:stop]))
            else:
                if not first & _CONTROL:
                    self._in_message = not first & _FIN
                self._owed = max(stop - end, 0)
                pieces.append((False, data[at:stop]))
            at = stop
        self._rest = data[at:]
        return pieces

    def take_rest(self) -> bytes:
        """Return what was kept, for `websockets`: nothing more will be split."""
        rest, self._rest = self._rest, b""
        return rest


class TextFrames:
    """Writes a client's text frames."""

    def __init__(self) -> None:
        self._masks = b""
        self._at = 0

    def frame(self, payload: bytes) -> bytes:
        """Return `payload` as one masked text frame."""
        at = self._at
        if at == len(self._masks):
            # Masks must be unpredictable (RFC 6455, 10.3), and are: only not fetched one at a time, for that
            # is a system call, which costs more than all the rest of a query.
            self._masks = os.urandom(_MASKS * _MASK_BYTES)
            at = 0
        self._at = at + _MASK_BYTES
        mask = self._masks[at : self._at]
        length = len(payload)
        if length < 126:
            head = _SHORT_HEADS[length]
        elif length < 65_536:
            head = b"\x81\xfe" + length.to_bytes(2, "big")
        else:
            head = b"\x81\xff" + length.to_bytes(8, "big")
        return head + mask + apply_mask(payload, mask)
