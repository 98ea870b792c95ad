"""Programs for the mote engine: from a model to the checked binary that a device reads in place.

`build` takes a list of layers, `assemble` any graph; `Program` is the binary with what can be read from it. Its layout
is described in docs/reference/program-format.md and mote/src/engine/mote_internal.h.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge.errors import ProgramError as ProgramError
from tinyfleet.edge.model import quantized
from tinyfleet.edge.model.graph import LOSSES, DType, Graph, Kind, Loss, Op, Shape3, Tensor
from tinyfleet.edge.model.memory_plan import (
    HEADER_BYTES,
    MASKED,
    OP_BYTES,
    TENSOR_BYTES,
    TRAINED_INT8,
    WEIGHTED,
    Gradients,
    constants_bytes,
    macs,
    params_bytes,
    plan_memory,
    trained_counts,
    weight_counts,
)

Shape = tuple[int, ...]
Vector = NDArray[np.float32]
Padding = Literal["valid", "same"]

MAX_LAYERS = 32  # that train: the bits of a mask
MAX_BYTES = 0x10000000
NONE = 0xFFFF
EXTERNAL = 0xFFFFFFFF
VERSION = 2

_HEADER = struct.Struct("<4sHHIIHHBBHHHHHfIII")
_TENSOR = struct.Struct("<BbHHHIf")
_OP = struct.Struct("<BBBB6H4H4BHHII")
assert (_HEADER.size, _TENSOR.size, _OP.size) == (HEADER_BYTES, TENSOR_BYTES, OP_BYTES)
_UNSUMMED = 16  # bytes before those that the CRC covers

_CARRIES, _MOMENTUM, _INT8 = 1, 2, 4  # header flags
_WEIGHTS, _BIAS, _ADDS, _ADDS2, _FILLS, _MASKS = 1, 2, 4, 8, 16, 32  # op flags
_TYPES: tuple[DType, ...] = ("float32", "int8")


@dataclass(frozen=True)
class Dense:
    """y = W x + b on a flat input; weights [units, inputs], bias [units]."""

    units: int


@dataclass(frozen=True)
class Conv2D:
    """2-D convolution of [h, w, c]; weights [filters, kernel h, kernel w, c], bias [filters]."""

    filters: int
    kernel: int | tuple[int, int] = 3
    strides: int | tuple[int, int] = 1
    padding: Padding = "valid"
    dilation: int | tuple[int, int] = 1


@dataclass(frozen=True)
class DepthwiseConv2D:
    """A filter of its own for every channel, `multiplier` of them; weights [kernel h, kernel w, out], bias [out]."""

    kernel: int | tuple[int, int] = 3
    strides: int | tuple[int, int] = 1
    padding: Padding = "valid"
    dilation: int | tuple[int, int] = 1
    multiplier: int = 1


@dataclass(frozen=True)
class AvgPool2D:
    """The mean of every window, of the elements inside the input; strides default to the size."""

    size: int | tuple[int, int] = 2
    strides: int | tuple[int, int] | None = None
    padding: Padding = "valid"


@dataclass(frozen=True)
class MaxPool2D:
    """The largest element of every window; strides default to the size."""

    size: int | tuple[int, int] = 2
    strides: int | tuple[int, int] | None = None
    padding: Padding = "valid"


@dataclass(frozen=True)
class GlobalAvgPool2D:
    """The mean over all rows and columns."""


@dataclass(frozen=True)
class LayerNorm:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta over the channels of every place."""

    epsilon: float = 1e-3


@dataclass(frozen=True)
class Flatten:
    """[h, w, c] as one row."""


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)"""


@dataclass(frozen=True)
class ReLU6:
    """min(max(x, 0), 6)"""


@dataclass(frozen=True)
class LeakyReLU:
    """x, or slope * x where x is negative."""

    slope: float = 0.3


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent."""


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + exp(-x))"""


@dataclass(frozen=True)
class Softmax:
    """exp(x) over its sum, over the channels; not for the end of a model with a cross-entropy, which has its own."""


Window = Conv2D | DepthwiseConv2D | AvgPool2D | MaxPool2D
Layer = Window | Dense | GlobalAvgPool2D | LayerNorm | Flatten | ReLU | ReLU6 | LeakyReLU | Tanh | Sigmoid | Softmax

_POINTWISE: dict[type, Kind] = {
    ReLU: Kind.RELU,
    ReLU6: Kind.RELU6,
    LeakyReLU: Kind.LEAKY_RELU,
    Tanh: Kind.TANH,
    Sigmoid: Kind.SIGMOID,
    Softmax: Kind.SOFTMAX,
    LayerNorm: Kind.LAYERNORM,
}
_WINDOWS: dict[type, Kind] = {
    Conv2D: Kind.CONV2D,
    DepthwiseConv2D: Kind.DEPTHWISE,
    AvgPool2D: Kind.AVGPOOL,
    MaxPool2D: Kind.MAXPOOL,
}


@dataclass(frozen=True)
class LayerInfo:
    """One operation of a program. Shapes are (h, w, c) or (n,); macs: multiply-adds of an
    inference; params: numbers that it has; trained: those of them that train."""

    name: str
    kind: str
    in_shape: Shape
    out_shape: Shape
    macs: int
    params: int
    trained: int

    @property
    def trainable(self) -> bool:
        """Whether any of it trains."""
        return self.trained > 0


# Graphs of layers


def _pair(value: int | tuple[int, int], what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and 1 <= v <= 255 for v in pair):
        raise ProgramError(f"{what} is {value!r}; it must be one or two whole numbers from 1 to 255")
    return pair[0], pair[1]


def _windows(size: int, kernel: int, stride: int, padding: str, what: str) -> tuple[int, int]:
    """How many windows fit in one dimension, and the padding before it (as TensorFlow has them)."""
    if padding == "same":
        count = -(-size // stride)
        return count, max((count - 1) * stride + kernel - size, 0) // 2
    if padding != "valid":
        raise ProgramError(f"{what} has padding {padding!r}; it can be 'valid' or 'same'")
    if kernel > size:
        raise ProgramError(f"{what} is larger ({kernel}) than its input ({size}); use a smaller one or padding='same'")
    return (size - kernel) // stride + 1, 0


def _check_shape(shape: Sequence[int], what: str) -> None:
    if not all(isinstance(v, int) and 1 <= v <= 0xFFFF for v in shape) or math.prod(shape) > MAX_BYTES // 4:
        raise ProgramError(
            f"{what} has the shape {tuple(shape)}; every dimension must be a whole number from 1 to 65535"
        )


def _full(shape: Shape) -> Shape3:
    if len(shape) == 1:
        return 1, 1, shape[0]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ProgramError(f"the input shape is {shape}; it must be (features,) or (height, width, channels)")


def _short(shape: Shape3) -> Shape:
    return shape[2:] if shape[:2] == (1, 1) else shape


def _op(layer: Layer, shape: Shape3, index: int) -> tuple[Op, Shape3]:
    """The op of a layer whose input has this shape, its tensors not numbered yet, and its output's shape."""
    here = f"layer {index} ({type(layer).__name__})"
    op = Op(_POINTWISE.get(type(layer), Kind.DENSE), f"layer_{index}", (), 0)
    if type(layer) in _POINTWISE:
        slope, epsilon = getattr(layer, "slope", 0.0), getattr(layer, "epsilon", 0.0)
        return replace(op, slope=slope, epsilon=epsilon), shape
    if isinstance(layer, Dense):
        if shape[:2] != (1, 1):
            raise ProgramError(f"{here} takes a flat input, but gets {shape}; put Flatten() before it")
        return op, (1, 1, layer.units)
    if isinstance(layer, GlobalAvgPool2D):
        return replace(op, kind=Kind.AVGPOOL, kernel=shape[:2], strides=(1, 1), dilation=(1, 1)), (1, 1, shape[2])
    if not isinstance(layer, Window):
        known = ", ".join(sorted({t.__name__ for t in (*_POINTWISE, *_WINDOWS, Dense, Flatten, GlobalAvgPool2D)}))
        raise ProgramError(f"layer {index} is {layer!r}; the engine has {known}")
    channels, dilation = shape[2], _pair(getattr(layer, "dilation", 1), f"the dilation of {here}")
    if isinstance(layer, AvgPool2D | MaxPool2D):
        kernel, strides = layer.size, layer.size if layer.strides is None else layer.strides
    else:
        kernel, strides = layer.kernel, layer.strides
        channels = layer.filters if isinstance(layer, Conv2D) else channels * layer.multiplier
    what = f"the window of {here}"
    (kh, kw), (sh, sw) = _pair(kernel, what), _pair(strides, f"the strides of {here}")
    rows, top = _windows(shape[0], (kh - 1) * dilation[0] + 1, sh, layer.padding, what)
    columns, left = _windows(shape[1], (kw - 1) * dilation[1] + 1, sw, layer.padding, what)
    op = replace(op, kind=_WINDOWS[type(layer)], kernel=(kh, kw), strides=(sh, sw), dilation=dilation, pads=(top, left))
    return op, (rows, columns, channels)


def network(
    layers: Sequence[Layer],
    input_shape: Sequence[int],
    loss: Loss | None,
    *,
    trainable: Collection[int] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
    momentum: bool = False,
    classes: int | None = None,
) -> Graph:
    """The graph of a model of layers one behind the other: what `build` makes a program of.

    input_shape: (features,) or (height, width, channels). loss: None for a model that only runs. trainable: which
    layers may train, counting layers with parameters from 0; None for all (none without a loss). weights: arrays by
    the names of `Program.all_parameters`; a frozen layer needs its own; if trainable layers have theirs, the program
    carries them as initial values (then all must), else it is the architecture alone. momentum: keep room for the
    optimiser's. classes: outputs in use at first, if fewer than the last layer has.

    ReLU before max pooling is built as max pooling before ReLU: the same numbers, with less memory and work.

    Raises ProgramError.
    """
    if loss is not None and loss not in LOSSES:
        raise ProgramError(f"the loss is {loss!r}; the engine has {', '.join(LOSSES)}")
    layers = list(layers)
    for i in range(len(layers) - 1, 0, -1):
        for j in range(i, len(layers)):
            if not (isinstance(layers[j - 1], ReLU) and isinstance(layers[j], MaxPool2D)):
                break
            layers[j - 1], layers[j] = layers[j], layers[j - 1]

    shape = _full(tuple(int(v) for v in input_shape))
    _check_shape(shape, "the input")
    tensors, ops = [Tensor(shape)], list[Op]()
    for i, layer in enumerate(layers):
        source = len(tensors) - 1
        if isinstance(layer, Flatten):
            tensors.append(Tensor((1, 1, tensors[source].size), view_of=source))
        else:
            op, shape = _op(layer, tensors[source].shape, i)
            ops.append(replace(op, inputs=(source,), output=len(tensors)))
            tensors.append(Tensor(shape))
        _check_shape(tensors[-1].shape, f"the output of layer {i} ({type(layer).__name__})")
    if not ops:
        raise ProgramError("a model needs at least one layer that computes something")
    numbers = [i for i, op in enumerate(ops) if op.kind in WEIGHTED]
    chosen = (range(len(numbers)) if loss is not None else ()) if trainable is None else trainable
    for number in chosen:
        if not 0 <= number < len(numbers):
            raise ProgramError(f"layer {number} cannot train: the model has {len(numbers)} layers with parameters")
        ops[numbers[number]] = replace(ops[numbers[number]], trains="all")
    graph = Graph(tuple(tensors), tuple(ops), len(tensors) - 1, loss, classes, momentum)
    return _with_weights(graph, weights or {})


def build(
    layers: Sequence[Layer],
    input_shape: Sequence[int],
    loss: Loss | None,
    *,
    trainable: Collection[int] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
    momentum: bool = False,
    classes: int | None = None,
) -> Program:
    """The program of a model of layers one behind the other; see `network`. Raises ProgramError."""
    return assemble(
        network(layers, input_shape, loss, trainable=trainable, weights=weights, momentum=momentum, classes=classes)
    )


def named_arrays(ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[tuple[str, Shape, Op]]:
    """(name, shape, op) of every weight and bias, in the order of the ops; the names are `dense_0/weights`, ..."""
    arrays: list[tuple[str, Shape, Op]] = []
    number = 0
    for op in ops:
        weights, biases = weight_counts(op, tensors)
        if not weights:
            continue
        kind = op.kind.name.lower()
        arrays.append((f"{kind}_{number}/weights", _weights_shape(op, tensors), op))
        arrays.append((f"{kind}_{number}/bias", (biases,), op))
        number += 1
    return arrays


def _weights_shape(op: Op, tensors: Sequence[Tensor]) -> Shape:
    x, channels = tensors[op.inputs[0]], tensors[op.output].shape[2]
    if op.kind == Kind.LAYERNORM:
        return (channels,)
    if op.kind in (Kind.DENSE, Kind.INT8_DENSE, Kind.TRAINED_INT8_DENSE):
        return channels, x.size
    if op.kind in (Kind.CONV2D, Kind.INT8_CONV2D, Kind.TRAINED_INT8_CONV2D):
        return channels, *op.kernel, x.shape[2]
    return *op.kernel, channels


def _trained_shapes(op: Op, tensors: Sequence[Tensor]) -> list[Shape]:
    """The shapes of what trains of an op: its weights, its bias."""
    if op.trains == "nothing":
        return []
    shape = _weights_shape(op, tensors)
    channels = tensors[op.output].shape[2]
    if op.kind in TRAINED_INT8 and op.trained is not None:
        channels = op.trained
        shape = (*shape[:-1], channels) if op.kind == Kind.TRAINED_INT8_DEPTHWISE else (channels, *shape[1:])
    return [shape, (channels,)] if op.trains == "all" else [(channels,)]


def _with_weights(graph: Graph, weights: Mapping[str, NDArray[Any]]) -> Graph:
    """The graph with arrays by name; those that train all or none. Raises ProgramError."""
    arrays = named_arrays(graph.ops, graph.tensors)
    unknown = sorted(set(weights) - {name for name, _, _ in arrays})
    if unknown:
        known = ", ".join(name for name, _, _ in arrays)
        raise ProgramError(f"no layer takes the weights '{unknown[0]}'; the model has {known or 'none'}")
    carries = any(op.trains != "nothing" and name in weights for name, _, op in arrays)
    found: dict[int, dict[str, NDArray[Any]]] = {}
    for name, shape, op in arrays:
        trains = op.trains != "nothing"
        if trains and not carries:
            continue
        if name not in weights:
            why = "the other trainable layers have" if trains else "it is frozen, so it needs"
            raise ProgramError(f"'{name}' has no weights; {why} them: pass them too")
        array = np.asarray(weights[name], dtype="<f4")
        if array.shape != shape:
            raise ProgramError(f"'{name}' has the shape {array.shape}; the model needs {shape}")
        found.setdefault(id(op), {})[name.rpartition("/")[2]] = array
    return replace(graph, ops=tuple(replace(op, **found.get(id(op), {})) for op in graph.ops))  # type: ignore[arg-type]


# Programs


def check(graph: Graph) -> None:
    """Raises ProgramError, naming the op, for what the engine would refuse."""
    written = {op.output for op in graph.ops}
    for index, tensor in enumerate(graph.tensors):
        _check_shape(tensor.shape, "a tensor")
        if index and tensor.view_of is None and index not in written:
            raise ProgramError(f"no op computes tensor {index} of the graph")
    output = graph.tensors[graph.output]
    if graph.loss is not None and output.dtype != "float32":
        raise ProgramError("a loss needs a float32 output; put a DEQUANTIZE at the model's end")
    if graph.classes is not None and not 1 <= graph.classes <= output.size:
        raise ProgramError(f"{graph.classes} classes at first; the model's output has room for 1 to {output.size}")
    if graph.classes not in (None, output.size) and output.shape[2] != output.size:
        raise ProgramError(f"only a flat output can grow; this one has the shape {output.shape}")
    if not 0 < graph.huber_delta < math.inf:
        raise ProgramError(f"the Huber loss's delta is {graph.huber_delta}; it must be more than 0")
    training = [op for op in graph.ops if op.trains != "nothing"]
    if len(training) > MAX_LAYERS:
        raise ProgramError(
            f"{len(training)} layers would train; {MAX_LAYERS} can. Let fewer train (--train-from a later layer)"
        )
    if training and graph.loss is None:
        raise ProgramError("a model that trains needs a loss; choose one of " + ", ".join(LOSSES))
    for op in training:
        if op.kind not in WEIGHTED + TRAINED_INT8 or op.trained == 0:
            raise ProgramError(f"'{op.name}' ({op.kind.name.lower()}) has nothing that could train")
    if len({op.kind in TRAINED_INT8 for op in training}) > 1:
        raise ProgramError("float32 and int8 weights cannot train in one model")
    if graph.momentum and training and training[0].kind in TRAINED_INT8:
        raise ProgramError("int8 weights train without momentum")


def assemble(graph: Graph, *, carry: bool = True) -> Program:
    """The program of a graph. carry: with the initial values of what trains, if the graph has them all.

    Raises ProgramError if the engine cannot run it, or if it lacks the weights of a frozen op.
    """
    check(graph)
    training = [op for op in graph.ops if op.trains != "nothing"]
    carries = carry and bool(training) and all(op.weights is not None for op in training)
    where = plan_memory(graph)
    initial, constants, records = [], [], []
    params_size = sum(params_bytes(op, graph.tensors) for op in training)
    if max(where.activations, params_size + sum(constants_bytes(op, graph.tensors) for op in graph.ops)) > MAX_BYTES:
        raise ProgramError(f"the model needs more than {MAX_BYTES} bytes; make it smaller")
    params_at, at, layer = 0, params_size if carries else 0, 0
    for op, gradients in zip(graph.ops, where.gradients, strict=True):
        trains = op.trains != "nothing"
        if carries and trains:
            initial.append(_initial(op, graph.tensors))
        records.append(_record(op, graph.tensors, gradients, layer if trains else 0, params_at if trains else 0, at))
        constants.append(_constants(op, graph.tensors))
        params_at += params_bytes(op, graph.tensors)
        layer += trains
        at += len(constants[-1])
    tensors = [
        _TENSOR.pack(_TYPES.index(t.dtype) + 1, t.zero_point, *t.shape, EXTERNAL if offset is None else offset, t.scale)
        for t, offset in zip(where.tensors, where.offsets, strict=True)
    ]
    body = b"".join([*tensors, *records, *initial, *constants])
    int8 = any(op.kind in TRAINED_INT8 for op in training)
    flags = _CARRIES * carries | _MOMENTUM * (graph.momentum and bool(training)) | _INT8 * int8
    classes = where.tensors[graph.output].size if graph.classes is None else graph.classes
    header = _HEADER.pack(
        b"MOTE", VERSION, _HEADER.size, _HEADER.size + len(body), 0, len(tensors), len(records),
        0 if graph.loss is None else LOSSES.index(graph.loss) + 1, flags, 0, graph.output, where.output,
        NONE if where.dlogits is None else where.dlogits, classes, graph.huber_delta, params_size,
        where.activations, at,
    )  # fmt: skip
    summed = header[_UNSUMMED:] + body
    return Program.parse(header[: _UNSUMMED - 4] + struct.pack("<I", zlib.crc32(summed)) + summed)


def _floats(op: Op, tensors: Sequence[Tensor]) -> tuple[bytes, bytes]:
    """An op's float32 weights and bias. Raises ProgramError."""
    shape, channels = _weights_shape(op, tensors), tensors[op.output].shape[2]
    if op.weights is None:
        raise ProgramError(f"'{op.name}' has no weights; not all of it trains, so it needs them: pass them too")
    bias = np.zeros(channels, np.float32) if op.bias is None else op.bias
    if op.weights.shape != shape or bias.shape != (channels,):
        raise ProgramError(
            f"'{op.name}' has weights of the shape {op.weights.shape} and a bias of {bias.shape}; it needs {shape} and "
            f"{(channels,)}"
        )
    if not (np.isfinite(op.weights).all() and np.isfinite(bias).all()):
        raise ProgramError(f"the weights of '{op.name}' have numbers that are not finite")
    return np.ascontiguousarray(op.weights, "<f4").tobytes(), np.ascontiguousarray(bias, "<f4").tobytes()


def _constants(op: Op, tensors: Sequence[Tensor]) -> bytes:
    """The bytes behind an op's `constants`, a multiple of 4."""
    if op.kind in WEIGHTED:
        weights, bias = (b"", b"") if op.trains == "all" else _floats(op, tensors)
        first = struct.pack("<f", op.epsilon) if op.kind == Kind.LAYERNORM else b""
        return first + weights + (bias if op.trains == "nothing" else b"")
    if op.kind == Kind.LEAKY_RELU:
        return struct.pack("<f", op.slope)
    if op.kind == Kind.SLICE:
        return struct.pack("<6i", *op.begin, *op.steps)
    try:
        return quantized.constants(op, tensors) if op.kind >= Kind.INT8_DENSE else b""
    except ValueError as error:
        raise ProgramError(f"'{op.name}' cannot be computed in int8: {error}") from error


def _initial(op: Op, tensors: Sequence[Tensor]) -> bytes:
    """What trains of an op, as it lies behind `params`."""
    if op.kind in WEIGHTED:
        weights, bias = _floats(op, tensors)
        return (weights if op.trains == "all" else b"") + bias
    assert op.weights is not None
    last = op.kind == Kind.TRAINED_INT8_DEPTHWISE
    data = b""
    if op.trains == "all":
        trained = op.weights[..., : op.trained] if last else op.weights[: op.trained]
        data = np.ascontiguousarray(trained, np.int8).tobytes()
    channels = tensors[op.output].shape[2]
    biases = np.zeros(channels, np.int32) if op.bias is None else op.bias
    return data + bytes(-len(data) % 4) + np.ascontiguousarray(biases[: op.trained], "<i4").tobytes()


def _record(op: Op, tensors: Sequence[Tensor], g: Gradients, layer: int, params: int, constants: int) -> bytes:
    flags = {"nothing": 0, "bias": _BIAS, "all": _WEIGHTS | _BIAS}[op.trains]
    flags |= _ADDS * g.adds | _ADDS2 * g.adds2 | _FILLS * op.fills | _MASKS * (g.mask is not None)
    channels = tensors[op.output].shape[2]
    trained = 0 if op.trains == "nothing" else channels if op.trained is None else op.trained
    inputs = [*op.inputs, NONE][:2]
    around = [NONE if index is None else index for index in (g.dout, g.din, g.din2)]
    pads, option = (op.offsets[:2], op.offsets[2]) if op.kind == Kind.PLACE else (op.pads, g.mask or 0)
    try:
        return _OP.pack(
            op.kind, flags, layer, 0, *inputs, op.output, *around, *op.kernel, *pads, *op.strides, *op.dilation,
            option, trained, params, constants,
        )  # fmt: skip
    except struct.error as error:
        raise ProgramError(f"'{op.name}' has a kernel, stride, dilation or padding that is too large") from error


@dataclass(frozen=True)
class Program:
    """A program's bytes, and what they say. Equal if the bytes are."""

    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Program:
        """A program from its bytes. Raises ProgramError if they are none; the engine checks every op as it loads."""
        header = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else None
        if header is None or header[0] != b"MOTE":
            raise ProgramError("these bytes are no program for the engine; build one with edge.program.build")
        if header[1:3] != (VERSION, _HEADER.size):
            raise ProgramError(f"this program has the format version {header[1]}; this engine reads version {VERSION}")
        if header[3] != len(data) or header[4] != zlib.crc32(data[_UNSUMMED:]):
            raise ProgramError("this program is damaged (its length or checksum is wrong); transfer it again")
        program = cls(bytes(data))
        if not program._consistent():
            raise ProgramError("this program contradicts itself; build it anew with edge.program.build")
        return program

    def _consistent(self) -> bool:
        h = self._header
        n_tensors, n_ops, loss, flags, params, activations, constants = h[5], h[6], h[7], h[8], h[15], h[16], h[17]
        size = _HEADER.size + n_tensors * _TENSOR.size + n_ops * _OP.size + constants
        if size != len(self.data) or not n_tensors or not n_ops or loss > len(LOSSES) or flags > 7:
            return False
        if max(params, activations, constants) > MAX_BYTES or (flags & _CARRIES and params > constants):
            return False
        if max(h[9:12]) >= n_tensors:
            return False
        for type_, _, *shape, _, _ in self._places:
            if type_ not in (1, 2) or not all(shape) or math.prod(shape) > MAX_BYTES // 4:
                return False
        kinds = set(Kind)
        for r in self._records:
            if r[0] not in kinds or r[4] >= n_tensors or r[6] >= n_tensors:
                return False
            if r[1] & _MASKS and (r[0] not in MASKED or r[18] >= n_tensors):
                return False
        ops, tensors = self._ops, self._tensors
        if any(op.kind in WEIGHTED + TRAINED_INT8 and tensors[op.output].shape[2] < (op.trained or 0) for op in ops):
            return False
        weighted = [op for op in ops if weight_counts(op, tensors)[0]]
        if any(op.trains != "nothing" and op not in weighted for op in ops):
            return False
        return (
            sum(params_bytes(op, tensors) for op in ops) == params
            and 1 <= h[13] <= tensors[h[10]].size
            and all(op.kind not in TRAINED_INT8 or op.trains == "nothing" or flags & _INT8 for op in ops)
        )

    @cached_property
    def _header(self) -> tuple[Any, ...]:
        return _HEADER.unpack_from(self.data)

    @cached_property
    def _places(self) -> list[tuple[Any, ...]]:
        return [_TENSOR.unpack_from(self.data, _HEADER.size + i * _TENSOR.size) for i in range(self._header[5])]

    @cached_property
    def _records(self) -> list[tuple[int, ...]]:
        start = _HEADER.size + self._header[5] * _TENSOR.size
        return [_OP.unpack_from(self.data, start + i * _OP.size) for i in range(self._header[6])]

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(Tensor((h, w, c), _TYPES[kind - 1], scale, zero) for kind, zero, h, w, c, _, scale in self._places)

    @cached_property
    def _ops(self) -> list[Op]:
        ops = []
        for i, r in enumerate(self._records):
            trains: Literal["nothing", "bias", "all"] = (
                "all" if r[1] & _WEIGHTS else "bias" if r[1] & _BIAS else "nothing"
            )
            inputs = (r[4],) if r[5] == NONE else (r[4], r[5])
            ops.append(
                Op(
                    Kind(r[0]), f"op_{i}", inputs, r[6], kernel=(r[10], r[11]), pads=(r[12], r[13]),
                    strides=(r[14], r[15]), dilation=(r[16], r[17]), trains=trains, trained=r[19] or None,
                )
            )  # fmt: skip
        return ops

    @cached_property
    def chain(self) -> tuple[tuple[Op, Shape3, Shape3], ...]:
        """The ops with the shapes of their input and output, where each reads what the one before it wrote, if under
        another shape; see Op for what these ops do not say. Raises ProgramError if the model is no such chain."""
        ops = tuple((op, self._tensors[op.inputs[0]], self._tensors[op.output]) for op in self._ops)
        follows = all(before[2].size == x.size for before, (_, x, _) in itertools.pairwise(ops))
        if not follows or any(len(op.inputs) > 1 for op, _, _ in ops):
            raise ProgramError("this model branches; here it must be layers one behind the other")
        return tuple((op, x.shape, y.shape) for op, x, y in ops)

    @cached_property
    def model_id(self) -> bytes:
        """The first 8 bytes of the SHA-256: how a fleet calls this model."""
        return hashlib.sha256(self.data).digest()[:8]

    @property
    def loss(self) -> Loss | None:
        """What the model is trained to make small; None if it only runs."""
        return LOSSES[self._header[7] - 1] if self._header[7] else None

    @property
    def input(self) -> Tensor:
        """The model's input: its shape as [h][w][c], its type, and an int8 one's scale and zero point."""
        return self._tensors[int(self._header[9])]

    @property
    def output(self) -> Tensor:
        """The same of its output."""
        return self._tensors[int(self._header[11])]

    @property
    def input_shape(self) -> Shape:
        """(features,) or (height, width, channels)."""
        return _short(self.input.shape)

    @property
    def output_shape(self) -> Shape:
        """The same of the output: class probabilities under a cross-entropy."""
        return _short(self.output.shape)

    @property
    def classes(self) -> int:
        """Outputs in use at first."""
        return int(self._header[13])

    @property
    def trains_int8(self) -> bool:
        """Whether what trains are int8 weights."""
        return bool(self._header[8] & _INT8)

    @cached_property
    def n_params(self) -> int:
        """Numbers that can train: the length of the vector that a fleet exchanges."""
        return sum(math.prod(shape) for _, shape in self.parameters)

    @property
    def params_bytes(self) -> int:
        """RAM of what trains, without its momentum."""
        return int(self._header[15])

    @property
    def momentum_bytes(self) -> int:
        """RAM of the optimiser's momentum."""
        return self.params_bytes if self._header[8] & _MOMENTUM else 0

    @property
    def activation_bytes(self) -> int:
        """RAM of the planned values and gradients."""
        return int(self._header[16])

    @property
    def arena_bytes(self) -> int:
        """RAM that the engine needs for it, in all: what trains, momentum, values and gradients."""
        return self.params_bytes + self.momentum_bytes + self.activation_bytes

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of its ops: what an image must hold to run it."""
        return frozenset(op.kind for op in self._ops)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The ops in order. Those with parameters are numbered together, the others by kind."""
        layers = []
        numbers: dict[str, int] = {}
        for op in self._ops:
            weights, biases = weight_counts(op, self._tensors)
            kind = op.kind.name.lower()
            group = "parameters" if weights else kind
            number = numbers[group] = numbers.get(group, -1) + 1
            x, y = self._tensors[op.inputs[0]].shape, self._tensors[op.output].shape
            layers.append(
                LayerInfo(
                    f"{kind}_{number}",
                    kind,
                    _short(x),
                    _short(y),
                    macs(op, self._tensors),
                    weights + biases,
                    sum(trained_counts(op, self._tensors)),
                )
            )
        return tuple(layers)

    @cached_property
    def all_parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of every weight and bias, frozen ones too, in the order of the layers."""
        return tuple((name, shape) for name, shape, _ in named_arrays(self._ops, self._tensors))

    @cached_property
    def parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of what can train, in the order of the vector."""
        names = {"all": ("weights", "bias"), "bias": ("bias",), "nothing": ()}
        found: list[tuple[str, Shape]] = []
        for layer, op in zip(self.layers, self._ops, strict=True):
            shapes = _trained_shapes(op, self._tensors)
            found += ((f"{layer.name}/{name}", s) for name, s in zip(names[op.trains], shapes, strict=True))
        return tuple(found)

    @property
    def carried(self) -> Vector | None:
        """The initial values that the program carries, or None if it is an architecture alone, or trains int8."""
        if not self._header[8] & _CARRIES or self.trains_int8:
            return None
        start = len(self.data) - self._header[17]
        return np.frombuffer(self.data, "<f4", self.n_params, start).astype(np.float32)

    def initial(self, seed: int) -> Vector:
        """Random parameters: weights uniform after Glorot and Bengio 2010, biases 0, a layer norm's gamma 1."""
        generator = np.random.default_rng(seed)
        vectors = []
        for name, shape in self.parameters:
            if name.startswith("layernorm") and name.endswith("/weights"):
                vectors.append(np.ones(shape[0], np.float32))
            elif len(shape) == 1:
                vectors.append(np.zeros(shape[0], np.float32))
            else:
                fan = _fans(name, shape)
                limit = math.sqrt(6.0 / fan)
                vectors.append(generator.uniform(-limit, limit, math.prod(shape)).astype(np.float32))
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)

    @cached_property
    def head(self) -> int:
        """The mask of the last layer that can train; bit i of a mask is the i-th layer that can."""
        return 1 << sum(layer.trainable for layer in self.layers) - 1

    def in_layers(self, mask: int) -> NDArray[np.bool_]:
        """[n_params]: which parameters belong to the layers of a mask."""
        trained = [layer.trained for layer in self.layers if layer.trainable]
        return np.repeat(np.array([mask >> i & 1 for i in range(len(trained))], np.bool_), trained)

    def split(self, vector: NDArray[Any]) -> dict[str, Vector]:
        """Views of a parameter vector [n_params] as arrays by name. Raises ProgramError on another length."""
        vector = np.asarray(vector, np.float32)
        if vector.shape != (self.n_params,):
            raise ProgramError(f"the parameters have the shape {vector.shape}; this model needs ({self.n_params},)")
        arrays: dict[str, Vector] = {}
        first = 0
        for name, shape in self.parameters:
            count = math.prod(shape)
            arrays[name] = vector[first : first + count].reshape(shape)
            first += count
        return arrays

    def join(self, arrays: Mapping[str, NDArray[Any]]) -> Vector:
        """The parameter vector [n_params] of arrays by name. Raises ProgramError if one is missing or misshapen."""
        vectors = []
        for name, shape in self.parameters:
            if name not in arrays or np.shape(arrays[name]) != shape:
                got = np.shape(arrays[name]) if name in arrays else "nothing"
                raise ProgramError(f"'{name}' needs the shape {shape}, but got {got}")
            vectors.append(np.asarray(arrays[name], np.float32).ravel())
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)


def _fans(name: str, shape: Shape) -> int:
    """Inputs and outputs that a weight array joins."""
    if "depthwise" in name:
        return 2 * math.prod(shape[:-1])
    return (shape[0] + shape[-1]) * math.prod(shape[1:-1])
