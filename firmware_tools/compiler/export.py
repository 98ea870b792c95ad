"""Exports Keras models as .tflite files that train, with TFLite's builtin operators only.

TFLite has no gradients, and TensorFlow's gradients need operators outside of the builtin set. So every operation's
backward pass is written here with forward operators: a filter's gradient is a convolution of transposed tensors, a
pool's is a mask over its windows. As in the C engine, a step takes one sample, and the parameters have the same order:
a Raspberry Pi that trains in TFLite and a microcontroller exchange the same vector.

Signatures (float32; shapes are those of the program, with a batch of 1 in front of x and the output):

    train(x, y, rates [layers]) -> loss     one step of SGD; a rate for every layer with weights, 0 freezes it;
                                            a loss that is not finite changes nothing
    loss(x, y) -> loss                      learns nothing
    infer(x) -> output                      probabilities under a cross-entropy
    get() -> parameters [n], sizes [layers] the vector that a fleet exchanges, and how many floats of it each layer has
    set(parameters [n]) -> parameters

y is a class index (int32, shape []) under softmax cross-entropy, else the target values [outputs].
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from tinyfleet.edge.model.graph import Graph, Kind, Op
from tinyfleet.edge.model.memory_plan import WEIGHTED, plan_memory, root
from tinyfleet.firmware_tools.compiler.compile import training_graph
from tinyfleet.firmware_tools.readers.common import CompileError

#: A TensorFlow tensor; TensorFlow has no types of its own to check against.
Tensor = Any
#: From the gradient of an operation's output to the gradients of its inputs, and those of its weights and bias, if any.
Backward = Callable[[Tensor], tuple[list[Tensor], list[Tensor]]]


def export_tflite(model: Any, *, train_from: str | None = None, loss: str | None = None) -> bytes:
    """Export a Keras model as a .tflite file with training signatures.

    Parameters
    ----------
    model : keras.Model, str or Path
        A Keras 3 model, or the path of a .keras file.
    train_from, loss
        As in `compile_model`.

    Returns
    -------
    bytes
        The .tflite file.

    Raises
    ------
    CompileError
        If the engine or TFLite cannot train the model.
    """
    return export_graph(training_graph(model, train_from=train_from, loss=loss))


def export_graph(graph: Graph) -> bytes:
    """Export a float32 graph with its weights as a .tflite file, in which the same layers train.

    Parameters
    ----------
    graph
        The model.

    Returns
    -------
    bytes
        The .tflite file.

    Raises
    ------
    CompileError
        If nothing trains, or TFLite cannot train a layer that does.
    """
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as e:
        raise CompileError("writing a .tflite file needs TensorFlow; pip install 'tinyfleet[keras]'") from e
    weighted = [op for op in graph.ops if op.kind in WEIGHTED]
    sizes = [op.weights.size + op.bias.size if op.trains == "all" else 0 for op in weighted]  # type: ignore[union-attr]
    if not any(sizes):
        raise CompileError("no layer is trainable; name one with train_from")
    module = tf.Module()
    module.variables_ = [
        [tf.Variable(a) if size else tf.constant(a) for a in (op.weights, op.bias)]
        for op, size in zip(weighted, sizes, strict=True)
    ]
    trains = [i for i, size in enumerate(sizes) if size]
    trained = [v for i in trains for v in module.variables_[i]]
    shapes = [[1, *t.shape] for t in graph.tensors]
    gradients = plan_memory(graph).gradients  # which operations have one, and with respect to which inputs

    def forward(x: Tensor) -> tuple[Tensor, list[Backward]]:
        """The model's output before the loss's own softmax or sigmoid [1, n], and each operation's backward pass."""
        backs: list[Backward] = []
        values = {0: tf.reshape(x, shapes[0])}

        def value(index: int) -> Tensor:
            return tf.reshape(values[root(graph.tensors, index)], shapes[index])

        pairs = iter(module.variables_)
        for op in graph.ops:
            pair = [tf.convert_to_tensor(v) for v in next(pairs)] if op.kind in WEIGHTED else []
            y, back = _operation(tf, op, [value(i) for i in op.inputs], shapes[op.output], *pair)
            # Several ops fill a concatenation's output, each with zeros around its part.
            values[op.output] = y + values[op.output] if op.output in values else y
            backs.append(back)
        return tf.reshape(value(graph.output), [1, -1]), backs

    def score(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient with respect to z."""
        n = z.shape[1]
        if graph.loss == "softmax_cross_entropy":
            truth = tf.one_hot(tf.reshape(y, [1]), n)
            return -tf.reduce_sum(truth * tf.nn.log_softmax(z)), tf.nn.softmax(z) - truth
        y = tf.reshape(y, [1, -1])
        if graph.loss == "binary_cross_entropy":
            losses = tf.nn.relu(z) - z * y + tf.math.log(1.0 + tf.exp(-tf.abs(z)))
            return tf.reduce_mean(losses), (tf.sigmoid(z) - y) / n
        d = z - y
        if graph.loss == "mse":
            return tf.reduce_mean(d * d), d * (2.0 / n)
        near = tf.clip_by_value(d, -graph.huber_delta, graph.huber_delta)
        return tf.reduce_mean(near * (d - 0.5 * near)), near / n

    def learned(backs: list[Backward], d: Tensor) -> list[list[Tensor]]:
        """Gradients of the weights and the bias of every operation that has some and that a gradient reaches."""
        at: dict[int, Tensor] = {root(graph.tensors, graph.output): d}
        found: dict[int, list[Tensor]] = {}
        for i in reversed(range(len(backs))):
            op, g = graph.ops[i], gradients[i]
            if g.dout is None:
                continue
            dxs, found[i] = backs[i](tf.reshape(at[op.output], shapes[op.output]))
            for index, wanted, dx in zip(op.inputs, (g.din, g.din2), dxs, strict=False):
                x = root(graph.tensors, index)
                if wanted is not None:
                    dx = tf.reshape(dx, shapes[x])
                    at[x] = at[x] + dx if x in at else dx
        return [found.get(i, []) for i, op in enumerate(graph.ops) if op.kind in WEIGHTED]

    def train(x: Tensor, y: Tensor, rates: Tensor) -> dict[str, Tensor]:
        z, backs = forward(x)
        loss, d = score(z, y)
        changes = learned(backs, d)
        finite = tf.abs(loss) <= np.finfo(np.float32).max
        for i in trains:
            for variable, g in zip(module.variables_[i], changes[i], strict=True):
                variable.assign(tf.where(finite, variable - rates[i] * g, variable))
        return {"loss": loss}

    def measure(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": score(forward(x)[0], y)[0]}

    def infer(x: Tensor) -> dict[str, Tensor]:
        z = forward(x)[0]
        ends = {"softmax_cross_entropy": tf.nn.softmax, "binary_cross_entropy": tf.sigmoid}
        return {"output": ends[graph.loss](z) if graph.loss in ends else z}

    def get() -> dict[str, Tensor]:
        vector = tf.concat([tf.reshape(v, [-1]) for v in trained], 0)
        return {"parameters": vector, "sizes": tf.constant(sizes, tf.int32)}

    def put(parameters: Tensor) -> dict[str, Tensor]:
        parts = tf.split(parameters, [int(np.prod(v.shape)) for v in trained])
        for variable, part in zip(trained, parts, strict=True):
            variable.assign(tf.reshape(part, variable.shape))
        return {"parameters": parameters}

    given = graph.tensors[0].shape
    x = tf.TensorSpec([1, *(given[2:] if given[:2] == (1, 1) else given)], tf.float32, name="x")
    y = (
        tf.TensorSpec([], tf.int32, name="y")
        if graph.loss == "softmax_cross_entropy"
        else tf.TensorSpec([graph.tensors[graph.output].size], tf.float32, name="y")
    )
    rates = tf.TensorSpec([len(weighted)], tf.float32, name="rates")
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


def _operation(tf: Any, op: Op, inputs: list[Tensor], shape: list[int], *pair: Tensor) -> tuple[Tensor, Backward]:
    """One operation's output, of this shape [1, h, w, c], and backward pass."""
    x = inputs[0]
    match op.kind:
        case Kind.DENSE:
            return _dense(tf, x, *pair)
        case Kind.CONV2D:
            return _conv2d(tf, op, x, shape, *pair)
        case Kind.DEPTHWISE:
            return _depthwise(tf, op, x, shape, *pair)
        case Kind.AVGPOOL | Kind.MAXPOOL:
            return _pool(tf, op, x, shape)
        case Kind.LAYERNORM:
            return _layer_norm(tf, op, x, *pair)
        case Kind.ADD:
            return x + inputs[1], lambda d: ([d, d], [])
        case Kind.PLACE:
            around = [[0, 0], *([o, n - o - m] for o, n, m in zip(op.offsets, shape[1:], x.shape[1:], strict=True))]
            return tf.pad(x, around), lambda d: ([_cut(d, around)], [])
        case Kind.SLICE:
            ends = [b + (n - 1) * s + 1 for b, n, s in zip(op.begin, shape[1:], op.steps, strict=True)]
            none = _refuse(op, "no gradient passes it")
            return tf.strided_slice(x, [0, *op.begin], [1, *ends], [1, *op.steps]), none
        case Kind.RELU:
            y = tf.nn.relu(x)
            return y, lambda d: ([d * tf.cast(y > 0.0, tf.float32)], [])
        case Kind.RELU6:
            y = tf.nn.relu6(x)
            inside = tf.cast(y > 0.0, tf.float32) * tf.cast(y < 6.0, tf.float32)
            return y, lambda d: ([d * inside], [])
        case Kind.LEAKY_RELU:
            y = tf.nn.leaky_relu(x, op.slope)
            steepness = tf.where(y > 0.0, tf.ones_like(y), op.slope * tf.ones_like(y))
            return y, lambda d: ([d * steepness], [])
        case Kind.TANH:
            y = tf.tanh(x)
            return y, lambda d: ([d * (1.0 - y * y)], [])
        case Kind.SIGMOID:
            y = tf.sigmoid(x)
            return y, lambda d: ([d * y * (1.0 - y)], [])
        case Kind.SOFTMAX:
            y = tf.nn.softmax(x)
            return y, lambda d: ([y * (d - tf.reduce_sum(d * y, -1, keepdims=True))], [])
    raise CompileError(f"layer '{op.name}' ({op.kind.name.lower()}) cannot be exported to a .tflite file that trains")


def _refuse(op: Op, why: str) -> Backward:
    def back(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        raise CompileError(f"layer '{op.name}' ({op.kind.name.lower()}) cannot train in TFLite: {why}; train from a "
                           "layer behind it with --train-from")  # fmt: skip

    return back


def _dense(tf: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
    """x [1, 1, 1, in], w [out, in], b [out]."""
    x = tf.reshape(x, [1, -1])

    def back(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        d = tf.reshape(d, [1, -1])
        return [tf.matmul(d, w)], [tf.matmul(d, x, transpose_a=True), tf.reshape(d, [-1])]

    return tf.matmul(x, w, transpose_b=True) + b, back


def _conv2d(tf: Any, op: Op, x: Tensor, shape: list[int], w: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
    """x [1, h, w, in], w [out, kh, kw, in], b [out]. The padding is laid on first: then all is 'valid'."""
    kh, kw = op.kernel
    padding = _padding(op, x.shape, shape)
    padded = tf.pad(x, padding)
    filters = tf.transpose(w, [1, 2, 3, 0])
    if op.dilation != (1, 1):
        if op.strides != (1, 1):
            raise CompileError(f"layer '{op.name}' is dilated and has strides, which TFLite does not have together")
        y = tf.nn.conv2d(padded, filters, 1, "VALID", dilations=op.dilation) + b
        return y, _refuse(op, "the gradient of a dilated convolution takes more than TFLite's own operators")

    def back(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        dw = tf.nn.conv2d(  # channels take the batch's place and the batch theirs
            tf.transpose(padded, [3, 1, 2, 0]), tf.transpose(d, [1, 2, 0, 3]), 1, "VALID", dilations=op.strides
        )[:, :kh, :kw, :]
        dx = tf.nn.conv2d_transpose(d, filters, padded.shape, op.strides, "VALID")
        return [_cut(dx, padding)], [tf.transpose(dw, [3, 1, 2, 0]), tf.reduce_sum(d, [0, 1, 2])]

    return tf.nn.conv2d(padded, filters, op.strides, "VALID") + b, back


def _depthwise(tf: Any, op: Op, x: Tensor, shape: list[int], w: Tensor, b: Tensor) -> tuple[Tensor, Backward]:
    """x [1, h, w, in], w [kh, kw, out], b [out]: the sum over the windows' places of elements times weights."""
    windows = _Windows(tf, op, x.shape, shape)
    # Each input channel as often as it has filters: a product with ones and zeros.
    spread = tf.constant(np.repeat(np.eye(x.shape[3], dtype=np.float32), shape[3] // x.shape[3], axis=1))
    inputs = windows.padded(tf.reshape(tf.matmul(tf.reshape(x, [-1, x.shape[3]]), spread), [*x.shape[:3], shape[3]]))
    parts = {(i, j): windows.elements(inputs, i, j) for i, j in windows.places}

    def back(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        dx = _cut(tf.add_n([windows.lay(windows.spread(d * w[i, j]), i, j) for i, j in windows.places]), windows.around)
        dx = tf.reshape(tf.matmul(tf.reshape(dx, [-1, shape[3]]), spread, transpose_b=True), x.shape)
        dw = tf.stack([tf.reduce_sum(parts[place] * d, [0, 1, 2]) for place in windows.places])
        return [dx], [tf.reshape(dw, w.shape), tf.reduce_sum(d, [0, 1, 2])]

    return tf.add_n([parts[i, j] * w[i, j] for i, j in windows.places]) + b, back


def _pool(tf: Any, op: Op, x: Tensor, shape: list[int]) -> tuple[Tensor, Backward]:
    """x [1, h, w, c]."""
    windows = _Windows(tf, op, x.shape, shape)
    if op.kind == Kind.AVGPOOL:
        inside = np.pad(np.ones((1, *x.shape[1:3], 1), np.float32), windows.around)  # padding does not count
        share = 1.0 / sum(windows.elements(inside, i, j) for i, j in windows.places)

        def back_mean(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            spaced = windows.spread(d * share)
            return [_cut(tf.add_n([windows.lay(spaced, i, j) for i, j in windows.places]), windows.around)], []

        mean = tf.nn.avg_pool2d(windows.padded(x), op.kernel, op.strides, "VALID")
        return mean * (share * float(np.prod(op.kernel))), back_mean

    padded = windows.padded(x, float(np.finfo(np.float32).min))
    y = tf.nn.max_pool2d(padded, op.kernel, op.strides, "VALID")

    def back_max(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        free, parts = tf.ones_like(y), []
        for i, j in windows.places:  # of equal elements the first one takes the gradient
            largest = free * tf.cast(tf.equal(windows.elements(padded, i, j), y), tf.float32)
            free -= largest
            parts.append(windows.lay(windows.spread(d * largest), i, j))
        return [_cut(tf.add_n(parts), windows.around)], []

    return y, back_max


def _layer_norm(tf: Any, op: Op, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Backward]:
    """x [1, h, w, c], gamma and beta [c]."""
    apart = x - tf.reduce_mean(x, -1, keepdims=True)
    inverse = tf.math.rsqrt(tf.reduce_mean(apart * apart, -1, keepdims=True) + op.epsilon)
    normal = apart * inverse

    def back(d: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scaled = d * gamma
        along = normal * tf.reduce_mean(scaled * normal, -1, keepdims=True)
        dx = inverse * (scaled - tf.reduce_mean(scaled, -1, keepdims=True) - along)
        return [dx], [tf.reduce_sum(d * normal, [0, 1, 2]), tf.reduce_sum(d, [0, 1, 2])]

    return normal * gamma + beta, back


class _Windows:
    """An operation's windows over [1, h, w, c], one place in them at a time: a place's elements of all windows are a
    tensor [1, out h, out w, c]. places: (row, column) of each; around: the padding before and behind each axis."""

    def __init__(self, tf: Any, op: Op, x: Any, y: list[int]) -> None:
        self.tf, self.op = tf, op
        self.around = _padding(op, x, y)
        self.size = [n + sum(pads) for n, pads in zip(x[1:3], self.around[1:3], strict=True)]
        self.places = [(i, j) for i in range(op.kernel[0]) for j in range(op.kernel[1])]
        self.out = y[1:3]

    def padded(self, x: Tensor, value: float = 0.0) -> Tensor:
        return self.tf.pad(x, self.around, constant_values=value)

    def elements(self, padded: Any, i: int, j: int) -> Any:
        (oh, ow), (sh, sw), (dh, dw) = self.out, self.op.strides, self.op.dilation
        top, left = i * dh, j * dw
        return padded[:, top : top + (oh - 1) * sh + 1 : sh, left : left + (ow - 1) * sw + 1 : sw, :]

    def spread(self, d: Tensor) -> Tensor:
        """d with zeros between its elements, as far apart as the windows."""
        tf, (oh, ow), (sh, sw), c = self.tf, self.out, self.op.strides, d.shape[3]
        d = tf.pad(tf.reshape(d, [oh, 1, ow * c]), [[0, 0], [0, sh - 1], [0, 0]])
        d = tf.pad(tf.reshape(d, [oh * sh * ow, 1, c]), [[0, 0], [0, sw - 1], [0, 0]])
        return tf.reshape(d, [1, oh * sh, ow * sw, c])[:, : (oh - 1) * sh + 1, : (ow - 1) * sw + 1, :]

    def lay(self, d: Tensor, i: int, j: int) -> Tensor:
        """A spread gradient at place (i, j) of every window."""
        top, left = i * self.op.dilation[0], j * self.op.dilation[1]
        bottom, right = self.size[0] - top - d.shape[1], self.size[1] - left - d.shape[2]
        return self.tf.pad(d, [[0, 0], [top, bottom], [left, right], [0, 0]])


def _padding(op: Op, x: Any, y: list[int]) -> list[list[int]]:
    """What lies around a tensor [1, h, w, c] for its windows to give one of shape y."""
    around = [[0, 0], [0, 0], [0, 0], [0, 0]]
    for axis, (k, s, d, before) in enumerate(zip(op.kernel, op.strides, op.dilation, op.pads, strict=True), start=1):
        around[axis] = [before, max((y[axis] - 1) * s + (k - 1) * d + 1 - x[axis] - before, 0)]
    return around


def _cut(x: Tensor, padding: list[list[int]]) -> Tensor:
    """x without its padding."""
    return x[tuple(slice(before, n - behind) for n, (before, behind) in zip(x.shape, padding, strict=True))]
