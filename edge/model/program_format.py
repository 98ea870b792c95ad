"""The layout of a program's bytes: records, flags and limits.

docs/reference/program-format.md and the engine's headers describe it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from tinyfleet.edge.model.graph import DType
from tinyfleet.edge.model.memory_plan import HEADER_BYTES, OP_BYTES, TENSOR_BYTES

VERSION = 2
MAX_LAYERS = 32  # that train: the bits of a mask
MAX_BYTES = 0x10000000
MAX_FILE_BYTES = 2 * MAX_BYTES  # more than the constants, and the records of at most 65,535 operations and tensors
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


class Header(NamedTuple):
    """The fields of HEADER. logits, output: the tensors before and behind the loss's own softmax or sigmoid."""

    magic: bytes
    version: int
    header_bytes: int
    program_bytes: int
    crc: int
    tensors: int
    ops: int
    loss: int
    flags: int
    input: int
    logits: int
    output: int
    dlogits: int
    classes: int
    huber_delta: float
    params_bytes: int
    activation_bytes: int
    constants_bytes: int


class TensorRecord(NamedTuple):
    """The fields of TENSOR."""

    type: int
    zero_point: int
    height: int
    width: int
    channels: int
    offset: int
    scale: float


class OpRecord(NamedTuple):
    """The fields of OP. option: a ReLU's mask, or a PLACE's first channel."""

    kind: int
    flags: int
    layer: int
    reserved: int
    input: int
    input2: int
    output: int
    dout: int
    din: int
    din2: int
    kernel_height: int
    kernel_width: int
    pad_top: int
    pad_left: int
    stride_height: int
    stride_width: int
    dilation_height: int
    dilation_width: int
    option: int
    trained: int
    params: int
    constants: int
