"""The layout of a program's bytes, as docs/reference/program-format.md and the engine's headers describe it:
records, flags and limits."""

from __future__ import annotations

import struct

from tinyfleet.edge.model.graph import DType
from tinyfleet.edge.model.memory_plan import HEADER_BYTES, OP_BYTES, TENSOR_BYTES

VERSION = 2
MAX_LAYERS = 32  # that train: the bits of a mask
MAX_BYTES = 0x10000000
NONE = 0xFFFF
EXTERNAL = 0xFFFFFFFF

HEADER = struct.Struct("<4sHHIIHHBBHHHHHfIII")
TENSOR = struct.Struct("<BbHHHIf")
OP = struct.Struct("<BBBB6H4H4BHHII")
assert (HEADER.size, TENSOR.size, OP.size) == (HEADER_BYTES, TENSOR_BYTES, OP_BYTES)
UNSUMMED = 16  # bytes before those that the CRC covers

CARRIES, MOMENTUM, INT8 = 1, 2, 4  # header flags
WEIGHTS, BIAS, ADDS, ADDS2, FILLS, MASKS = 1, 2, 4, 8, 16, 32  # op flags
TYPES: tuple[DType, ...] = ("float32", "int8")
