"""The part of CBOR that the wire uses, and no more: its bytes may come from anyone.

protocol.cddl's messages are arrays of integers, float32s, strings and typed arrays of floats, each in its
shortest form, as the C node's decoder demands too. A general decoder also builds shared references, big integers,
dates and patterns, so nothing of a message is decoded by one. Errors name types and lengths, never what was sent.
"""

from __future__ import annotations

import struct
from typing import Any

import cbor2

from tinyfleet.edge.wire.errors import ProtocolError

MAX_BYTES = 65_536
"""Bytes of the largest message."""
TYPED_ARRAYS = (84, 85)
"""The only tags: RFC 8746's little-endian float16 and float32."""

_MAX_DEPTH = 4  # arrays in arrays: the phases of a command's train task
_MAX_ITEMS = 17  # of one array
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)
_ARGUMENT_SIZES = {24: 1, 25: 2, 26: 4, 27: 8}
_SMALLEST = {1: 24, 2: 1 << 8, 4: 1 << 16, 8: 1 << 32}  # that need an argument of so many bytes
_SIMPLE_VALUES = {0xF4: False, 0xF5: True, 0xF6: None}
_FLOAT32 = 0xFA
_read_float32 = struct.Struct(">f").unpack_from


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

    Parameters
    ----------
    payload
        Anything, from anyone.

    Returns
    -------
    list
        Integers, floats, booleans, None, bytes, text, lists of these, and for typed arrays a `cbor2.CBORTag` of bytes.

    Raises
    ------
    ProtocolError
        If the bytes are anything else.
    """
    if len(payload) > MAX_BYTES:
        raise ProtocolError(f"a message of {len(payload)} bytes; at most {MAX_BYTES} are accepted")
    try:
        value, end = _decode(payload, 0, _MAX_DEPTH)
    except (IndexError, struct.error):
        raise ProtocolError("not CBOR: it is cut off") from None
    if end != len(payload):
        raise ProtocolError(f"{len(payload) - end} bytes after the message")
    if type(value) is not list or not value:
        raise ProtocolError("not an array")
    return value


def _decode(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """The item at `at`, and where the next one begins. IndexError or struct.error: it is cut off."""
    first = data[at]
    kind = first >> 5
    if kind == _SIMPLE:
        if first == _FLOAT32:
            return _read_float32(data, at + 1)[0], at + 5
        if first in _SIMPLE_VALUES:
            return _SIMPLE_VALUES[first], at + 1
        raise ProtocolError(f"not of this protocol: simple value or float 0x{first:02x} at byte {at}")
    argument, at = _argument(data, at)
    if kind == _UNSIGNED:
        return argument, at
    if kind == _NEGATIVE:
        return -1 - argument, at
    if kind in (_BYTES, _TEXT):
        return _string(data, at, at + argument, kind)
    if kind == _ARRAY:
        if argument > _MAX_ITEMS or not depth:
            raise ProtocolError(f"not of this protocol: an array that is too long or too deep before byte {at}")
        items = []
        for _ in range(argument):
            item, at = _decode(data, at, depth - 1)
            items.append(item)
        return items, at
    if kind == _TAG and argument in TYPED_ARRAYS and data[at] >> 5 == _BYTES:
        value, at = _decode(data, at, 0)
        return cbor2.CBORTag(argument, value), at
    raise ProtocolError(f"not of this protocol: a {'map' if kind == _MAP else 'tag'} before byte {at}")


def _argument(data: bytes, at: int) -> tuple[int, int]:
    """The number in an item's head, and where its content begins."""
    argument = data[at] & 31
    if argument < 24:
        return argument, at + 1
    size = _ARGUMENT_SIZES.get(argument)
    if size is None:
        raise ProtocolError(f"not of this protocol: an indefinite length at byte {at}")
    end = at + 1 + size
    value = int.from_bytes(data[at + 1 : end], "big")
    if end > len(data):
        raise IndexError
    if value < _SMALLEST[size]:
        raise ProtocolError(f"not of this protocol: a number that is not in its shortest form at byte {at}")
    return value, end


def _string(data: bytes, at: int, end: int, kind: int) -> tuple[bytes | str, int]:
    if end > len(data):
        raise IndexError
    if kind == _BYTES:
        return data[at:end], end
    try:
        return data[at:end].decode(), end
    except UnicodeDecodeError:
        raise ProtocolError(f"text that is not UTF-8 before byte {end}") from None


# Checks: each returns the value, or raises ProtocolError with the field's name.


def uint32(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFFFFFF:
        raise _wrong(name, "an integer in 0..2^32-1", value)
    return value


def uint64(value: object, name: str) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFFFFFFFFFFFFFF:
        raise _wrong(name, "an integer in 0..2^64-1", value)
    return value


def int32(value: object, name: str) -> int:
    if type(value) is not int or not -(2**31) <= value < 2**31:
        raise _wrong(name, "an integer of 32 bits", value)
    return value


def real(value: object, name: str) -> float:
    if type(value) is not float:
        raise _wrong(name, "a float", value)
    return value


def boolean(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise _wrong(name, "true or false", value)
    return value


def octets(value: object, name: str, size: int | None = None) -> bytes:
    if type(value) is not bytes or (size is not None and len(value) != size):
        raise _wrong(name, f"{'' if size is None else f'{size} '}bytes", value)
    return value


def text(value: object, name: str, longest: int) -> str:
    if type(value) is not str or not 1 <= len(value.encode(errors="replace")) <= longest or not value.isprintable():
        raise _wrong(name, f"printable text of 1 to {longest} bytes", value)
    return value


def array(value: object, name: str, *lengths: int) -> list[Any]:
    if type(value) is not list or len(value) not in lengths:
        raise _wrong(name, f"an array of {' or '.join(map(str, lengths))}", value)
    return value


def typed_array(value: object, tag: int) -> bytes:
    if not isinstance(value, cbor2.CBORTag) or value.tag != tag:
        raise ProtocolError("not a typed array of floats of this size")
    return octets(value.value, "a typed array")


def _wrong(name: str, wanted: str, value: object) -> ProtocolError:
    """Says what a value is by its type and length alone: it may be a stranger's."""
    kind = type(value).__name__
    found = f"{kind} of length {len(value)}" if isinstance(value, bytes | str | list) else kind
    if type(value) in (int, float):
        found = f"{kind} out of range"
    return ProtocolError(f"{name} must be {wanted}, not {found}")


def _write_float32(encoder: cbor2.CBOREncoder, value: object) -> None:
    if not isinstance(value, Float32):
        raise ProtocolError(f"a message can't carry a {type(value).__name__}")
    try:
        encoder.write(struct.pack(">Bf", 0xFA, value.value))
    except (OverflowError, struct.error, TypeError) as error:
        raise ProtocolError(f"a {type(value.value).__name__} does not fit a float32") from error
