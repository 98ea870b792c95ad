"""Small models that together have every kind of operation: to compare targets to the bit, and to seed a fuzzer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Loss, Op, Shape3, Tensor, Trains
from tinyfleet.edge.model.layers import (
    AvgPool2D,
    Conv2D,
    Dense,
    DepthwiseConv2D,
    Flatten,
    GlobalAvgPool2D,
    Layer,
    LayerNorm,
    LeakyReLU,
    MaxPool2D,
    ReLU,
    ReLU6,
    Sigmoid,
    Tanh,
    build,
)
from tinyfleet.edge.model.program import Program


def initialised(layers: list[Layer], shape: tuple[int, ...], loss: Loss, *, momentum: bool = False) -> Program:
    """Carries random weights, a few of them denormal: what takes those for 0 computes other bits."""
    blank = build(layers, shape, loss, momentum=momentum)
    vector = blank.initial(3)
    vector[::17] = np.float32(1e-39)
    return build(layers, shape, loss, weights=blank.split(vector), momentum=momentum)


def mlp() -> Program:
    layers: list[Layer] = [Dense(12), ReLU(), Dense(8), Tanh(), LayerNorm(), Dense(5)]
    return initialised(layers, (8,), "softmax_cross_entropy", momentum=True)


def cnn() -> Program:
    layers: list[Layer] = [
        Conv2D(4, 3, padding="same"),
        Tanh(),
        MaxPool2D(2),
        Conv2D(4, 2),
        LeakyReLU(0.1),
        AvgPool2D(3),
        Flatten(),
        Dense(16),
        ReLU(),
        Dense(5),
    ]
    return initialised(layers, (8, 8, 1), "softmax_cross_entropy")


def separable(loss: Loss = "softmax_cross_entropy") -> Program:
    """A depthwise-separable network in float32, of which all trains."""
    layers: list[Layer] = [
        Conv2D(6, 3, 2, "same"),
        ReLU6(),
        DepthwiseConv2D(3, padding="same"),
        ReLU6(),
        Conv2D(8, 1),
        Sigmoid(),
        GlobalAvgPool2D(),
        Flatten(),
        Dense(4),
    ]
    return initialised(layers, (8, 8, 1), loss)


class _Int8:
    """An int8 graph as it grows."""

    def __init__(self, shape: Shape3) -> None:
        self.tensors = [Tensor(shape, "int8", 1 / 64, 0)]
        self.ops: list[Op] = []
        self.random = np.random.default_rng(5)

    def add(
        self,
        kind: Kind,
        shape: Shape3,
        *,
        scale: float = 0.05,
        zero: int = -128,
        inputs: tuple[int, ...] = (),
        **more: object,
    ) -> int:
        """An op that writes an int8 tensor; returns that tensor."""
        self.tensors.append(Tensor(shape, "int8", scale, zero))
        at = len(self.tensors) - 1
        self.ops.append(Op(kind, f"op{len(self.ops)}", inputs or (at - 1,), at, **more))  # type: ignore[arg-type]
        return at

    def weighted(
        self, kind: Kind, shape: Shape3, weights: tuple[int, ...], *, trains: Trains = "nothing", **more: object
    ) -> int:
        """One with random weights and a scale for every channel."""
        channels = shape[2]
        trained: dict[str, object] = {"trains": trains, "trained": channels} if trains != "nothing" else {}
        return self.add(
            kind,
            shape,
            weights=self.random.integers(-127, 128, weights).astype(np.int8),
            bias=self.random.integers(-200, 200, channels).astype(np.int32),
            weight_scales=self.random.uniform(0.004, 0.008, channels),
            **trained,
            **more,
        )

    def graph(self, **more: object) -> Graph:
        return Graph(tuple(self.tensors), tuple(self.ops), len(self.tensors) - 1, **more)  # type: ignore[arg-type]


SAME: dict[str, object] = {"kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "pads": (1, 1)}
ONE: dict[str, object] = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}


def _backbone(trains: Trains = "nothing") -> _Int8:
    """Convolution, depthwise convolution, convolution of single pixels, mean: [8, 8, 1] to [1, 1, 8]."""
    kinds = (Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE)
    if trains != "nothing":
        kinds = (Kind.TRAINED_INT8_CONV2D, Kind.TRAINED_INT8_DEPTHWISE)
    g = _Int8((8, 8, 1))
    g.weighted(kinds[0], (4, 4, 6), (6, 3, 3, 1), trains=trains, **{**SAME, "strides": (2, 2), "pads": (0, 0)})
    g.weighted(kinds[1], (4, 4, 6), (3, 3, 6), trains=trains, **SAME)
    g.weighted(kinds[0], (4, 4, 8), (8, 1, 1, 6), trains=trains, **ONE)
    g.add(Kind.INT8_AVGPOOL, (1, 1, 8), kernel=(4, 4), strides=(4, 4), dilation=(1, 1))
    return g


def _with_head(g: _Int8, units: int, classes: int | None = None, weights: NDArray[np.float32] | None = None) -> Program:
    size = g.tensors[-1].size
    g.tensors += [Tensor((1, 1, size)), Tensor((1, 1, units))]
    at = len(g.tensors) - 1
    w = np.zeros((units, size), np.float32) if weights is None else weights
    g.ops.append(Op(Kind.DEQUANTIZE, "head", (at - 2,), at - 1))
    g.ops.append(Op(Kind.DENSE, "head", (at - 1,), at, weights=w, bias=np.zeros(units, np.float32), trains="all"))
    return assemble(g.graph(loss="softmax_cross_entropy", classes=classes))


def int8_with_head() -> Program:
    """An int8 depthwise-separable backbone under a float32 head that trains."""
    return _with_head(_backbone(), 4)


def quantised_training() -> Program:
    """The same, with int8 weights that train throughout; a softmax over the dequantised outputs."""
    g = _backbone("all")
    g.weighted(Kind.TRAINED_INT8_DENSE, (1, 1, 4), (4, 8), trains="all", zero=0)
    g.tensors.append(Tensor((1, 1, 4)))
    g.ops.append(Op(Kind.DEQUANTIZE, "logits", (len(g.tensors) - 2,), len(g.tensors) - 1))
    return assemble(g.graph(loss="softmax_cross_entropy"))


def growing() -> Program:
    """A head that begins with two of its four classes."""
    g = _Int8((1, 1, 8))
    g.add(Kind.INT8_TABLE, (1, 1, 8), table=bytes(range(256)))
    return _with_head(g, 4, classes=2)


def int8_rest() -> Program:
    """The int8 operations that the backbone has not, to the end of a model that only runs."""
    g = _Int8((4, 4, 4))
    pooled = g.add(Kind.INT8_MAXPOOL, (2, 2, 4), scale=1 / 64, zero=0, kernel=(2, 2), strides=(2, 2), dilation=(1, 1))
    table = g.add(Kind.INT8_TABLE, (2, 2, 4), scale=1 / 256, table=bytes(range(256)))
    total = g.add(Kind.INT8_ADD, (2, 2, 4), inputs=(pooled, table), scale=1 / 32, zero=3)
    g.add(Kind.INT8_MUL, (2, 2, 4), inputs=(total, pooled), scale=1 / 32, zero=1)
    g.add(Kind.INT8_MEAN, (1, 1, 4), scale=1 / 64, zero=0)
    g.weighted(Kind.INT8_DENSE, (1, 1, 3), (3, 4), scale=0.1, zero=0)
    g.add(Kind.INT8_SOFTMAX, (1, 1, 3), scale=1 / 256, zero=-128)
    return assemble(g.graph())


def branches() -> Program:
    """Two branches: sums, places, slices, softmax; before them a frozen way through int8 and back."""
    w = np.random.default_rng(9).normal(size=300).astype(np.float32) / 2
    tensors = [
        Tensor((4, 4, 2)),  # 0: the input
        Tensor((4, 4, 2), "int8", 1 / 32, 0),
        Tensor((4, 4, 2)),  # 2: what is left of it
        Tensor((2, 2, 2)),  # 3: every other element
        Tensor((2, 2, 3)),  # 4, 5: two convolutions of it
        Tensor((2, 2, 3)),
        Tensor((2, 2, 3)),  # 6: their sum
        Tensor((4, 4, 3)),  # 7: padded
        Tensor((4, 4, 6)),  # 8: that twice, side by side
        Tensor((4, 4, 6)),
        Tensor((1, 1, 96), view_of=9),
        Tensor((1, 1, 2)),
    ]
    conv = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1), "trains": "all"}
    ops = [
        Op(Kind.QUANTIZE, "in", (0,), 1),
        Op(Kind.DEQUANTIZE, "out", (1,), 2),
        Op(Kind.SLICE, "half", (2,), 3, begin=(1, 0, 0), steps=(2, 2, 1)),
        Op(Kind.CONV2D, "a", (3,), 4, weights=w[:6].reshape(3, 1, 1, 2), bias=w[:3], **conv),  # type: ignore[arg-type]
        Op(Kind.CONV2D, "b", (3,), 5, weights=w[6:12].reshape(3, 1, 1, 2), bias=w[:3], **conv),  # type: ignore[arg-type]
        Op(Kind.ADD, "sum", (4, 5), 6),
        Op(Kind.PLACE, "pad", (6,), 7, offsets=(1, 1, 0), fills=True),
        Op(Kind.PLACE, "left", (7,), 8),
        Op(Kind.PLACE, "right", (7,), 8, offsets=(0, 0, 3)),
        Op(Kind.SOFTMAX, "soft", (8,), 9),
        Op(Kind.DENSE, "head", (10,), 11, weights=w[12:204].reshape(2, 96), bias=w[:2], trains="all"),
    ]
    return assemble(Graph(tuple(tensors), tuple(ops), 11, "huber"))


def biases() -> Program:
    """A net of which only biases train."""
    w = np.random.default_rng(4).normal(size=100).astype(np.float32) / 3
    tensors = (Tensor((1, 1, 6)), Tensor((1, 1, 5)), Tensor((1, 1, 5)), Tensor((1, 1, 3)))
    ops = (
        Op(Kind.DENSE, "a", (0,), 1, weights=w[:30].reshape(5, 6), bias=w[:5], trains="bias"),
        Op(Kind.RELU, "r", (1,), 2),
        Op(Kind.DENSE, "b", (2,), 3, weights=w[30:45].reshape(3, 5), bias=w[:3], trains="bias"),
    )
    return assemble(Graph(tensors, ops, 3, "binary_cross_entropy"))


def int8_operations(seed: int) -> Iterator[tuple[str, Program]]:
    """Programs of one int8 operation each, of shapes, windows and scales that reach every way to compute it: channels
    that are multiples of 4 and 16 and such that are none, windows that overlap the border or all of the input, outputs
    too small for a scratch, shifts and biases at their limits."""
    random = np.random.default_rng(seed)

    def draw(*choices: int) -> int:
        return int(random.choice(choices))

    for _ in range(160):
        kind = (Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE, Kind.INT8_DENSE, Kind.INT8_AVGPOOL, Kind.INT8_MEAN)[
            draw(0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 4)
        ]
        size, kernel, strides, dilation, pads, shape = [], [], [], [], [], []
        one_tap, dilates = draw(0, 0, 1), draw(0, 0, 0, 1) and kind != Kind.INT8_AVGPOOL
        for _ in range(2):
            n, s, d = draw(*range(1, 14)), draw(1, 1, 2, 3), draw(2, 3) if dilates else 1
            k = 1 if one_tap else draw(*range(1, 5))
            pad = draw(*range((k - 1) * d + 1))
            n = max(n, (k - 1) * d + 1 - pad)
            size.append(n)
            kernel.append(k)
            strides.append(s)
            dilation.append(d)
            pads.append(pad)
            # Padding at the end, too, but no window that lies outside.
            shape.append(min((n + 2 * pad - (k - 1) * d - 1) // s + 1, (n - 1 + pad) // s + 1))
        inputs = draw(1, 1, 2, 3, 4, 4, 5, 7, 8, 12, 16, 16, 17, 24, 31, 64, 68)
        outputs = inputs if kind not in (Kind.INT8_CONV2D, Kind.INT8_DENSE) else draw(1, 2, 3, 4, 6, 8, 13, 16, 32, 64)
        window: dict[str, Any] = {
            "kernel": tuple(kernel),
            "strides": tuple(strides),
            "dilation": tuple(dilation),
            "pads": tuple(pads),
        }
        taps, weights = kernel[0] * kernel[1] * inputs, (outputs, *kernel, inputs)
        if kind == Kind.INT8_DEPTHWISE:
            outputs = inputs * draw(1, 1, 1, 2)
            taps, weights = kernel[0] * kernel[1], (*kernel, outputs)
        elif kind == Kind.INT8_DENSE:
            window, shape, taps = {}, [1, 1], math.prod(size) * inputs
            weights = (outputs, taps)
        elif kind == Kind.INT8_MEAN:
            window, shape = {}, [1, 1]
        x = Tensor((size[0], size[1], inputs), "int8", float(np.float32(random.uniform(0.01, 0.1))), draw(-128, 3, 127))
        low, high = (-128, 127) if draw(0, 1) else (-100, draw(50, 127))
        more: dict[str, Any] = {"low": low, "high": high, **window}
        scale = x.scale
        if kind in (Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE, Kind.INT8_DENSE):
            scales = random.uniform(0.004, 0.008, outputs)
            bias = random.integers(-20000, 20000, outputs)
            scale = float(np.float32(73 * 73 * math.sqrt(taps) * x.scale * 0.006 / 90))
            if draw(0, 0, 1):  # channels whose outputs hardly change, or hardly ever lie inside
                odd = random.random(outputs) < 0.3
                scales = np.where(odd, scales * 2.0 ** random.integers(-22, 6, outputs), scales)
                bias = np.where(odd, random.choice([-(2**30), 2**30, 2**20, 0], outputs), bias)
            more |= {
                "weights": random.integers(-128, 128, weights).astype(np.int8),
                "bias": bias.astype(np.int32),
                "weight_scales": scales,
            }
        y = Tensor((shape[0], shape[1], outputs), "int8", scale, draw(-128, -5, 127))
        op = Op(kind, "op", (0,), 1, **more)
        yield f"{kind.name} {x.shape} {y.shape} {window}", assemble(Graph((x, y), (op,), 1))


def int8_weights() -> Program:
    """Takes six floats; its int8 weights train."""
    tensors = (Tensor((1, 1, 6)), Tensor((1, 1, 6), "int8", 0.1), Tensor((1, 1, 3), "int8", 0.1), Tensor((1, 1, 3)))
    weights = np.random.default_rng(6).integers(-127, 128, (3, 6)).astype(np.int8)
    ops = (
        Op(Kind.QUANTIZE, "in", (0,), 1),
        Op(
            Kind.TRAINED_INT8_DENSE,
            "dense",
            (1,),
            2,
            weights=weights,
            bias=np.zeros(3, np.int32),
            weight_scales=np.full(3, 0.01),
            trains="all",
            trained=3,
        ),
        Op(Kind.DEQUANTIZE, "out", (2,), 3),
    )
    return assemble(Graph(tensors, ops, 3, "softmax_cross_entropy"))


def masked() -> Program:
    """All kinds of ReLU, none of which is read again but for where it passes the gradient: each keeps a mask."""
    w = np.random.default_rng(6).normal(size=300).astype(np.float32) / 2
    tensors, ops = [Tensor((4, 4, 2))], list[Op]()
    convolution = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1), "trains": "bias"}

    def add(kind: Kind, inputs: tuple[int, ...], shape: Shape3, **more: object) -> int:
        tensors.append(Tensor(shape))
        ops.append(Op(kind, f"op{len(ops)}", inputs, len(tensors) - 1, **more))  # type: ignore[arg-type]
        return len(tensors) - 1

    x = 0
    for kind, channels in ((Kind.RELU, 5), (Kind.RELU6, 5), (Kind.LEAKY_RELU, 5)):
        weights = 3 * w[: channels * tensors[x].shape[2]].reshape(channels, 1, 1, -1)
        y = add(Kind.CONV2D, (x,), (4, 4, channels), weights=weights, bias=w[:channels], **convolution)
        x = add(kind, (y,), (4, 4, channels), slope=0.25 * (kind == Kind.LEAKY_RELU))
    x = add(Kind.AVGPOOL, (x,), (1, 1, 5), kernel=(4, 4), strides=(4, 4), dilation=(1, 1))
    x = add(Kind.DENSE, (x,), (1, 1, 3), weights=w[:15].reshape(3, 5), bias=w[:3], trains="all")
    return assemble(Graph(tuple(tensors), tuple(ops), x, "softmax_cross_entropy"))


#: Each makes its program; together they have every kind and every loss.
MODELS: dict[str, Callable[[], Program]] = {
    "mlp": mlp,
    "cnn": cnn,
    "separable": separable,
    "regression": lambda: separable("mse"),
    "int8_with_head": int8_with_head,
    "quantised_training": quantised_training,
    "growing": growing,
    "int8_rest": int8_rest,
    "branches": branches,
    "biases": biases,
    "masked": masked,
}
