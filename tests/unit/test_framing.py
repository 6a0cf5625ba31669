"""`worker.framing`: frames are found and written as `websockets` finds and reads them, wherever reads cut them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import CLIENT, OPEN, SERVER, Protocol

from worker import framing
from worker.framing import MAX_BYTES, Splitter, TextFrames

BOUNDARIES = (0, 1, 125, 126, 127, 65_535, 65_536, MAX_BYTES - 1, MAX_BYTES)


def serialized(opcode: Opcode, payload: bytes, *, fin: bool = True) -> bytes:
    return Frame(opcode, payload, fin).serialize(mask=False)


def split(splitter: Splitter, *reads: bytes) -> tuple[list[bytes], bytes]:
    """Return the texts, and all that is left for websockets."""
    pieces = [piece for read in reads for piece in splitter.split(read)]
    return [data for is_text, data in pieces if is_text], b"".join(data for is_text, data in pieces if not is_text)


@pytest.mark.parametrize("size", BOUNDARIES)
def test_text_of_any_size_that_is_kept_is_split_off_whole(size: int) -> None:
    payload = os.urandom(size)
    data = serialized(Opcode.TEXT, payload)
    assert split(Splitter(1 << 30), data) == ([payload], b"")
    for cut in {1, 2, len(data) // 2, len(data) - 1}:
        assert split(Splitter(1 << 30), data[:cut], data[cut:]) == ([payload], b""), f"cut at {cut}"


@pytest.mark.parametrize("bound", [4096, MAX_BYTES])
def test_text_past_the_bound_is_passed_on_as_it_comes_and_what_follows_is_split_again(bound: int) -> None:
    splitter = Splitter(bound)
    large, small = serialized(Opcode.TEXT, b"x" * (bound + 1)), serialized(Opcode.TEXT, b"small")
    assert split(splitter, large[:20]) == ([], large[:20]), "nothing of it is kept here"
    assert split(splitter, large[20:] + small) == ([b"small"], large[20:])
    assert splitter.take_rest() == b""


def test_texts_between_other_frames_keep_their_order() -> None:
    ping, text = serialized(Opcode.PING, b"p"), serialized(Opcode.TEXT, b"t")
    pieces = Splitter(4096).split(ping + text + ping + text[:2])
    assert pieces == [(False, ping), (True, b"t"), (False, ping)]


def test_text_within_a_fragmented_message_is_left_to_websockets_to_refuse() -> None:
    begin = serialized(Opcode.TEXT, b"a", fin=False)
    ping = serialized(Opcode.PING, b"")
    end = serialized(Opcode.CONT, b"b")
    text = serialized(Opcode.TEXT, b"t")
    splitter = Splitter(4096)
    assert split(splitter, begin + ping + text) == ([], begin + ping + text)
    assert split(splitter, end + text) == ([b"t"], end)


def test_masked_frame_is_the_last_that_is_looked_at() -> None:
    masked = Frame(Opcode.TEXT, b"x").serialize(mask=True)
    text = serialized(Opcode.TEXT, b"t")
    splitter = Splitter(4096)
    assert split(splitter, text + masked + text) == ([b"t"], masked + text)
    assert split(splitter, text) == ([], text)


def test_length_that_no_frame_can_have_is_passed_on() -> None:
    head = b"\x81\x7f" + b"\xff" * 8
    assert split(Splitter(4096), head + b"x" * 100, b"y" * 100) == ([], head + b"x" * 100 + b"y" * 100)


def test_rest_is_what_was_kept() -> None:
    splitter = Splitter(4096)
    data = serialized(Opcode.TEXT, b"text")
    splitter.split(data[:3])
    assert splitter.take_rest() == data[:3]
    assert splitter.take_rest() == b""


OPCODES = st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.PING, Opcode.PONG])


@given(
    sent=st.lists(st.tuples(OPCODES, st.binary(max_size=125)), max_size=20),
    cuts=st.lists(st.integers(min_value=1, max_value=60), max_size=20),
)
def test_any_frames_in_any_reads_are_those_that_were_sent(sent: list[tuple[Opcode, bytes]], cuts: list[int]) -> None:
    data = b"".join(serialized(opcode, payload) for opcode, payload in sent)
    reads = []
    for cut in cuts:
        reads.append(data[:cut])
        data = data[cut:]
    texts, rest = split(Splitter(4096), *reads, data)
    assert texts == [payload for opcode, payload in sent if opcode is Opcode.TEXT]
    reader = Protocol(CLIENT, state=OPEN)
    reader.receive_data(rest)
    others = [(event.opcode, bytes(event.data)) for event in reader.events_received() if isinstance(event, Frame)]
    assert others == [each for each in sent if each[0] is not Opcode.TEXT]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65_535, 65_536, 200_000])
def test_written_frame_is_what_a_server_reads(size: int) -> None:
    payload = os.urandom(size)
    server = Protocol(SERVER, state=OPEN, max_size=None)
    server.receive_data(TextFrames().frame(payload))
    (event,) = server.events_received()
    assert isinstance(event, Frame)
    assert (event.opcode, event.fin, bytes(event.data)) == (Opcode.TEXT, True, payload)


def test_no_two_frames_have_a_mask_that_was_not_drawn_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []

    def urandom(size: int) -> bytes:
        drawn.append(os.getrandom(size))
        return drawn[-1]

    monkeypatch.setattr(framing.os, "urandom", urandom)
    frames = TextFrames()
    masks = [frames.frame(b"")[2:6] for _ in range(3000)]
    assert b"".join(masks) == b"".join(drawn)[: 4 * 3000], "each four bytes are used once, in their order"
