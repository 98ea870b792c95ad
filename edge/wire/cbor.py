"""CBOR whose every field is checked: its bytes may come from anyone."""

from __future__ import annotations

import io
import struct
from typing import Any

import cbor2

from tinyfleet.edge.wire.errors import ProtocolError


class Float32:
    """A number that travels as a CBOR float32, whatever its value (cbor2 would choose float64)."""

    def __init__(self, value: float) -> None:
        self.value = value


def dumps(fields: list[Any]) -> bytes:
    """Encode a message.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire.
    """
    return cbor2.dumps(fields, default=_write_float32)


def loads(payload: bytes) -> list[Any]:
    """Decode a message: one array that is not empty, and nothing after it.

    Raises
    ------
    ProtocolError
        If the bytes are anything else.
    """
    stream = io.BytesIO(payload)
    try:
        value = cbor2.CBORDecoder(stream).decode()
    except Exception as error:  # the bytes are anyone's, and cbor2 builds what their tags name: dates, patterns, ...
        raise ProtocolError(f"not CBOR: {error}") from error
    if stream.tell() != len(payload):
        raise ProtocolError(f"{len(payload) - stream.tell()} bytes after the message")
    if type(value) is not list or not value:
        raise ProtocolError("not an array")
    return value


# Checks: each returns the value, or raises ProtocolError with the field's name.


def uint32(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFFFFFF:
        raise ProtocolError(f"{name} must be an integer in 0..2^32-1, not {value!r:.50}")
    return value


def int32(value: object, name: str) -> int:
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise ProtocolError(f"{name} must be an integer of 32 bits, not {value!r:.50}")
    return value


def real(value: object, name: str) -> float:
    if type(value) is not float:
        raise ProtocolError(f"{name} must be a float, not {value!r:.50}")
    return value


def boolean(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise ProtocolError(f"{name} must be true or false, not {value!r:.50}")
    return value


def octets(value: object, name: str, size: int | None = None) -> bytes:
    if type(value) is not bytes or (size is not None and len(value) != size):
        raise ProtocolError(f"{name} must be {'' if size is None else f'{size} '}bytes, not {value!r:.50}")
    return value


def text(value: object, name: str, longest: int) -> str:
    if type(value) is not str or not 1 <= len(value.encode(errors="replace")) <= longest:
        raise ProtocolError(f"{name} must be text of 1 to {longest} bytes, not {value!r:.50}")
    return value


def array(value: object, name: str, *lengths: int) -> list[Any]:
    if type(value) is not list or len(value) not in lengths:
        raise ProtocolError(f"{name} must be an array of {' or '.join(map(str, lengths))}, not {value!r:.50}")
    return value


def _write_float32(encoder: cbor2.CBOREncoder, value: object) -> None:
    if not isinstance(value, Float32):
        raise ProtocolError(f"a message can't carry {value!r:.50}")
    try:
        encoder.write(struct.pack(">Bf", 0xFA, value.value))
    except (OverflowError, struct.error, TypeError) as error:
        raise ProtocolError(f"{value.value!r:.50} is not a float32") from error
