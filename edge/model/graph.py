"""A model as it is read from a file: its layers, and the engine's tensors and operations that compute them.

A `ModelGraph` lists the layers as the file has them, whether the engine can run them or not; a `Graph` says what the
engine computes and what of it trains. Where tensors lie in memory is decided in `edge.model.memory_plan`, and how a
graph becomes bytes in `edge.model.assemble`. The readers in `firmware_tools` make both from files;
`edge.model.layers.network` makes a `Graph` from a list of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from numpy.typing import NDArray

Shape = tuple[int, ...]
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


@dataclass(frozen=True)
class Layer:
    """One layer of a model as its file lists it, whether or not the engine can run it.

    None stands for what the file does not tell.

    Parameters
    ----------
    name, kind : str
        The file's own name of the layer, and its format's name of the operator (``CONV_2D``, ``Conv2D``).
    input_shape, output_shape : tuple of int, optional
        Shapes of one sample, without the batch.
    macs : int, optional
        Multiply-accumulates of one inference.
    parameters : int, optional
        Learned numbers.
    quantization : str, optional
        Type of the learned numbers, such as ``float32`` or ``int8 per-channel``; None also without any.
    trainable : bool, optional
        Whether it can train; None also where there is nothing to train.
    activation : str, optional
        The function that the layer ends with, in small letters.
    """

    name: str
    kind: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    macs: int | None = None
    parameters: int | None = None
    quantization: str | None = None
    trainable: bool | None = None
    activation: str | None = None


@dataclass(frozen=True)
class ModelGraph:
    """A model's file, read once: what describing, planning, compiling and exporting start from.

    Parameters
    ----------
    name, format : str
        The file's name without its ending, and ``keras`` or ``tflite``.
    sha256 : str
        SHA-256 of the file, in hexadecimal digits.
    file_bytes : int
        Size of the file.
    layers : tuple of Layer
        All layers in the file's order, also those that the engine cannot run.
    input_shape, output_shape : tuple of int, optional
        Shapes of one sample; None where the file leaves an axis open.
    graph : Graph, optional
        The engine's operations for the layers; a .keras file's have weights of 0. None if the engine cannot run them.
    unsupported : str
        Why there is no graph.
    notes : tuple of str
        What the file does not tell about its layers.
    """

    name: str
    format: str
    sha256: str
    file_bytes: int
    layers: tuple[Layer, ...]
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    graph: Graph | None = None
    unsupported: str = ""
    notes: tuple[str, ...] = ()
