"""A model as the engine runs it: tensors, and the operations between them in the order of their execution.

A graph says what a model computes and what of it trains; where its tensors lie in memory is for `edge.plan`, and how it
is written down for `edge.program`. Readers of other formats (firmware_tools) make graphs; `edge.program.build` makes
one of a list of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from numpy.typing import NDArray

Shape3 = tuple[int, int, int]
DType = Literal["float32", "int8"]
Trains = Literal["nothing", "bias", "all"]
Loss = Literal["softmax_cross_entropy", "mse", "binary_cross_entropy", "huber"]
LOSSES: tuple[Loss, ...] = ("softmax_cross_entropy", "mse", "binary_cross_entropy", "huber")


class Kind(IntEnum):
    """What an operation computes; the numbers are those of mote_internal.h, which says more of each."""

    DENSE = 1
    CONV2D = 2
    DEPTHWISE = 3
    AVGPOOL = 4
    MAXPOOL = 5
    LAYERNORM = 6
    ADD = 7
    RELU = 8
    RELU6 = 9
    LEAKY_RELU = 10
    TANH = 11
    SIGMOID = 12
    SOFTMAX = 13
    PLACE = 24
    SLICE = 25
    QUANTIZE = 28
    DEQUANTIZE = 29
    INT8_DENSE = 32
    INT8_CONV2D = 33
    INT8_DEPTHWISE = 34
    INT8_AVGPOOL = 35
    INT8_MAXPOOL = 36
    INT8_ADD = 37
    INT8_MUL = 38
    INT8_MEAN = 39
    INT8_SOFTMAX = 40
    INT8_TABLE = 41
    TRAINED_INT8_DENSE = 48
    TRAINED_INT8_CONV2D = 49
    TRAINED_INT8_DEPTHWISE = 50


@dataclass(frozen=True)
class Tensor:
    """A value in the graph. scale and zero_point: of int8, real = scale * (q - zero_point).

    view_of: the index of the tensor whose memory this is, under another shape of as many elements (a reshape, a
    flatten, a dropout); such a tensor is never an op's output.
    """

    shape: Shape3
    dtype: DType = "float32"
    scale: float = 0.0
    zero_point: int = 0
    view_of: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without what aligns the next."""
        return self.size * (4 if self.dtype == "float32" else 1)


@dataclass(frozen=True)
class Op:
    """One operation. Only the fields that its kind has mean something; see mote_internal.h.

    name: the model's own name of the layer that it came from; ops of one layer share it.
    inputs: one or two tensors; output: the tensor that it writes. Every tensor is written by one op, but for those that
    several PLACE ops fill together.
    weights: float32 (or int8 in an INT8 kind), in the engine's layout: [out][in], [out][kh][kw][in], [kh][kw][out], or
    gamma [c]. None: the architecture alone. bias: float32, beta, or int32 as in TFLite (not folded).
    weight_scales: float64 [out], of int8 weights. low, high: what an int8 output is clamped to.
    offsets: a PLACE's first row, column and channel. begin, steps: a SLICE's. beta: a softmax's, 1 in float32.
    table: an INT8_TABLE's 256 bytes. trained: how many output channels train, the first ones; all unless int8.
    """

    kind: Kind
    name: str
    inputs: tuple[int, ...]
    output: int
    kernel: tuple[int, int] = (0, 0)
    strides: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (0, 0)
    pads: tuple[int, int] = (0, 0)
    weights: NDArray[Any] | None = None
    bias: NDArray[Any] | None = None
    weight_scales: NDArray[Any] | None = None
    low: int = -128
    high: int = 127
    slope: float = 0.0
    epsilon: float = 0.0
    beta: float = 1.0
    offsets: Shape3 = (0, 0, 0)
    fills: bool = False
    begin: Shape3 = (0, 0, 0)
    steps: Shape3 = (1, 1, 1)
    table: bytes = b""
    trains: Trains = "nothing"
    trained: int | None = None


@dataclass(frozen=True)
class Graph:
    """tensors[0] is the model's input. output: the tensor that the ops compute in the end (logits under a
    cross-entropy). loss: None for a model that only runs. classes: outputs in use at first; None: all.
    momentum: keep room for the optimiser's. huber_delta: where a Huber loss becomes linear."""

    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    output: int
    loss: Loss | None = None
    classes: int | None = None
    momentum: bool = False
    huber_delta: float = 1.0
