"""Keras models out as .tflite files that learn: training signatures made of TFLite's builtin operators only.

TFLite has no gradients, and TensorFlow's own need operators outside of the builtin set, so every layer's backward pass
is written here with forward operators: a filter's gradient is a convolution of transposed tensors, a pool's is a mask
laid over its windows. One sample a step, as in the C engine, and the same parameters in the same order, so that a
Raspberry Pi that trains in TFLite and a microcontroller exchange the same vector.

Signatures (float32; shapes are those of the network, with a batch of 1 in front of x and the output):

    train(x, y, rates [layers]) -> loss     one step of SGD; a rate for every layer with weights, 0 freezes it;
                                            a loss that is not finite changes nothing
    loss(x, y) -> loss                      learns nothing
    infer(x) -> output                      probabilities under cross-entropy
    get() -> parameters [n], sizes [layers] the vector that a fleet exchanges, and how many floats of it each layer has
    set(parameters [n]) -> parameters

y is a class index (int32, shape []) under cross-entropy, else the target values [outputs].
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.program import AvgPool2D, Conv2D, Dense, Flatten, Layer, MaxPool2D, ReLU, Tanh
from firmware_tools.compiler import CROSS_ENTROPY, CompileError, Network, read_network, weights_from_keras

#: A TensorFlow tensor; TensorFlow has no types of its own to check against.
Tensor = Any
#: From the gradient of an operation's output to the gradients of its input and of its weights and bias, if it has any.
Backward = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


def export_tflite(model: Any, *, train_from: str | None = None, loss: str | None = None) -> bytes:
    """A Keras model (object, or path of a .keras file) as a .tflite file with training signatures.

    train_from, loss: as in compiler.compile_model. Raises CompileError.
    """
    network = read_network(model, loss)
    trainable = network.trainable if train_from is None else network.suffix(train_from)
    return export_network(network, weights_from_keras(model), trainable)


def export_network(
    network: Network, weights: Mapping[str, NDArray[np.float32]], trainable: frozenset[int] | None = None
) -> bytes:
    """A network and its weights (by the program's names) as a .tflite file; trainable: as in Network.program."""
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as e:
        raise CompileError("writing a .tflite file needs TensorFlow; pip install 'tinyfleet[keras]'") from e
    trains = network.trainable if trainable is None else trainable
    if not trains:
        raise CompileError("no layer is trainable; name one with train_from")
    ours = list(network.layer_names().values())
    initial = [(np.asarray(weights[f"{n}/weights"]), np.asarray(weights[f"{n}/bias"])) for n in ours]
    sizes = [w.size + b.size if i in trains else 0 for i, (w, b) in enumerate(initial)]

    module = tf.Module()
    module.variables_ = [
        [tf.Variable(w), tf.Variable(b)] if i in trains else [tf.constant(w), tf.constant(b)]
        for i, (w, b) in enumerate(initial)
    ]
    trained = [v for i, pair in enumerate(module.variables_) if i in trains for v in pair]

    def forward(x: Tensor) -> tuple[Tensor, list[Backward]]:
        """The model's output before any softmax [1, n], and each operation's backward pass."""
        backs: list[Backward] = []
        pairs = iter(module.variables_)
        for op in network.layers:
            pair = [tf.convert_to_tensor(v) for v in next(pairs)] if isinstance(op, Dense | Conv2D) else []
            x, back = _operation(tf, op, x, *pair)
            backs.append(back)
        return tf.reshape(x, [1, -1]), backs

    def score(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to z."""
        if network.loss == CROSS_ENTROPY:
            truth = tf.one_hot(tf.reshape(y, [1]), z.shape[1])
            return -tf.reduce_sum(truth * tf.nn.log_softmax(z)), tf.nn.softmax(z) - truth
        d = z - tf.reshape(y, [1, -1])
        return tf.reduce_mean(d * d), d * (2.0 / z.shape[1])

    def train(x: Tensor, y: Tensor, rates: Tensor) -> dict[str, Tensor]:
        z, backs = forward(x)
        loss, d = score(z, y)
        gradients: list[list[Tensor]] = []
        for back in reversed(backs):
            d, g = back(d)
            if g:
                gradients.insert(0, g)
        finite = tf.abs(loss) <= np.finfo(np.float32).max
        for i in sorted(trains):
            for variable, g in zip(module.variables_[i], gradients[i], strict=True):
                variable.assign(tf.where(finite, variable - rates[i] * g, variable))
        return {"loss": loss}

    def measure(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": score(forward(x)[0], y)[0]}

    def infer(x: Tensor) -> dict[str, Tensor]:
        z = forward(x)[0]
        return {"output": tf.nn.softmax(z) if network.loss == CROSS_ENTROPY else z}

    def get() -> dict[str, Tensor]:
        vector = tf.concat([tf.reshape(v, [-1]) for v in trained], 0)
        return {"parameters": vector, "sizes": tf.constant(sizes, tf.int32)}

    def put(parameters: Tensor) -> dict[str, Tensor]:
        parts = tf.split(parameters, [int(np.prod(v.shape)) for v in trained])
        for variable, part in zip(trained, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))
        return {"parameters": parameters}

    x = tf.TensorSpec([1, *network.input_shape], tf.float32, name="x")
    outputs = math.prod(network.program().output_shape)
    y = (
        tf.TensorSpec([], tf.int32, name="y")
        if network.loss == CROSS_ENTROPY
        else tf.TensorSpec([outputs], tf.float32, name="y")
    )
    rates = tf.TensorSpec([len(ours)], tf.float32, name="rates")
    vector = tf.TensorSpec([sum(sizes)], tf.float32, name="parameters")
    signatures = {
        "infer": tf.function(infer, autograph=False, input_signature=[x]),
        "train": tf.function(train, autograph=False, input_signature=[x, y, rates]),
        "loss": tf.function(measure, autograph=False, input_signature=[x, y]),
        "get": tf.function(get, autograph=False, input_signature=[]),
        "set": tf.function(put, autograph=False, input_signature=[vector]),
    }
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.experimental_enable_resource_variables = True
        return bytes(converter.convert())


def _operation(tf: Any, op: Layer, x: Tensor, *pair: Tensor) -> tuple[Tensor, Backward]:
    """One operation's output and backward pass."""
    match op:
        case Dense():
            return _dense(tf, x, *pair)
        case Conv2D():
            return _conv2d(tf, op, x, *pair)
        case AvgPool2D() | MaxPool2D():
            return _pool(tf, op, x)
        case Flatten():
            return tf.reshape(x, [1, -1]), lambda d: (tf.reshape(d, x.shape), [])
        case ReLU():
            y = tf.nn.relu(x)
            return y, lambda d: (d * tf.cast(y > 0.0, tf.float32), [])
        case Tanh():
            y = tf.tanh(x)
            return y, lambda d: (d * (1.0 - y * y), [])
    raise CompileError(f"a {type(op).__name__} cannot be exported to a .tflite file that trains")


def _dense(tf: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
    """x [1, in], w [out, in], b [out]."""

    def back(d: Tensor) -> tuple[Tensor, list[Tensor]]:
        return tf.matmul(d, w), [tf.matmul(d, x, transpose_a=True), tf.reshape(d, [-1])]

    return tf.matmul(x, w, transpose_b=True) + b, back


def _conv2d(tf: Any, op: Conv2D, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
    """x [1, h, w, in], w [out, kh, kw, in], b [out]. The padding is laid on first: then all is 'valid'."""
    (kh, kw), strides = _pair(op.kernel), _pair(op.strides)
    padding = _padding(x.shape, (kh, kw), strides, op.padding)
    padded = tf.pad(x, padding)
    filters = tf.transpose(w, [1, 2, 3, 0])

    def back(d: Tensor) -> tuple[Tensor, list[Tensor]]:
        dw = tf.nn.conv2d(  # channels take the batch's place and the batch theirs
            tf.transpose(padded, [3, 1, 2, 0]), tf.transpose(d, [1, 2, 0, 3]), 1, "VALID", dilations=strides
        )[:, :kh, :kw, :]
        dx = tf.nn.conv2d_transpose(d, filters, padded.shape, strides, "VALID")
        return _cut(dx, padding), [tf.transpose(dw, [3, 1, 2, 0]), tf.reduce_sum(d, [0, 1, 2])]

    return tf.nn.conv2d(padded, filters, strides, "VALID") + b, back


def _pool(tf: Any, op: AvgPool2D | MaxPool2D, x: Tensor) -> tuple[Tensor, Backward]:
    """x [1, h, w, c]. A window's elements are taken one place at a time: each is a tensor [1, out h, out w, c]."""
    size = _pair(op.size)
    sh, sw = strides = _pair(op.size if op.strides is None else op.strides)
    padding = _padding(x.shape, size, strides, op.padding)
    height, width = (n + sum(around) for n, around in zip(x.shape[1:3], padding[1:3], strict=True))
    oh, ow = (height - size[0]) // sh + 1, (width - size[1]) // sw + 1
    places = [(i, j) for i in range(size[0]) for j in range(size[1])]

    def elements(padded: Any, i: int, j: int) -> Any:
        return padded[:, i : i + (oh - 1) * sh + 1 : sh, j : j + (ow - 1) * sw + 1 : sw, :]

    def spread(d: Tensor) -> Tensor:
        """d with zeros between its elements, as far apart as the windows."""
        c = d.shape[3]
        d = tf.pad(tf.reshape(d, [oh, 1, ow * c]), [[0, 0], [0, sh - 1], [0, 0]])
        d = tf.pad(tf.reshape(d, [oh * sh * ow, 1, c]), [[0, 0], [0, sw - 1], [0, 0]])
        return tf.reshape(d, [1, oh * sh, ow * sw, c])[:, : (oh - 1) * sh + 1, : (ow - 1) * sw + 1, :]

    def lay(d: Tensor, i: int, j: int) -> Tensor:
        """A spread gradient at place (i, j) of every window."""
        bottom, right = height - i - d.shape[1], width - j - d.shape[2]
        return tf.pad(d, [[0, 0], [i, bottom], [j, right], [0, 0]])

    if isinstance(op, AvgPool2D):
        inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.float32), padding)  # padding does not count
        share = 1.0 / sum(elements(inside, i, j) for i, j in places)

        def back_mean(d: Tensor) -> tuple[Tensor, list[Tensor]]:
            spaced = spread(d * share)
            return _cut(tf.add_n([lay(spaced, i, j) for i, j in places]), padding), []

        return tf.nn.avg_pool2d(x, size, strides, op.padding.upper()), back_mean

    y = tf.nn.max_pool2d(x, size, strides, op.padding.upper())

    def back_max(d: Tensor) -> tuple[Tensor, list[Tensor]]:
        padded = tf.pad(x, padding, constant_values=np.finfo(np.float32).min)
        free, parts = tf.ones_like(y), []
        for i, j in places:  # of equal elements the first one takes the gradient
            largest = free * tf.cast(tf.equal(elements(padded, i, j), y), tf.float32)
            free -= largest
            parts.append(lay(spread(d * largest), i, j))
        return _cut(tf.add_n(parts), padding), []

    return y, back_max


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _padding(shape: Any, kernel: tuple[int, int], strides: tuple[int, int], padding: str) -> list[list[int]]:
    """What TensorFlow's 'same' adds around a tensor [1, h, w, c]: the odd element goes behind."""
    around = [[0, 0], [0, 0], [0, 0], [0, 0]]
    if padding == "same":
        for axis, (k, s) in enumerate(zip(kernel, strides, strict=True), start=1):
            total = max((-(-shape[axis] // s) - 1) * s + k - shape[axis], 0)
            around[axis] = [total // 2, total - total // 2]
    return around


def _cut(x: Tensor, padding: list[list[int]]) -> Tensor:
    """x without its padding."""
    (_, _), (top, bottom), (left, right), (_, _) = padding
    return x[:, top : x.shape[1] - bottom, left : x.shape[2] - right, :]
