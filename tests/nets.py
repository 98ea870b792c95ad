"""Random small models, and what they compute: a reference in float64 that shares no code with the engine."""

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge import program as p

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Net:
    layers: tuple[p.Layer, ...]
    input_shape: tuple[int, ...]
    loss: p.Loss
    trainable: frozenset[int] | None = None

    def build(self, weights: dict[str, NDArray[np.float32]] | None = None) -> p.Program:
        return p.build(self.layers, self.input_shape, self.loss, trainable=self.trainable, weights=weights)

    def whole(self) -> p.Program:
        """The same model with every layer trainable."""
        return p.build(self.layers, self.input_shape, self.loss)


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Models of all layers, kernels, strides and paddings, with any set of trainable layers."""
    side = st.integers(1, 3)
    pair = st.tuples(side, side)
    padding = st.sampled_from(["valid", "same"])
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3)))
    flat = draw(st.booleans())
    input_shape: tuple[int, ...] = (shape[0] * shape[1],) if flat else shape
    layers: list[p.Layer] = []
    if not flat:
        for _ in range(draw(st.integers(0, 5))):
            window = [
                p.Conv2D(draw(side), draw(pair), draw(pair), draw(padding)),
                p.AvgPool2D(draw(pair), draw(st.none() | pair), draw(padding)),
                p.MaxPool2D(draw(pair), draw(st.none() | pair), draw(padding)),
                p.ReLU(),
                p.Tanh(),
            ]
            layers.append(draw(st.sampled_from(window)))
        layers.append(p.Flatten())
    for _ in range(draw(st.integers(0, 4))):
        layers.append(draw(st.sampled_from([p.Dense(draw(st.integers(1, 7))), p.ReLU(), p.Tanh(), p.Flatten()])))
    if draw(st.booleans()):
        layers.append(p.Dense(draw(st.integers(2, 4))))
    layers = _fitting(layers, input_shape)
    count = sum(isinstance(layer, p.Dense | p.Conv2D) for layer in layers)
    trainable = draw(st.none() | st.frozensets(st.integers(0, count - 1))) if count else frozenset[int]()
    return Net(tuple(layers), input_shape, draw(st.sampled_from(p.LOSSES)), trainable)


def _fitting(layers: Sequence[p.Layer], input_shape: tuple[int, ...]) -> list[p.Layer]:
    """The layers that the input reaches with every window inside; at least one that computes something."""
    kept: list[p.Layer] = []
    for layer in layers:
        try:
            p.build([*kept, layer, p.Flatten(), p.Dense(1)], input_shape, "mse")
        except p.ProgramError:
            continue
        kept.append(layer)
    return kept if any(not isinstance(layer, p.Flatten) for layer in kept) else [*kept, p.Tanh()]


def random_weights(program: p.Program, seed: int) -> dict[str, NDArray[np.float32]]:
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
        if isinstance(layer, p.Dense):
            w, b = next(arrays), next(arrays)
            value = w @ value + b
        elif isinstance(layer, p.Conv2D):
            w, b = next(arrays), next(arrays)
            kernel: tuple[int, int] = w.shape[1:3]
            value = _windows(value, kernel, layer.strides, layer.padding, 0.0, lambda v, w=w, b=b: _filter(v, w, b))
        elif isinstance(layer, p.AvgPool2D):
            value = _windows(value, layer.size, layer.strides, layer.padding, np.nan, lambda v: np.nanmean(v, (0, 1)))
        elif isinstance(layer, p.MaxPool2D):
            value = _windows(value, layer.size, layer.strides, layer.padding, -np.inf, lambda v: v.max((0, 1)))
        elif isinstance(layer, p.Flatten):
            value = value.ravel()
        elif isinstance(layer, p.ReLU):
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


# Programs as bytes.

HEADER = struct.Struct("<4sHHIIHBBHHHHIIII")
OP = struct.Struct("<8B6HIII")


def sealed(data: bytes) -> bytes:
    """The same bytes with a right length and checksum, so that only the content can be wrong."""
    data = data[:8] + struct.pack("<I", len(data)) + data[12:]
    return data[:12] + struct.pack("<I", zlib.crc32(data[16:])) + data[16:]


TRICKY = (0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128, 254, 255)
TRICKY_WORDS = (0, 1, 0x0FFFFFFF, 0x10000000, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Programs of which some bytes or fields are wrong under a right checksum."""
    net = draw(nets())
    data = bytearray(net.build(random_weights(net.whole(), 1)).data if draw(st.booleans()) else net.whole().data)
    body_end = HEADER.size + HEADER.unpack_from(data)[5] * OP.size
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(5, body_end - 1))
        how = draw(st.integers(0, 3))
        if how == 0:
            data[at] = draw(st.integers(0, 255))
        elif how == 1:
            data[at] = (data[at] + draw(st.sampled_from([-4, -1, 1, 4]))) % 256
        elif how == 2:
            data[at] = draw(st.sampled_from(TRICKY))
        else:  # one whole word, as of a count or an offset
            at = min(at & ~3, body_end - 4)
            data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(TRICKY_WORDS)))
    if draw(st.integers(0, 9)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return sealed(bytes(data)) if len(data) >= 16 else bytes(data)


def spoilt(data: bytes) -> Iterator[bytes]:
    """The program with each byte and word of its header and ops, each shape between two ops, and each place of a
    tensor, made wrong in turn, under a right checksum; and cut at every length."""
    n_ops, activations = HEADER.unpack_from(data)[5], HEADER.unpack_from(data)[14]
    end = HEADER.size + n_ops * OP.size

    def put(*changes: tuple[int, bytes]) -> bytes:
        copy = bytearray(data)
        for at, new in changes:
            copy[at : at + len(new)] = new
        return sealed(bytes(copy))

    for at in range(end):
        for value in {*TRICKY, data[at] ^ 1, (data[at] + 1) % 256, (data[at] - 1) % 256}:
            yield put((at, bytes([value])))
    for at in range(0, end, 4):
        for word in TRICKY_WORDS:
            yield put((at, struct.pack("<I", word)))
    records = range(HEADER.size, end, OP.size)
    for record in records:
        before = 20 if record == HEADER.size else record - OP.size + 14  # where that shape stands first
        for dimension in (0, 2, 4):
            for value in (1, 2, 3, 5, 8, 300, 65535):
                new = struct.pack("<H", value)
                yield put((before + dimension, new), (record + 8 + dimension, new))
        for field in (24, 28):
            for offset in range(activations + 1):
                yield put((record + field, struct.pack("<I", offset)))
    for cut in range(len(data)):
        yield data[:cut]
