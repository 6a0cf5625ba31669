"""Reads and writes the WebSocket frames that nearly all traffic consists of, without a full parser.

A node's query is one unmasked text frame, an answer is one masked text frame. Only these are read
and written here. All other bytes go to `websockets`, which implements the whole of RFC 6455 and
decides what is an error. This module only finds where frames start and end (RFC 6455, 5.2).
"""

from __future__ import annotations

import os
from typing import Final

try:
    from websockets.speedups import apply_mask
except ImportError:  # websockets is installed without its C extension
    from websockets.utils import apply_mask

MAX_BYTES: Final = 256 * 1024
"""Text frames up to this size are kept here until they are whole. Others go to `websockets`."""

# The first byte of a frame: FIN, three reserved bits, and the opcode.
_FIN: Final = 0x80
_CONTROL: Final = 0x08
_TEXT: Final = _FIN | 0x01

_MASKED: Final = 0x80
_MASK_BYTES: Final = 4
_MASKS_PER_DRAW: Final = 1024
_SHORT_HEADS: Final = tuple(bytes((_TEXT, _MASKED | length)) for length in range(126))

Piece = tuple[bool, bytes]
"""(True, the payload of a whole text frame), or (False, bytes for `websockets`)."""


class TextFraming:
    """The text frames of one connection.

    Args:
        max_frame_bytes: larger text frames are left to `websockets`, which refuses them.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        # The bytes that are kept are copied at each read. For a large frame, the cost of these
        # copies would grow with the square of its size.
        self._max_bytes = min(max_frame_bytes, MAX_BYTES)
        self._rest = b""
        self._passing = 0  # how many bytes of a frame for `websockets` are still to come
        self._in_message = False
        self._unsplittable = False
        # Each connection draws its own masks. The process that workers are forked from has already
        # drawn some (`worker.warm_up`). If they were kept in a global variable, every worker would
        # inherit the same ones.
        self._masks = b""
        self._masks_used = 0

    def split(self, data: bytes) -> list[Piece]:
        """Split what was read after the upgrade into text frames and other bytes, in order.

        The part of a text frame that is not whole is kept for the next call.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        pieces: list[Piece] = []
        at = 0
        end = len(data)
        if self._passing:
            at = min(self._passing, end)
            self._passing -= at
            pieces.append((False, data[:at]))
        while end - at >= 2:
            first = data[at]
            length = data[at + 1]
            start = at + 2
            if length == 126:
                start += 2
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length == 127:
                start += 8
                length = int.from_bytes(data[at + 2 : start], "big")
            elif length > 127:
                # It is masked, which no server may do (RFC 6455, 5.1). `websockets` fails the
                # connection for it, so nothing after it is split.
                self._unsplittable = True
            if self._unsplittable:
                pieces.append((False, data[at:]))
                return pieces
            if start > end:
                break
            stop = start + length
            # Within a fragmented message a text frame is an error (5.4), so it is left to
            # `websockets`.
            if first == _TEXT and length <= self._max_bytes and not self._in_message:
                if stop > end:
                    break
                pieces.append((True, data[start:stop]))
            else:
                # Control frames may come between fragments, and do not end the message (5.4).
                if not first & _CONTROL:
                    self._in_message = not first & _FIN
                self._passing = max(stop - end, 0)
                pieces.append((False, data[at:stop]))
            at = stop
        self._rest = data[at:]
        return pieces

    def take_rest(self) -> bytes:
        """Return what was kept, for `websockets`. Nothing more will be split."""
        rest = self._rest
        self._rest = b""
        return rest

    def frame(self, payload: bytes) -> bytes:
        """Return `payload` as one masked text frame."""
        used = self._masks_used
        if used == len(self._masks):
            # Masks must be unpredictable (RFC 6455, 10.3). They are drawn many at a time: a system
            # call for each took 38 % of a query's time.
            self._masks = os.urandom(_MASKS_PER_DRAW * _MASK_BYTES)
            used = 0
        self._masks_used = used + _MASK_BYTES
        mask = self._masks[used : self._masks_used]
        length = len(payload)
        if length < 126:
            head = _SHORT_HEADS[length]
        elif length < 65_536:
            head = b"\x81\xfe" + length.to_bytes(2, "big")
        else:
            head = b"\x81\xff" + length.to_bytes(8, "big")
        return head + mask + apply_mask(payload, mask)
