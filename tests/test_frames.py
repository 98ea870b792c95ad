"""Frames on a serial line: Python and C write the same bytes and read the same frames; damaged ones are dropped."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.serial_frames import Frame, FrameReader

topics = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30) | st.just("t" * 255)
payloads = st.binary(max_size=600) | st.integers(0, 600).map(lambda n: b"\1" * n) | st.integers(0, 600).map(bytes)
some_frames = st.lists(st.builds(Frame, st.integers(0, 255), topics, payloads), max_size=4)


def c_encode(frame: Frame) -> bytes:
    written = bytearray()

    @ffi.callback("void(void *, const uint8_t *, size_t)")  # type: ignore[untyped-decorator]
    def put(_context: Any, data: Any, size: int) -> None:
        assert 1 <= size <= 255
        written.extend(ffi.buffer(data, size))

    lib.mote_frame_write(put, ffi.NULL, frame.kind, frame.topic.encode(), frame.payload, len(frame.payload))
    return bytes(written)


def c_read(line: bytes, capacity: int = 2000) -> tuple[list[Frame], int]:
    """(the frames, how many were dropped) as the C reader finds them."""
    reader, frame = ffi.new("mote_frame_reader_t *"), ffi.new("mote_frame_t *")
    buffer = ffi.new("uint8_t[]", capacity)
    lib.mote_frame_reader_init(reader, buffer, capacity)
    found = []
    for byte in line:
        if lib.mote_frame_read(reader, byte, frame):
            topic = bytes(ffi.buffer(frame.topic, frame.topic_size))
            payload = bytes(ffi.buffer(frame.payload, frame.size))
            found.append(Frame(frame.kind, topic.decode(errors="replace"), payload))
    return found, reader.dropped


@given(sent=some_frames)
def test_python_and_c_write_the_same(sent: list[Frame]) -> None:
    line = b"".join(serial_frames.encode(f) for f in sent)
    assert b"".join(c_encode(f) for f in sent) == line
    assert c_read(line) == (sent, 0)
    reader = FrameReader()
    assert [*reader.feed(line)] == sent and reader.dropped == 0


@given(sent=some_frames, cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_a_line_may_bring_pieces_of_any_size(sent: list[Frame], cuts: list[int]) -> None:
    line = b"".join(serial_frames.encode(f) for f in sent)
    reader = FrameReader()
    edges = [0, *sorted(cuts), len(line)]
    assert [f for a, b in itertools.pairwise(edges) for f in reader.feed(line[a:b])] == sent


noise = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=5)


@given(sent=some_frames, damage=noise)
def test_a_damaged_frame_is_dropped_and_the_next_is_read(sent: list[Frame], damage: list[tuple[int, int]]) -> None:
    line = bytearray(b"".join(serial_frames.encode(f) for f in sent))
    for place, byte in damage:
        if place < len(line):
            line[place] = byte
    last = Frame(serial_frames.MESSAGE, "t", b"after the storm")
    line += serial_frames.encode(last)
    reader = FrameReader()
    got = [*reader.feed(bytes(line))]
    assert got[-1] == last and all(f in sent for f in got[:-1])
    assert c_read(bytes(line)) == (got, reader.dropped)


@given(line=st.binary(max_size=400))
def test_random_bytes_are_no_frames(line: bytes) -> None:
    reader = FrameReader()
    assert [*reader.feed(line + b"\0")] == []
    assert c_read(line + b"\0") == ([], reader.dropped)


@given(sent=some_frames, capacity=st.integers(0, 400))
def test_a_frame_that_is_too_large_is_dropped(sent: list[Frame], capacity: int) -> None:
    """The C reader never writes beyond its buffer: it ends where the buffer does (and the sanitizer run watches)."""
    line = b"".join(serial_frames.encode(f) for f in sent)
    fits = [f for f in sent if 2 + len(f.topic.encode()) + len(f.payload) + 4 <= capacity]
    assert c_read(line, capacity) == (fits, len(sent) - len(fits))


def test_a_line_without_end_takes_no_memory() -> None:
    reader = FrameReader(max_frame=100)
    for _ in range(1000):
        assert [*reader.feed(b"\1" * 1000)] == []
    assert len(reader._begun) <= 101
    frame = Frame(serial_frames.HELLO, "t", b"x")
    assert [*reader.feed(b"\0" + serial_frames.encode(frame))] == [frame] and reader.dropped == 1


@pytest.mark.parametrize(("line", "dropped"), [(b"\0\0\0", 0), (b"\1\0", 1), (b"\5\0", 1), (b"\2x\0", 1)])
def test_what_is_too_short_to_be_a_frame_is_dropped_and_silence_is_not(line: bytes, dropped: int) -> None:
    reader = FrameReader()
    assert [*reader.feed(line)] == [] and reader.dropped == dropped
    assert c_read(line) == ([], dropped)


def test_a_topic_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="256 bytes"):
        serial_frames.encode(Frame(serial_frames.MESSAGE, "t" * 256))
    assert c_encode(Frame(serial_frames.MESSAGE, "t" * 256)) == b""
