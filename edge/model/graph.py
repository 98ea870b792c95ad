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
    """What an operation computes; mote_internal.h has the same numbers, and defines each operation."""

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
    """A value in the graph.

    Parameters
    ----------
    shape
        Height, width and channels.
    dtype
        The type of its elements.
    scale, zero_point
        Of int8: the real number is scale * (q - zero_point).
    view_of
        The index of the tensor whose memory this one shares, in another shape with as many elements (a reshape, a
        flatten, a dropout). Such a tensor is never an op's output.
    """

    shape: Shape3
    dtype: DType = "float32"
    scale: float = 0.0
    zero_point: int = 0
    view_of: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without padding."""
        return self.size * (4 if self.dtype == "float32" else 1)


@dataclass(frozen=True)
class Op:
    """One operation. Which of the fields have a meaning depends on its kind; see mote_internal.h.

    Parameters
    ----------
    kind
        What it computes.
    name
        The model's name of the layer that it came from; ops of one layer share it.
    inputs
        Indices of one or two tensors.
    output
        Index of the tensor that it writes. One op writes each tensor, or several PLACE ops together.
    kernel, strides, dilation, pads
        Of a window: rows and columns; `pads` are those before the first element.
    weights
        float32, or int8 in an INT8 kind, in the engine's layout: [out][in], [out][kh][kw][in], [kh][kw][out], or gamma
        [c]. None: the architecture alone.
    bias
        float32, a layer norm's beta, or int32 as in TFLite (not folded).
    weight_scales
        Of int8 weights, float64 [out].
    low, high
        The range that an int8 output is clamped to.
    slope, epsilon, beta
        Of a leaky ReLU, a layer norm and a softmax (1 in float32).
    offsets, fills
        A PLACE's first row, column and channel, and whether it first fills its output with zeros.
    begin, steps
        A SLICE's first element and steps.
    table
        An INT8_TABLE's 256 bytes.
    trains
        What of it trains.
    trained
        How many output channels train, the first ones; None: all. Only int8 weights train in part.
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
    """What the engine computes, and what of it trains.

    Parameters
    ----------
    tensors
        All values; the first one is the model's input.
    ops
        The operations, in the order of execution.
    output
        Index of the tensor with the result; the logits, if the loss is a cross-entropy.
    loss
        None for a model that only runs.
    classes
        Outputs in use at first; None: all.
    momentum
        Whether to reserve memory for the optimizer's momentum.
    huber_delta
        The error at which a Huber loss becomes linear.
    """

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
