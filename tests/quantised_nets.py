"""int8 networks for the tests and the benchmark of quantised training: an image classifier, and NumPy's arithmetic."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.graph import Graph, Kind, Op
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, TRAINED_INT8, root
from tinyfleet.edge.model.quantized import quantize_multiplier

_DENSE = (Kind.INT8_DENSE, Kind.TRAINED_INT8_DENSE)
_CONV2D = (Kind.INT8_CONV2D, Kind.TRAINED_INT8_CONV2D)

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def digits() -> tuple[Images, Labels, Images, Labels]:
    """Handwritten digits, 8 x 8, from 0 to 1: 1200 to learn from and 597 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = (data.images / 16).astype(np.float32)[order, :, :, None], data.target[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def keras_digits(x: Images, y: Labels) -> Any:
    """A small depthwise-separable network with a residual sum, trained in some seconds."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(1)
    layers = tf.keras.layers
    source = layers.Input((8, 8, 1))
    a = layers.Conv2D(16, 3, padding="same", activation="relu", name="first")(source)
    b = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(a)
    b = layers.Conv2D(16, 1, name="pointwise")(b)
    a = layers.ReLU()(layers.Add()([a, b]))
    a = layers.MaxPooling2D(2)(a)
    a = layers.Conv2D(24, 3, activation="relu", name="last")(a)
    a = layers.Flatten()(a)
    model = tf.keras.Model(source, layers.Dense(10, activation="softmax", name="head")(a))
    model.compile(tf.keras.optimizers.Adam(0.005), "sparse_categorical_crossentropy")
    model.fit(x, y, 64, epochs=12, verbose=0)
    return model


def int8_tflite(model: Any, x: Images) -> bytes:
    """The model in int8, with int8 inputs and outputs, by TensorFlow's converter."""
    import tensorflow as tf

    one = tf.keras.Input(batch_shape=(1, *x.shape[1:]))  # else flattening computes shapes
    converter = tf.lite.TFLiteConverter.from_keras_model(tf.keras.Model(one, model(one)))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in x[:200])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    with contextlib.redirect_stdout(io.StringIO()):  # it tells where it saved what
        return bytes(converter.convert())


def quantised(graph: Graph, x: NDArray[Any]) -> NDArray[np.int8]:
    """Images as an int8 graph's input."""
    source = graph.tensors[0]
    return np.clip(np.round(x / source.scale) + source.zero_point, -128, 127).astype(np.int8)


def _scaled(x: NDArray[Any], multiplier: NDArray[Any], shift: NDArray[Any]) -> NDArray[Any]:
    """x * multiplier * 2^(shift - 31) as TFLite rounds it, twice."""
    high = ((x << np.maximum(shift, 0)) * multiplier + (1 << 30)) >> 31
    right = np.maximum(-shift, 0)
    return (high + (1 << right >> 1) - ((high < 0) & (right > 0))) >> right


class Reference:
    """A network of dense, convolutions, sums and pools that trains in int8: forward in integers, backward in float64
    through the dequantised network, where clamped outputs pass nothing.

    scaled: with quantisation-aware scaling; without it, gradients are those of the int8 and int32 numbers themselves.
    """

    def __init__(self, graph: Graph, *, scaled: bool = True) -> None:
        self.graph, self.scaled = graph, scaled
        self.ops = [op for op in graph.ops if op.kind != Kind.DEQUANTIZE]
        self.logits = next(op for op in graph.ops if op.kind == Kind.DEQUANTIZE).inputs[0]
        self.weights: dict[str, NDArray[Any]] = {}
        self.biases: dict[str, NDArray[Any]] = {}
        for op in self.ops:
            if op.weights is not None and op.bias is not None:
                self.weights[op.name], self.biases[op.name] = op.weights.astype(np.int64), op.bias.astype(np.int64)
        self.random = np.random.default_rng(0)

    def _slices(self, op: Op) -> Any:
        """For each tap of the op's window, where the outputs find it in the padded input."""
        (h, w, _), (rows, columns) = self.graph.tensors[op.output].shape, op.strides
        for i in range(op.kernel[0]):
            for j in range(op.kernel[1]):
                y, x = i * op.dilation[0], j * op.dilation[1]
                yield i, j, np.s_[y : y + (h - 1) * rows + 1 : rows, x : x + (w - 1) * columns + 1 : columns]

    def _padded(self, op: Op, x: NDArray[Any], fill: int) -> NDArray[Any]:
        out = self.graph.tensors[op.output].shape
        size = [
            (o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, op.strides, op.kernel, op.dilation, strict=False)
        ]
        size = [max(n, p + m) for n, p, m in zip(size, op.pads, x.shape, strict=False)]
        padded = np.full((*size, x.shape[2]), fill, x.dtype)
        padded[op.pads[0] : op.pads[0] + x.shape[0], op.pads[1] : op.pads[1] + x.shape[1]] = x
        return padded

    def _value(self, index: int) -> NDArray[Any]:
        return self.values[root(self.graph.tensors, index)].reshape(self.graph.tensors[index].shape)

    def forward(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """The real outputs."""
        self.values = {0: x.astype(np.int64).reshape(self.graph.tensors[0].shape)}
        for op in self.ops:
            self.values[op.output] = self._forward(op, self._value(op.inputs[0]))
        out = self.graph.tensors[self.logits]
        return out.scale * (self._value(self.logits).ravel() - out.zero_point)

    def _forward(self, op: Op, x: NDArray[Any]) -> NDArray[Any]:
        source, out = self.graph.tensors[op.inputs[0]], self.graph.tensors[op.output]
        if op.kind in (Kind.INT8_MAXPOOL, Kind.INT8_AVGPOOL):
            windows = np.stack([x[at] for _, _, at in self._slices(op)])
            if op.kind == Kind.INT8_MAXPOOL:
                return windows.max(0)
            total = windows.sum(0)
            return np.sign(total) * ((np.abs(total) + len(windows) // 2) // len(windows))
        if op.kind == Kind.INT8_ADD:
            return self._sum(op, x, self._value(op.inputs[1]))
        w = self.weights[op.name]
        x = x - source.zero_point
        if op.kind in _DENSE:
            sums = (w @ x.ravel())[None, None]
        else:
            padded = self._padded(op, x, 0)
            sums = np.zeros(out.shape, np.int64)
            for i, j, at in self._slices(op):
                if op.kind in _CONV2D:
                    sums += padded[at] @ w[:, i, j].T
                else:
                    sums += np.repeat(padded[at], out.shape[2] // source.shape[2], axis=2) * w[i, j]
        real = np.float64(np.float32(source.scale)) * op.weight_scales / np.float64(np.float32(out.scale))
        multiplier, shift = np.array([quantize_multiplier(float(r)) for r in real]).T
        y = _scaled(sums + self.biases[op.name], multiplier, shift) + out.zero_point
        return np.clip(y, op.low, op.high)

    def _sum(self, op: Op, x: NDArray[Any], x2: NDArray[Any]) -> NDArray[Any]:
        a, b, out = (self.graph.tensors[i] for i in (*op.inputs, op.output))
        twice = 2 * max(a.scale, b.scale)
        total = sum(
            _scaled((v - t.zero_point) << 20, *map(np.int64, quantize_multiplier(t.scale / twice)))
            for v, t in ((x, a), (x2, b))
        )
        y = _scaled(total, *map(np.int64, quantize_multiplier(twice / (2**20 * out.scale)))) + out.zero_point
        return np.clip(y, op.low, op.high)

    def backward(self, dlogits: NDArray[np.float64]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """The gradients with respect to the real weights and biases of all layers."""
        self.gradients = {root(self.graph.tensors, self.logits): dlogits.reshape(self.graph.tensors[self.logits].shape)}
        found = {}
        for op in reversed(self.ops):
            dy = self.gradients.get(op.output)
            if dy is None or op.kind in INT8_WEIGHTED:
                continue
            y = self.values[op.output]
            if op.kind in (*TRAINED_INT8, Kind.INT8_ADD):
                dy = np.where((y > op.low) & (y < op.high), dy, 0)
            if op.kind in TRAINED_INT8:
                dx, dw = self._weighted_back(op, dy)
                found[op.name] = (dw, dy.sum((0, 1)))
                self._add(op.inputs[0], dx)
            elif op.kind == Kind.INT8_ADD:
                self._add(op.inputs[0], dy)
                self._add(op.inputs[1], dy)
            else:
                self._add(op.inputs[0], self._pool_back(op, dy))
        return found

    def _add(self, index: int, dx: NDArray[Any]) -> None:
        at = root(self.graph.tensors, index)
        dx = dx.reshape(self.graph.tensors[at].shape)
        self.gradients[at] = self.gradients[at] + dx if at in self.gradients else dx

    def _weighted_back(self, op: Op, dy: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        source, out = self.graph.tensors[op.inputs[0]], self.graph.tensors[op.output]
        w = self.weights[op.name] * np.float32(1)
        x = np.float64(source.scale) * (self._value(op.inputs[0]) - source.zero_point)
        if op.kind == Kind.TRAINED_INT8_DENSE:
            w = w * op.weight_scales[:, None]
            return (dy.ravel() @ w).reshape(x.shape), np.outer(dy.ravel(), x.ravel())
        padded = self._padded(op, x, 0)
        dpadded, dw = np.zeros(padded.shape), np.zeros(w.shape)
        multiple = out.shape[2] // source.shape[2]
        for i, j, at in self._slices(op):
            if op.kind == Kind.TRAINED_INT8_CONV2D:
                dw[:, i, j] = np.tensordot(dy, padded[at], ((0, 1), (0, 1)))
                dpadded[at] += dy @ (w[:, i, j] * op.weight_scales[:, None])
            else:
                dw[i, j] = (dy * np.repeat(padded[at], multiple, axis=2)).sum((0, 1))
                d = dy * w[i, j] * op.weight_scales
                dpadded[at] += d.reshape(*d.shape[:2], source.shape[2], multiple).sum(3)
        h, w_ = source.shape[:2]
        return dpadded[op.pads[0] : op.pads[0] + h, op.pads[1] : op.pads[1] + w_], dw

    def _pool_back(self, op: Op, dy: NDArray[Any]) -> NDArray[Any]:
        x = self._value(op.inputs[0])
        slices = [at for _, _, at in self._slices(op)]
        first = np.stack([x[at] for at in slices]).argmax(0)
        dx = np.zeros(x.shape)
        for number, at in enumerate(slices):
            dx[at] += np.where(first == number, dy, 0) if op.kind == Kind.INT8_MAXPOOL else dy / len(slices)
        return dx

    def steps(self, rate: float) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
        """What a step of this rate adds to the int8 weights and the int32 biases that train, before rounding."""
        found = {}
        for op in self.ops:
            if op.trains == "nothing":
                continue
            dw, db = self.found[op.name]
            s = op.weight_scales
            s_w = s if op.kind == Kind.TRAINED_INT8_DEPTHWISE else s.reshape(-1, *[1] * (dw.ndim - 1))
            s_b = self.graph.tensors[op.inputs[0]].scale * s
            dw, db = (dw / s_w, db / s_b) if self.scaled else (dw * s_w, db * s_b)
            mine = np.arange(len(s)) < (len(s) if op.trained is None else op.trained)
            if op.kind != Kind.TRAINED_INT8_DEPTHWISE:
                dw = np.moveaxis(dw, 0, -1)
            dw = np.where(mine & (op.trains == "all"), dw, 0)
            if op.kind != Kind.TRAINED_INT8_DEPTHWISE:
                dw = np.moveaxis(dw, -1, 0)
            found[op.name] = (-rate * dw, -rate * np.where(mine, db, 0))
        return found

    def gradient(self, x: NDArray[Any], label: int) -> None:
        """Forward and backward, of the softmax cross-entropy."""
        logits = self.forward(x)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[label] -= 1
        self.found = self.backward(p)

    def learn(self, x: NDArray[Any], label: int, rate: float) -> None:
        """One step, rounded at random."""
        self.gradient(x, label)
        for name, (dw, db) in self.steps(rate).items():
            w = self.weights[name] + np.floor(dw + self.random.random(dw.shape)).astype(np.int64)
            self.weights[name] = np.clip(w, -127, 127)
            self.biases[name] = self.biases[name] + np.floor(db + self.random.random(db.shape)).astype(np.int64)
