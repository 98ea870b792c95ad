"""Models as lists of layers: what a program is built of without Keras or a .tflite file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.arrays import check_shape, named_arrays
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import LOSSES, Graph, Kind, Loss, Op, Shape, Shape3, Tensor
from tinyfleet.edge.model.memory_plan import WEIGHTED
from tinyfleet.edge.model.program import Program

Padding = Literal["valid", "same"]


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


def _full(shape: Shape) -> Shape3:
    if len(shape) == 1:
        return 1, 1, shape[0]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ProgramError(f"the input shape is {shape}; it must be (features,) or (height, width, channels)")


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
    """Make the graph of a model whose layers follow each other.

    ReLU before max pooling becomes max pooling before ReLU: the same numbers, with less memory and work.

    Parameters
    ----------
    layers
        From the input to the output, without the loss's own softmax or sigmoid.
    input_shape
        (features,) or (height, width, channels).
    loss
        One of `edge.model.graph.LOSSES`; None for a model that only runs.
    trainable
        Which layers may train, counting the layers with parameters from 0. None: all, or none without a loss.
    weights
        Arrays by the names of `Program.all_parameters`. A frozen layer needs its own. Trainable layers have either all
        theirs, which the program then carries as initial values, or none.
    momentum
        Whether to reserve memory for the optimizer's momentum.
    classes
        Outputs in use at first, if fewer than the last layer has.

    Returns
    -------
    Graph
        What `build` assembles.

    Raises
    ------
    ProgramError
        If a layer does not fit its input, or the weights do not fit the layers.
    """
    if loss is not None and loss not in LOSSES:
        raise ProgramError(f"the loss is {loss!r}; the engine has {', '.join(LOSSES)}")
    shape = _full(tuple(int(v) for v in input_shape))
    check_shape(shape, "the input")
    tensors, ops = [Tensor(shape)], list[Op]()
    for i, layer in enumerate(_pool_before_relu(layers)):
        source = len(tensors) - 1
        if isinstance(layer, Flatten):
            tensors.append(Tensor((1, 1, tensors[source].size), view_of=source))
        else:
            op, shape = _op(layer, tensors[source].shape, i)
            ops.append(replace(op, inputs=(source,), output=len(tensors)))
            tensors.append(Tensor(shape))
        check_shape(tensors[-1].shape, f"the output of layer {i} ({type(layer).__name__})")
    if not ops:
        raise ProgramError("a model needs at least one layer that computes something")
    weighted = [i for i, op in enumerate(ops) if op.kind in WEIGHTED]
    if trainable is None:
        trainable = range(len(weighted)) if loss is not None else ()
    for number in trainable:
        if not 0 <= number < len(weighted):
            raise ProgramError(f"layer {number} cannot train: the model has {len(weighted)} layers with parameters")
        ops[weighted[number]] = replace(ops[weighted[number]], trains="all")
    graph = Graph(tuple(tensors), tuple(ops), len(tensors) - 1, loss, classes, momentum)
    return _with_weights(graph, weights or {})


def _pool_before_relu(layers: Sequence[Layer]) -> list[Layer]:
    layers = list(layers)
    for i in range(len(layers) - 1, 0, -1):
        for j in range(i, len(layers)):
            if not (isinstance(layers[j - 1], ReLU) and isinstance(layers[j], MaxPool2D)):
                break
            layers[j - 1], layers[j] = layers[j], layers[j - 1]
    return layers


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
    """Build the program of a model whose layers follow each other.

    Parameters
    ----------
    layers : sequence of Layer
        From the input to the output, without the loss's own softmax or sigmoid.
    input_shape : sequence of int
        (features,) or (height, width, channels).
    loss : str, optional
        One of `edge.model.graph.LOSSES`; None for a model that only runs.
    trainable, weights, momentum, classes
        As in `network`.

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If a layer does not fit its input, or the model is too large for the engine.

    Examples
    --------
    >>> program = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
    >>> program.input_shape, program.output_shape
    ((64,), (10,))
    """
    return assemble(
        network(layers, input_shape, loss, trainable=trainable, weights=weights, momentum=momentum, classes=classes)
    )


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
