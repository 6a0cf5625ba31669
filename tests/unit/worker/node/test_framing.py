"""`worker.node._framing`: frames are read and written as `websockets` does it."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import CLIENT, OPEN, SERVER, Protocol

from worker.node import _framing as framing
from worker.node._framing import MAX_BYTES, TextFraming

BOUNDARIES = (0, 1, 125, 126, 127, 65_535, 65_536, MAX_BYTES - 1, MAX_BYTES)


def serialized(opcode: Opcode, payload: bytes, *, fin: bool = True) -> bytes:
    return Frame(opcode, payload, fin).serialize(mask=False)


def split(splitter: TextFraming, *reads: bytes) -> tuple[list[bytes], bytes]:
    """Return the texts, and the bytes that are passed on to websockets."""
    pieces = [piece for read in reads for piece in splitter.split(read)]
    return [data for is_text, data in pieces if is_text], b"".join(
        data for is_text, data in pieces if not is_text
    )


@pytest.mark.parametrize("size", BOUNDARIES)
def test_text_up_to_the_size_limit_is_split_off_whole(size: int) -> None:
    payload = os.urandom(size)
    data = serialized(Opcode.TEXT, payload)
    for cut in {0, 1, 2, len(data) // 2, len(data) - 1}:
        found = split(TextFraming(1 << 30), data[:cut], data[cut:])
        assert found == ([payload], b""), f"cut at {cut}"


@pytest.mark.parametrize("bound", [4096, MAX_BYTES])
def test_text_over_the_limit_is_passed_on_and_the_next_is_split(bound: int) -> None:
    splitter = TextFraming(bound)
    large, small = serialized(Opcode.TEXT, b"x" * (bound + 1)), serialized(Opcode.TEXT, b"small")
    assert split(splitter, large[:20]) == ([], large[:20]), "none of it is buffered"
    assert split(splitter, large[20:] + small) == ([b"small"], large[20:])
    assert splitter.take_rest() == b""


def test_texts_between_other_frames_keep_their_order() -> None:
    ping, text = serialized(Opcode.PING, b"p"), serialized(Opcode.TEXT, b"t")
    pieces = TextFraming(4096).split(ping + text + ping + text[:2])
    assert pieces == [(False, ping), (True, b"t"), (False, ping)]


def test_text_inside_a_fragmented_message_is_passed_on_to_websockets() -> None:
    first = serialized(Opcode.TEXT, b"a", fin=False)
    ping = serialized(Opcode.PING, b"")
    last = serialized(Opcode.CONT, b"b")
    text = serialized(Opcode.TEXT, b"t")
    splitter = TextFraming(4096)
    assert split(splitter, first + ping + text) == ([], first + ping + text)
    assert split(splitter, last + text) == ([b"t"], last)


def test_everything_after_a_masked_frame_is_passed_on() -> None:
    masked = Frame(Opcode.TEXT, b"x").serialize(mask=True)
    text = serialized(Opcode.TEXT, b"t")
    splitter = TextFraming(4096)
    assert split(splitter, text + masked + text) == ([b"t"], masked + text)
    assert split(splitter, text) == ([], text)


def test_frame_with_an_impossible_length_is_passed_on() -> None:
    first = b"\x81\x7f" + b"\xff" * 8 + b"x" * 100
    second = b"y" * 100
    assert split(TextFraming(4096), first, second) == ([], first + second)


def test_buffered_bytes_are_taken_once() -> None:
    splitter = TextFraming(4096)
    data = serialized(Opcode.TEXT, b"text")
    splitter.split(data[:3])
    assert splitter.take_rest() == data[:3]
    assert splitter.take_rest() == b""


OPCODES = st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.PING, Opcode.PONG])


@given(
    sent=st.lists(st.tuples(OPCODES, st.binary(max_size=125)), max_size=20),
    cuts=st.lists(st.integers(min_value=1, max_value=60), max_size=20),
)
def test_frames_survive_any_split_into_reads(
    sent: list[tuple[Opcode, bytes]], cuts: list[int]
) -> None:
    data = b"".join(serialized(opcode, payload) for opcode, payload in sent)
    reads = []
    for cut in cuts:
        reads.append(data[:cut])
        data = data[cut:]
    texts, rest = split(TextFraming(4096), *reads, data)
    assert texts == [payload for opcode, payload in sent if opcode is Opcode.TEXT]
    reader = Protocol(CLIENT, state=OPEN)
    reader.receive_data(rest)
    others = [
        (event.opcode, bytes(event.data))
        for event in reader.events_received()
        if isinstance(event, Frame)
    ]
    assert others == [each for each in sent if each[0] is not Opcode.TEXT]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
def test_server_reads_back_the_written_frame(size: int) -> None:
    payload = os.urandom(size)
    server = Protocol(SERVER, state=OPEN, max_size=None)
    server.receive_data(TextFraming(4096).frame(payload))
    (event,) = server.events_received()
    assert isinstance(event, Frame)
    assert (event.opcode, event.fin, bytes(event.data)) == (Opcode.TEXT, True, payload)


def test_each_frame_has_its_own_random_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def urandom(size: int) -> bytes:
        drawn.append(os.getrandom(size))
        return drawn[-1]

    monkeypatch.setattr(framing.os, "urandom", urandom)
    frames = TextFraming(4096)
    masks = [frames.frame(b"")[2:6] for _ in range(3000)]
    # Each four random bytes are used once, in order.
    assert b"".join(masks) == b"".join(drawn)[: 4 * 3000]
