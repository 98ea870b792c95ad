"""Random small models, and what they compute: a reference in float64 that shares no code with the engine."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import LOSSES, Graph, Kind, Loss, Op, Shape3, Tensor, Trains
from tinyfleet.edge.model.layers import AvgPool2D, Conv2D, Dense, Flatten, Layer, MaxPool2D, ReLU, Tanh
from tinyfleet.edge.model.layers import build as build_program
from tinyfleet.edge.model.memory_plan import WEIGHTED
from tinyfleet.edge.model.program import Program

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Net:
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    loss: Loss
    trainable: frozenset[int] | None = None

    def build(self, weights: dict[str, NDArray[np.float32]] | None = None) -> Program:
        return build_program(self.layers, self.input_shape, self.loss, trainable=self.trainable, weights=weights)

    def whole(self) -> Program:
        """The same model with every layer trainable."""
        return build_program(self.layers, self.input_shape, self.loss)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Models of all layers, kernels, strides and paddings, with any set of trainable layers."""
    side = st.integers(1, 3)
    pair = st.tuples(side, side)
    padding = st.sampled_from(["valid", "same"])
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)))
    flat = draw(st.booleans())
    input_shape: tuple[int, ...] = (shape[0] * shape[1],) if flat else shape
    layers: list[Layer] = []
    if not flat:
        for _ in range(draw(st.integers(0, 5))):
            window = [
                Conv2D(draw(side), draw(pair), draw(pair), draw(padding)),
                AvgPool2D(draw(pair), draw(st.none() | pair), draw(padding)),
                MaxPool2D(draw(pair), draw(st.none() | pair), draw(padding)),
                ReLU(),
                Tanh(),
            ]
            layers.append(draw(st.sampled_from(window)))
        layers.append(Flatten())
    for _ in range(draw(st.integers(0, 4))):
        layers.append(draw(st.sampled_from([Dense(draw(st.integers(1, 7))), ReLU(), Tanh(), Flatten()])))
    if draw(st.booleans()):
        layers.append(Dense(draw(st.integers(2, 4))))
    layers = _fitting(layers, input_shape)
    count = sum(isinstance(layer, Dense | Conv2D) for layer in layers)
    trainable = draw(st.none() | st.frozensets(st.integers(0, count - 1))) if count else frozenset[int]()
    return Net(tuple(layers), input_shape, draw(st.sampled_from(LOSSES)), trainable)


def _fitting(layers: Sequence[Layer], input_shape: tuple[int, ...]) -> list[Layer]:
    """The layers that the input reaches with every window inside; at least one that computes something."""
    kept: list[Layer] = []
    for layer in layers:
        try:
            build_program([*kept, layer, Flatten(), Dense(1)], input_shape, "mse")
        except ProgramError:
            continue
        kept.append(layer)
    return kept if any(not isinstance(layer, Flatten) for layer in kept) else [*kept, Tanh()]


def random_weights(program: Program, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights and biases of every layer, frozen ones too, of a size that keeps tanh and softmax out of saturation."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in program.all_parameters:
        fan_in = int(np.prod(shape[1:])) or 1
        weights[name] = (random.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)
    return weights


# The reference: forward in float64, gradients by central differences.


def forward(net: Net, weights: dict[str, Array], x: Array) -> Array:
    """The last layer's output (logits under softmax cross-entropy), flat."""
    arrays = iter(weights.values())
    value = x.reshape(net.input_shape)
    for layer in net.layers:
        if isinstance(layer, Dense):
            w, b = next(arrays), next(arrays)
            value = w @ value + b
        elif isinstance(layer, Conv2D):
            w, b = next(arrays), next(arrays)
            kernel: tuple[int, int] = w.shape[1:3]
            value = _windows(value, kernel, layer.strides, layer.padding, 0.0, lambda v, w=w, b=b: _filter(v, w, b))
        elif isinstance(layer, AvgPool2D):
            value = _windows(value, layer.size, layer.strides, layer.padding, np.nan, lambda v: np.nanmean(v, (0, 1)))
        elif isinstance(layer, MaxPool2D):
            value = _windows(value, layer.size, layer.strides, layer.padding, -np.inf, lambda v: v.max((0, 1)))
        elif isinstance(layer, Flatten):
            value = value.ravel()
        elif isinstance(layer, ReLU):
            value = np.maximum(value, 0)
        else:
            value = np.tanh(value)
    return value.ravel()


def _filter(window: Array, w: Array, b: Array) -> Array:
    return np.tensordot(w, window, 3) + b


def _windows(
    x: Array, size: object, strides: object, padding: str, fill: float, apply: Callable[[Array], Array]
) -> Array:
    kernel = size if isinstance(size, tuple) else (size, size)
    steps = kernel if strides is None else strides if isinstance(strides, tuple) else (strides, strides)
    pads, counts = [], []
    for n, k, s in zip(x.shape[:2], kernel, steps, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0) if padding == "same" else 0
        pads.append((total // 2, total - total // 2))
        counts.append((n + total - k) // s + 1)
    padded = np.pad(x, [*pads, (0, 0)], constant_values=fill)
    rows = [
        [
            apply(padded[i * steps[0] : i * steps[0] + kernel[0], j * steps[1] : j * steps[1] + kernel[1]])
            for j in range(counts[1])
        ]
        for i in range(counts[0])
    ]
    return np.array(rows)


def loss(net: Net, weights: dict[str, Array], x: Array, y: Array) -> float:
    out = forward(net, weights, x)
    if net.loss == "mse":
        return float(np.mean((out - y) ** 2))
    if net.loss == "huber":  # its delta is 1
        size = np.abs(out - y)
        return float(np.mean(np.where(size < 1, size**2 / 2, size - 0.5)))
    if net.loss == "binary_cross_entropy":
        return float(np.mean(np.logaddexp(0, out) - y * out))
    top = out.max()
    return float(np.log(np.exp(out - top).sum()) - (out[int(y[0])] - top))


def gradient(net: Net, weights: dict[str, Array], x: Array, y: Array, name: str) -> Array:
    """dL/d weights[name], by central differences."""
    step = 1e-6
    out = np.zeros(weights[name].size)
    for i in range(out.size):
        sides = []
        for sign in (1, -1):
            moved = weights[name].copy()
            moved.flat[i] += sign * step
            sides.append(loss(net, {**weights, name: moved}, x, y))
        out[i] = (sides[0] - sides[1]) / (2 * step)
    return out.reshape(weights[name].shape)


# Graphs: branches, sums, concatenation, and every float32 operation.

_CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17])
ACTIVATIONS = (Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU, Kind.TANH, Kind.SIGMOID, Kind.SOFTMAX)
_TRAINS = st.sampled_from(["nothing", "bias", "all", "all"])


class _Growing:
    """A graph as it is drawn, op by op."""

    def __init__(self, draw: st.DrawFn, shape: Shape3) -> None:
        self.draw = draw
        self.tensors = [Tensor(shape)]
        self.ops: list[Op] = []

    def shape(self, tensor: int) -> Shape3:
        return self.tensors[tensor].shape

    def op(self, kind: Kind, inputs: tuple[int, ...], shape: Shape3, **fields: Any) -> int:
        """Adds an op; returns its output."""
        trains: Trains = self.draw(_TRAINS) if kind in WEIGHTED else "nothing"
        self.tensors.append(Tensor(shape))
        output = len(self.tensors) - 1
        self.ops.append(Op(kind, f"op{len(self.ops)}", inputs, output, trains=trains, **fields))
        return output

    def flat(self, x: int) -> int:
        self.tensors.append(Tensor((1, 1, self.tensors[x].size), view_of=x))
        return len(self.tensors) - 1

    def windows(self, kind: Kind, x: int, *, keeps_shape: bool = False) -> int:
        """A convolution or pooling, of any kernel, stride, dilation and padding that fit."""
        draw, pools = self.draw, kind in (Kind.AVGPOOL, Kind.MAXPOOL)
        *sizes, channels = self.shape(x)
        kernel, strides, dilation, pads, out = [], [], [], [], []
        for size in sizes:
            k, d = draw(st.integers(1, 3)), 1 if pools else draw(st.integers(1, 2))
            reach = (k - 1) * d
            if pools and not keeps_shape and size > 3 and draw(st.booleans()):
                k, reach = size, 0  # global
            if keeps_shape:
                s, before, total = 1, draw(st.integers(0, reach)), reach
            else:
                s = draw(st.sampled_from([1, 2, 3, k]))
                before, after = draw(st.integers(0, reach)), draw(st.integers(0, reach))
                before, total = (before, before + after) if draw(st.booleans()) else (0, 0)
                if size + total <= reach:
                    before, total = reach, 2 * reach
            kernel.append(k)
            strides.append(s)
            dilation.append(d)
            pads.append(before)
            out.append((size + total - reach - 1) // s + 1 if k <= size + total else 1)
        if kind == Kind.CONV2D:
            channels = draw(_CHANNELS)
        elif kind == Kind.DEPTHWISE:
            channels *= draw(st.sampled_from([1, 1, 2, 3]))
        return self.op(
            kind, (x,), (out[0], out[1], channels), kernel=(kernel[0], kernel[1]), strides=(strides[0], strides[1]),
            dilation=(dilation[0], dilation[1]), pads=(pads[0], pads[1]),
        )  # fmt: skip

    def activation(self, x: int) -> int:
        kind = self.draw(st.sampled_from(ACTIVATIONS))
        return self.op(kind, (x,), self.shape(x), slope=0.25 if kind == Kind.LEAKY_RELU else 0.0)

    def norm(self, x: int) -> int:
        return self.op(Kind.LAYERNORM, (x,), self.shape(x), epsilon=0.01)

    def padding(self, x: int) -> int:
        h, w, c = self.shape(x)
        before, after = (self.draw(st.tuples(*[st.integers(0, 2)] * 3)) for _ in range(2))
        shape = (before[0] + h + after[0], before[1] + w + after[1], before[2] + c + after[2])
        return self.op(Kind.PLACE, (x,), shape, offsets=before, fills=True)

    def branches(self, x: int) -> int:
        """Two or three ways from x that meet in sums or side by side."""
        ends = []
        for _ in range(self.draw(st.integers(2, 3))):
            end = x
            for _ in range(self.draw(st.integers(0, 2))):
                ways: list[Callable[[int], int]] = [self.activation, self.norm]
                ways += [lambda y, k=kind: self.windows(k, y, keeps_shape=True) for kind in _WINDOWS]  # type: ignore[misc]
                end = self.draw(st.sampled_from(ways))(end)
            ends.append(end)
        if len({self.shape(end) for end in ends}) == 1 and self.draw(st.booleans()):
            total = ends[0]
            for end in ends[1:]:
                total = self.op(Kind.ADD, (total, end), self.shape(end))
            return total
        return self.concatenation(ends)

    def concatenation(self, parts: list[int]) -> int:
        axis = 2 if len({self.shape(part) for part in parts}) > 1 else self.draw(st.integers(0, 2))
        shape = list(self.shape(parts[0]))
        shape[axis] = sum(self.shape(part)[axis] for part in parts)
        self.tensors.append(Tensor((shape[0], shape[1], shape[2])))
        output, at = len(self.tensors) - 1, 0
        for part in parts:
            offsets = (at * (axis == 0), at * (axis == 1), at * (axis == 2))
            self.ops.append(Op(Kind.PLACE, "concatenation", (part,), output, offsets=offsets))
            at += self.shape(part)[axis]
        return output


_WINDOWS = (Kind.CONV2D, Kind.DEPTHWISE, Kind.AVGPOOL, Kind.MAXPOOL)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Models of all float32 operations that pass gradients, with branches; anything of them trains. Without weights."""
    growing = _Growing(draw, draw(st.tuples(st.integers(1, 7), st.integers(1, 7), _CHANNELS)))
    x = 0
    for _ in range(draw(st.integers(0, 5))):
        if growing.tensors[x].size > 600:
            break
        ways: list[Callable[[int], int]] = [growing.activation, growing.norm, growing.padding, growing.branches]
        ways += [lambda y, k=kind: growing.windows(k, y) for kind in (*_WINDOWS, Kind.CONV2D)]  # type: ignore[misc]
        x = draw(st.sampled_from(ways))(x)
    for _ in range(draw(st.integers(0, 2))):
        x = growing.op(Kind.DENSE, (growing.flat(x),), (1, 1, draw(st.integers(2, 17))))
        x = growing.activation(x) if draw(st.booleans()) else x
    x = growing.op(Kind.DENSE, (growing.flat(x),), (1, 1, draw(st.integers(2, 9))))
    return Graph(tuple(growing.tensors), tuple(growing.ops), x, draw(st.sampled_from(LOSSES)), huber_delta=0.5)


def with_weights(graph: Graph, random: np.random.Generator) -> Graph:
    """The same graph with weights that keep values of about 1 from op to op, and biases that are not 0."""
    ops = []
    for op in graph.ops:
        channels, inputs = graph.tensors[op.output].shape[2], graph.tensors[op.inputs[0]]
        shape: tuple[int, ...]
        if op.kind == Kind.DENSE:
            shape, fan = (channels, inputs.size), inputs.size
        elif op.kind == Kind.CONV2D:
            shape = (channels, *op.kernel, inputs.shape[2])
            fan = shape[1] * shape[2] * shape[3]
        elif op.kind == Kind.DEPTHWISE:
            shape, fan = (*op.kernel, channels), op.kernel[0] * op.kernel[1]
        elif op.kind == Kind.LAYERNORM:
            shape, fan = (channels,), 1
        else:
            ops.append(op)
            continue
        weights = (random.normal(size=shape) / np.sqrt(fan)).astype(np.float32)
        ops.append(replace(op, weights=weights, bias=random.normal(0, 0.5, channels).astype(np.float32)))
    return replace(graph, ops=tuple(ops))


# Programs as bytes.

HEADER = struct.Struct("<4sHHIIHHBBHHHHHfIII")
TENSOR = struct.Struct("<BbHHHIf")
OP = struct.Struct("<BBBB6H4H4BHHII")


def sealed(data: bytes) -> bytes:
    """The same bytes with a right length and checksum, so that only the content can be wrong."""
    data = data[:8] + struct.pack("<I", len(data)) + data[12:]
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


def records_end(data: bytes) -> int:
    """Where a program's constants begin."""
    fields = HEADER.unpack_from(data)
    return HEADER.size + int(fields[5]) * TENSOR.size + int(fields[6]) * OP.size


@st.composite
def int8_operations(draw: st.DrawFn) -> bytes:
    """A dense layer, convolution or addition in int8, with any constants that an output may be scaled by."""
    kind = draw(st.sampled_from([Kind.INT8_DENSE, Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE, Kind.INT8_ADD]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.sampled_from([1, 3, 7, 8, 9, 16, 17, 23, 32, 41]))
    h, w, filters, kernel = draw(st.integers(1, 9)), draw(st.integers(1, 9)), channels, (0, 0)
    fields: dict[str, Any] = {}
    out = h, w
    if kind in (Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE):
        where = [draw(_window(size)) for size in (h, w)]
        kernel, out = (where[0][0], where[1][0]), (where[0][4], where[1][4])
        for i, name in enumerate(("strides", "dilation", "pads"), 1):
            fields[name] = where[0][i], where[1][i]
    if kind in (Kind.INT8_DENSE, Kind.INT8_CONV2D):
        filters = draw(st.sampled_from([1, 2, 4, 7, 8, 9, 16, 17, 31, 40]))
    if kind == Kind.INT8_DENSE:
        out = 1, 1
    elif kind == Kind.INT8_CONV2D and draw(st.integers(0, 4)) == 0:
        channels = 1021 // (kernel[0] * kernel[1]) + draw(st.integers(0, 6))  # about 1024 taps
    x = Tensor((h, w, channels), "int8", 1.0, draw(st.integers(-128, 127)))
    y = Tensor((*out, filters), "int8", 1.0, draw(st.integers(-128, 127)))
    shape = {
        Kind.INT8_DENSE: (filters, x.size),
        Kind.INT8_CONV2D: (filters, *kernel, channels),
        Kind.INT8_DEPTHWISE: (*kernel, filters),
        Kind.INT8_ADD: (0,),
    }[kind]
    weights = random.integers(-128, 128, shape).astype(np.int8)
    op = Op(
        kind, "op", (0, 0) if kind == Kind.INT8_ADD else (0,), 1, kernel=kernel, weights=weights,
        bias=np.zeros(filters, np.int32), weight_scales=np.ones(filters), low=draw(st.sampled_from([-128, -5])),
        high=draw(st.sampled_from([127, 90])), **fields,
    )  # fmt: skip
    data = bytearray(assemble(Graph((x, y), (op,), 1)).data)

    def scaling(bits: float) -> tuple[int, int]:
        """A multiplier and a shift: mostly such that sums of so many bits become about 8."""
        if random.integers(4) == 0:
            return int(random.integers(2**31)), int(random.integers(-31, 31))
        return int(random.integers(2**30, 2**31)), int(7 - bits + random.integers(3))

    at = records_end(data)
    if kind == Kind.INT8_ADD:
        left = int(random.integers(21))
        scales = [*scaling(27 - left), *scaling(27 - left), *scaling(27)]
        data[at : at + 40] = struct.pack("<10i", *random.integers(-128, 129, 3), left, *scales)
    else:
        bits = np.log2(73 * 73 * np.sqrt(weights.size / filters))
        for o in range(filters):
            bias = int(random.integers(-(2**31), 2**31)) >> int(random.integers(32))
            data[at + 4 + 12 * o : at + 16 + 12 * o] = struct.pack("<3i", bias, *scaling(bits))
    return sealed(bytes(data))


@st.composite
def _window(draw: st.DrawFn, size: int) -> tuple[int, int, int, int, int]:
    """In one dimension: kernel, stride, dilation, padding before, and the output's size."""
    k, d, s = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    reach = (k - 1) * d
    before, after = draw(st.integers(0, reach)), draw(st.integers(0, reach))
    if size + before + after <= reach:
        before = after = reach
    return k, s, d, before, (size + before + after - reach - 1) // s + 1


TRICKY = (0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 254, 255)
TRICKY_WORDS = (0, 1, 0x0FFFFFFF, 0x10000000, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Programs of which some bytes or fields are wrong under a right checksum."""
    graph = draw(graphs())
    data = bytearray(assemble(with_weights(graph, np.random.default_rng(1)), carry=draw(st.booleans())).data)
    end = records_end(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(5, end - 1))
        how = draw(st.integers(0, 3))
        if how == 0:
            data[at] = draw(st.integers(0, 255))
        elif how == 1:
            data[at] = (data[at] + draw(st.sampled_from([-4, -1, 1, 4]))) % 256
        elif how == 2:
            data[at] = draw(st.sampled_from(TRICKY))
        else:  # one whole word, as of a count or an offset
            at = min(at & ~3, end - 4)
            data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(TRICKY_WORDS)))
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return sealed(bytes(data)) if len(data) >= 16 else bytes(data)


def spoilt(data: bytes) -> Iterator[bytes]:
    """The program with each byte and word of its header, tensors and ops, each dimension and each place of a tensor,
    made wrong in turn, under a right checksum; and cut at every length."""
    n_tensors, activations, end = HEADER.unpack_from(data)[5], HEADER.unpack_from(data)[16], records_end(data)

    def put(at: int, new: bytes) -> bytes:
        return sealed(data[:at] + new + data[at + len(new) :])

    for at in range(end):
        for value in {*TRICKY, data[at] ^ 1, (data[at] + 1) % 256, (data[at] - 1) % 256}:
            yield put(at, bytes([value]))
    for at in range(0, end, 4):
        for word in TRICKY_WORDS:
            yield put(at, struct.pack("<I", word))
    for tensor in range(HEADER.size, HEADER.size + n_tensors * TENSOR.size, TENSOR.size):
        for dimension in (2, 4, 6):
            for value in (1, 2, 3, 5, 8, 300, 65535):
                yield put(tensor + dimension, struct.pack("<H", value))
        for offset in range(0, activations + 1, 4):
            yield put(tensor + 8, struct.pack("<I", offset))
    for cut in range(len(data)):
        yield data[:cut]
