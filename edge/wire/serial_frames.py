"""Messages on a serial line, as mote/include/mote_frame.h describes: COBS frames with a CRC-32."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from cobs import cobs  # type: ignore[import-untyped]

from tinyfleet.edge.wire.keys import Keys

MAX_FRAME = 65_536
"""Bytes of the largest frame that a reader accepts; longer ones are dropped."""

# What a frame carries. A device sends the first five; a gateway HELLO, CONNECTED, MESSAGE and KEYS.
PUBLISH, PUBLISH_RETAINED, SUBSCRIBE, UNSUBSCRIBE = 1, 2, 3, 4
HELLO, CONNECTED, MESSAGE, KEYS = 16, 17, 18, 19


class Frame(NamedTuple):
    """One message on the line.

    Parameters
    ----------
    kind
        PUBLISH, SUBSCRIBE, ...
    topic
        Its topic, or the filter to subscribe to; a gateway's greeting has none.
    payload
        What is published.
    """

    kind: int
    topic: str = ""
    payload: bytes = b""


def encode(frame: Frame) -> bytes:
    """Encode a frame.

    Parameters
    ----------
    frame
        The message.

    Returns
    -------
    bytes
        The frame between two zero bytes, its delimiters.

    Raises
    ------
    ValueError
        If the topic is longer than 255 bytes.

    Examples
    --------
    >>> list(FrameReader().feed(encode(Frame(SUBSCRIBE, "tinyfleet/home/devices/kitchen/command"))))
    [Frame(kind=3, topic='tinyfleet/home/devices/kitchen/command', payload=b'')]
    """
    name = frame.topic.encode()
    if len(name) > 255:
        raise ValueError(f"a topic of {len(name)} bytes does not fit a frame; 255 do")
    body = bytes((frame.kind, len(name))) + name + frame.payload
    coded: bytes = cobs.encode(body + zlib.crc32(body).to_bytes(4, "little"))
    return b"\0" + coded + b"\0"


def keys_payload(keys: Keys) -> bytes:
    """What a gateway sends a board in a KEYS frame: whom to obey, and 8 random bytes."""
    public = keys.current + (keys.next or bytes(32)) + keys.root
    return keys.command + public + keys.version.to_bytes(4, "little") + secrets.token_bytes(8)


class FrameReader:
    """Finds the frames in the bytes from a serial line, which come in pieces of any size.

    Parameters
    ----------
    max_frame
        Bytes of the largest frame; longer ones are dropped.

    Attributes
    ----------
    dropped
        Frames so far that were damaged or too long.
    """

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max = max_frame + max_frame // 254 + 1  # encoded
        self._begun = bytearray()
        self._skipping = False
        self.dropped = 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take the next bytes from the line.

        Yields
        ------
        Frame
            Each frame that is complete now.
        """
        *ended, rest = data.split(b"\0")
        for piece in ended:
            self._add(piece)
            if self._begun or self._skipping:
                frame = None if self._skipping else _decode(bytes(self._begun))
                self._begun.clear()
                self._skipping = False
                if frame is None:
                    self.dropped += 1
                else:
                    yield frame
        self._add(rest)

    def _add(self, piece: bytes) -> None:
        if len(self._begun) + len(piece) > self._max:
            self._skipping = True
            self._begun.clear()
        elif not self._skipping:
            self._begun += piece


def _decode(data: bytes) -> Frame | None:
    try:
        body: bytes = cobs.decode(data)
        size = len(body) - 4
        if size < 2 or size < 2 + body[1] or zlib.crc32(body[:size]) != int.from_bytes(body[size:], "little"):
            return None
        return Frame(body[0], body[2 : 2 + body[1]].decode(), body[2 + body[1] : size])
    except (cobs.DecodeError, UnicodeDecodeError):
        return None
