"""Models as tensors with a client axis: every layer computes many clients, each with parameters of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from keras import ops  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import Kind, Op, Shape3
from tinyfleet.edge.model.program import Program
from tinyfleet.server.simulator.keras_backend import Tensor

Vector = NDArray[np.float32]

EPSILON = 1e-3  # of batch normalisation, as in Keras


@dataclass(frozen=True, eq=False)
class Network:
    """A model as tensors with a client axis.

    Parameters
    ----------
    input_shape
        Height, width and channels of one sample.
    outputs
        Length of one output.
    loss
        The loss that it trains with.
    shapes
        Of the parameter arrays, in the order of the parameter vector.
    layers
        For each array, the bit of a layer mask that it belongs to.
    apply
        Computes outputs [clients, samples, outputs], logits under a cross-entropy, from arrays [clients, *shape] and
        inputs [clients, samples, h, w, c].
    macs
        Multiply-adds of one inference.
    """

    input_shape: Shape3
    outputs: int
    loss: Literal["softmax_cross_entropy", "mse"]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    apply: Callable[[list[Tensor], Tensor], Tensor]
    macs: int

    @cached_property
    def n_params(self) -> int:
        """Parameters of one client."""
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """Parameter vectors [clients, n_params] as arrays [clients, *shape]."""
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes))
        parts = zip([0, *ends], ends, self.shapes, strict=False)
        return [ops.reshape(vectors[:, first:end], (vectors.shape[0], *shape)) for first, end, shape in parts]

    def in_layers(self, mask: int) -> NDArray[np.bool_]:
        """Which parameters [n_params] belong to the layers of a mask."""
        return np.repeat(self.arrays_in(mask), [math.prod(shape) for shape in self.shapes])

    def arrays_in(self, mask: int) -> NDArray[np.bool_]:
        """Which arrays belong to the layers of a mask."""
        return np.array([bool(mask >> layer & 1) for layer in self.layers])


Layer = Callable[[list[Tensor], Tensor], Tensor]
"""([arrays of the layer], x) -> y, both [clients, samples, h, w, c]."""


def _windows(op: Op, x: Tensor, y_shape: Shape3, fill: float = 0.0) -> list[Tensor]:
    """The input under each element of the kernel: kernel h * kernel w tensors [clients, samples, rows, columns, c]."""
    (kh, kw), (sh, sw), (dh, dw), (top, left) = op.kernel, op.strides, op.dilation, op.pads
    rows, columns, _ = y_shape
    reach = ((rows - 1) * sh + 1, (columns - 1) * sw + 1)
    below = max(reach[0] + (kh - 1) * dh - x.shape[2] - top, 0)
    right = max(reach[1] + (kw - 1) * dw - x.shape[3] - left, 0)
    if top or left or below or right:
        x = ops.pad(x, ((0, 0), (0, 0), (top, below), (left, right), (0, 0)), constant_values=fill)
    return [
        x[:, :, i * dh : i * dh + reach[0] : sh, j * dw : j * dw + reach[1] : sw]
        for i, j in itertools.product(range(kh), range(kw))
    ]


def dense(weights: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x [clients, n, inputs] by weights [clients, units, inputs]."""
    if weights.shape[2] == 1:  # outer products and sums fuse with the operations around them, matrix products do not
        return x * weights[:, None, :, 0] + bias[:, None]
    if weights.shape[1] == 1:
        return ops.sum(x * weights, axis=2, keepdims=True) + bias[:, None]
    return ops.matmul(x, ops.transpose(weights, (0, 2, 1))) + bias[:, None]


def conv2d(op: Op, y_shape: Shape3, arrays: list[Tensor], x: Tensor) -> Tensor:
    """As a matrix product: every client has filters of its own, for which grouped convolutions are slow."""
    clients, samples = x.shape[:2]
    patches = ops.concatenate(_windows(op, x, y_shape), axis=-1)
    weights = ops.reshape(arrays[0], (clients, y_shape[2], -1))
    return ops.reshape(
        dense(weights, arrays[1], ops.reshape(patches, (clients, -1, patches.shape[-1]))),
        (clients, samples, *y_shape),
    )


def _depthwise(op: Op, y_shape: Shape3, arrays: list[Tensor], x: Tensor) -> Tensor:
    weights = ops.reshape(arrays[0], (x.shape[0], -1, 1, 1, 1, y_shape[2]))
    windows = _windows(op, ops.repeat(x, y_shape[2] // x.shape[-1], axis=-1), y_shape)
    return sum(window * weights[:, i] for i, window in enumerate(windows)) + arrays[1][:, None, None, None]


def _max_pool(op: Op, y_shape: Shape3, x: Tensor) -> Tensor:
    """Of equal inputs the first gets the gradient, as in the engine."""
    first, *others = _windows(op, x, y_shape, -math.inf)
    for other in others:
        first = ops.where(other > first, other, first)
    return first


def _average_pool(op: Op, y_shape: Shape3, x: Tensor) -> Tensor:
    inside = ops.ones((1, 1, *x.shape[2:4], 1), x.dtype)
    return sum(_windows(op, x, y_shape)) / sum(_windows(op, inside, y_shape))


def _layer(op: Op, x_shape: Shape3, y_shape: Shape3) -> Layer:
    def flat(arrays: list[Tensor], x: Tensor) -> Tensor:
        return dense(arrays[0], arrays[1], ops.reshape(x, (*x.shape[:2], -1)))[:, :, None, None]

    match op.kind:
        case Kind.DENSE:
            return flat
        case Kind.CONV2D:
            return lambda arrays, x: conv2d(op, y_shape, arrays, x)
        case Kind.DEPTHWISE:
            return lambda arrays, x: _depthwise(op, y_shape, arrays, x)
        case Kind.MAXPOOL:
            return lambda _, x: _max_pool(op, y_shape, x)
        case Kind.AVGPOOL:
            return lambda _, x: _average_pool(op, y_shape, x)
        case Kind.RELU:
            return lambda _, x: ops.relu(x)
        case Kind.RELU6:
            return lambda _, x: ops.relu6(x)
        case Kind.TANH:
            return lambda _, x: ops.tanh(x)
        case Kind.SIGMOID:
            return lambda _, x: ops.sigmoid(x)
    raise UserError(
        f"the simulator has no {op.kind.name.lower()} layer; it has dense, conv2d, depthwise, pools, relu, relu6, tanh "
        "and sigmoid. Train this model on devices, or with exact=True"
    )


@lru_cache
def network(program: Program) -> Network:
    """A program's model as a Network.

    Raises
    ------
    UserError
        If it has layers, a loss or frozen parameters that the simulator does not support.
    """
    if program.loss not in ("softmax_cross_entropy", "mse"):
        raise UserError(f"the simulator has softmax_cross_entropy and mse; this model's loss is {program.loss}")
    steps: list[tuple[Layer, Shape3, bool]] = []
    for info, (op, x_shape, y_shape) in zip(program.layers, program.chain, strict=True):
        if info.params and op.trains != "all":
            raise UserError(f"'{info.name}' is frozen; meta-train a model that trains as a whole, and mask its layers")
        steps.append((_layer(op, x_shape, y_shape), x_shape, info.params > 0))

    def apply(arrays: list[Tensor], x: Tensor) -> Tensor:
        at = 0
        for layer, x_shape, has in steps:
            x = layer(arrays[at : at + 2], ops.reshape(x, (*x.shape[:2], *x_shape)))
            at += 2 * has
        return ops.reshape(x, (*x.shape[:2], -1))

    shapes = tuple(shape for _, shape in program.parameters)
    layers = tuple(i // 2 for i in range(len(shapes)))
    macs = sum(info.macs for info in program.layers)
    return Network(program.input.shape, program.output.size, program.loss, shapes, layers, apply, macs)


def omniglot_network(ways: int = 5) -> Network:
    """The network that Reptile was published with on Omniglot (Nichol et al. 2018): 113,221 parameters for five ways.

    Four blocks of 64 filters 3x3 with stride 2, batch normalisation by the batch's own statistics, and ReLU; then a
    dense layer. The score is therefore transductive: it depends on which query samples are evaluated together.
    """
    sides, channels = (28, 14, 7, 4, 2), (1, 64, 64, 64, 64)
    convs: list[tuple[Op, Shape3]] = []
    shapes: list[tuple[int, ...]] = []
    for i in range(4):
        pad = max((sides[i + 1] - 1) * 2 + 3 - sides[i], 0) // 2
        op = Op(Kind.CONV2D, f"conv_{i}", (i,), i + 1, (3, 3), (2, 2), (1, 1), (pad, pad))
        convs.append((op, (sides[i + 1], sides[i + 1], 64)))
        shapes += [(64, 3, 3, channels[i]), (64,), (64,), (64,)]
    shapes += [(ways, 2 * 2 * 64), (ways,)]

    def apply(arrays: list[Tensor], x: Tensor) -> Tensor:
        for i, (op, y_shape) in enumerate(convs):
            kernel, bias, gamma, beta = arrays[4 * i : 4 * i + 4]
            x = conv2d(op, y_shape, [kernel, bias], x)
            mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
            scale = gamma[:, None, None, None] * ops.rsqrt(variance + EPSILON)
            x = ops.relu((x - mean) * scale + beta[:, None, None, None])
        return dense(arrays[-2], arrays[-1], ops.reshape(x, (*x.shape[:2], -1)))

    layers = (*(i // 4 for i in range(16)), 4, 4)
    macs = sum(math.prod(y) * 9 * c for (_, y), c in zip(convs, channels, strict=False)) + 256 * ways
    return Network((28, 28, 1), ways, "softmax_cross_entropy", tuple(shapes), layers, apply, macs)


def omniglot_initialization(model: Network, seed: int) -> Vector:
    """Initial parameters of `omniglot_network`: weights uniform after Glorot and Bengio 2010, gamma 1, the rest 0."""
    random, arrays = np.random.default_rng(seed), list[NDArray[Any]]()
    for i, shape in enumerate(model.shapes):
        if len(shape) == 1:
            arrays.append(np.full(shape, float(i % 4 == 2 and i < 16)))
        else:
            limit = math.sqrt(6 / ((shape[0] + shape[-1]) * math.prod(shape[1:-1])))
            arrays.append(random.uniform(-limit, limit, shape))
    initialization: Vector = np.concatenate([array.ravel() for array in arrays]).astype(np.float32)
    return initialization
