"""Chunks: the retained messages that carry a program, or the parameters of one round."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import cbor2

from tinyfleet.edge.wire.cbor import array, loads, octets, uint32
from tinyfleet.edge.wire.errors import ProtocolError

CHUNK = 1024
"""Bytes of every chunk but the last."""
MAX_CHUNKS = 1024
"""So a program or a round's parameters take at most 1 MiB."""


class Chunk(NamedTuple):
    """Bytes `offset` to `offset + len(data) - 1` of the whole."""

    offset: int
    data: bytes


def chunks(data: bytes) -> Iterator[bytes]:
    """Cut `data` into chunks.

    Yields
    ------
    bytes
        The payload of each chunk, in order.

    Raises
    ------
    ProtocolError
        If there are more than MAX_CHUNKS.
    """
    if len(data) > CHUNK * MAX_CHUNKS:
        raise ProtocolError(f"{len(data)} bytes are more than the {CHUNK * MAX_CHUNKS} that can be sent")
    for offset in range(0, len(data), CHUNK):
        part = bytes(data[offset : offset + CHUNK])
        yield cbor2.dumps([offset, zlib.crc32(part), part])


def decode_chunk(payload: bytes) -> Chunk:
    """Decode one chunk and check its CRC-32.

    Raises
    ------
    ProtocolError
        If the payload is not a chunk, or if it is damaged.
    """
    offset, crc, data = array(loads(payload), "chunk", 3)
    part = octets(data, "data")
    if not 1 <= len(part) <= CHUNK or uint32(offset, "offset") % CHUNK:
        raise ProtocolError(f"{len(part)} bytes at {offset} are not a chunk")
    if zlib.crc32(part) != uint32(crc, "crc"):
        raise ProtocolError("the chunk is damaged: its CRC-32 differs")
    return Chunk(offset, part)
