"""The C engine's outputs, losses and gradients against TensorFlow's, in float64, on random graphs."""

from __future__ import annotations

import os
from dataclasses import replace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, event, example, given, settings
from hypothesis import strategies as st
from nets import ACTIVATIONS, graphs, with_weights

from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.memory_plan import WEIGHTED

tf = pytest.importorskip("tensorflow", reason="compares with TensorFlow, which is not installed")

#: A power of two, so that multiplying by it is exact, and large, so that w - rate * g keeps all the digits of g.
RATE = 1024.0
TOLERANCE = 1e-5
EPSILON = float(np.finfo(np.float32).eps) / 2


class Reference:
    """A graph in TensorFlow: output, loss and gradients by the engine's names, in float64; and how near a ReLU or a
    maximum came to tipping over."""

    def __init__(self, graph: Graph, x: np.ndarray, y: np.ndarray) -> None:
        self.graph, self.margin = graph, np.inf
        weighted = [op for op in graph.ops if op.kind in WEIGHTED]
        self.variables = {
            f"{op.kind.name.lower()}_{i}/{part}": tf.Variable(getattr(op, part), dtype=tf.float64)
            for i, op in enumerate(weighted)
            for part in ("weights", "bias")
        }
        self.arrays = iter(self.variables.values())
        with tf.GradientTape() as tape:
            logits = self.run(x)
            value, output = self.loss(logits, y)
        # A weight that has no influence has no gradient in TensorFlow.
        found = tape.gradient(value, self.variables, unconnected_gradients="zero")
        self.gradients = {name: np.asarray(g) for name, g in found.items()}
        self.output, self.value = output.numpy(), float(value)

    def run(self, x: np.ndarray) -> tf.Tensor:
        values = {0: tf.constant(x, tf.float64)}

        def value(index: int) -> tf.Tensor:
            tensor = self.graph.tensors[index]
            return values[index] if tensor.view_of is None else tf.reshape(value(tensor.view_of), tensor.shape)

        for op in self.graph.ops:
            shape = self.graph.tensors[op.output].shape
            result = self.apply(op, [value(i) for i in op.inputs], shape)
            # What several places fill is their sum: each is 0 where the others are.
            values[op.output] = values[op.output] + result if op.output in values else result
        return tf.reshape(value(self.graph.output), [-1])

    def apply(self, op: Op, inputs: list[tf.Tensor], shape: tuple[int, ...]) -> tf.Tensor:
        x = inputs[0]
        match op.kind:
            case Kind.DENSE:
                return tf.reshape(tf.linalg.matvec(next(self.arrays), tf.reshape(x, [-1])) + next(self.arrays), shape)
            case Kind.CONV2D:
                filters = tf.transpose(next(self.arrays), [1, 2, 3, 0])
                filters = tf.reshape(filters, [-1, *filters.shape[2:]])
                return tf.einsum("thwi,tio->hwo", self.taps(op, x, shape, 0.0), filters) + next(self.arrays)
            case Kind.DEPTHWISE:
                taps = tf.repeat(self.taps(op, x, shape, 0.0), shape[2] // x.shape[2], 3)
                filters = tf.reshape(next(self.arrays), [-1, 1, 1, shape[2]])
                return tf.reduce_sum(taps * filters, 0) + next(self.arrays)
            case Kind.AVGPOOL:
                count = tf.reduce_sum(self.taps(op, tf.ones_like(x), shape, 0.0), 0)
                return tf.reduce_sum(self.taps(op, x, shape, 0.0), 0) / count
            case Kind.MAXPOOL:
                taps = self.taps(op, x, shape, -np.inf)
                top = tf.reduce_max(taps, 0)
                self.near(np.where(taps < top, top - taps, np.inf))
                return top
            case Kind.LAYERNORM:
                mean, variance = tf.nn.moments(x, 2, keepdims=True)
                return next(self.arrays) * (x - mean) / tf.sqrt(variance + op.epsilon) + next(self.arrays)
            case Kind.ADD:
                return x + inputs[1]
            case Kind.PLACE:
                sides = [(at, n - at - size) for at, n, size in zip(op.offsets, shape, x.shape, strict=True)]
                return tf.pad(x, sides)
            case Kind.RELU | Kind.RELU6 | Kind.LEAKY_RELU:
                self.near(np.abs(x)[x != 0])
                if op.kind == Kind.RELU6:
                    self.near(np.abs(x - 6))
                    return tf.nn.relu6(x)
                return tf.nn.leaky_relu(x, op.slope) if op.kind == Kind.LEAKY_RELU else tf.nn.relu(x)
            case Kind.TANH:
                return tf.tanh(x)
            case Kind.SIGMOID:
                return tf.sigmoid(x)
            case Kind.SOFTMAX:
                return tf.nn.softmax(x)
        raise AssertionError(op.kind)

    def near(self, distances: np.ndarray) -> None:
        self.margin = min(self.margin, np.min(distances, initial=np.inf))

    @staticmethod
    def taps(op: Op, x: tf.Tensor, shape: tuple[int, ...], fill: float) -> tf.Tensor:
        """[taps, h, w, c]: what each of the kernel's taps sees at every place of the output."""
        pads = [
            (before, max(0, (n - 1) * s + (k - 1) * d + 1 - size - before))
            for before, n, s, k, d, size in zip(
                op.pads, shape, op.strides, op.kernel, op.dilation, x.shape, strict=False
            )
        ]
        padded = tf.pad(x, [*pads, (0, 0)], constant_values=fill)
        (h, w), (sh, sw), (dh, dw) = shape[:2], op.strides, op.dilation
        return tf.stack(
            [
                padded[i * dh : i * dh + (h - 1) * sh + 1 : sh, j * dw : j * dw + (w - 1) * sw + 1 : sw]
                for i in range(op.kernel[0])
                for j in range(op.kernel[1])
            ]
        )

    def loss(self, z: tf.Tensor, y: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
        """The loss and the model's output."""
        match self.graph.loss:
            case "softmax_cross_entropy":
                return tf.nn.sparse_softmax_cross_entropy_with_logits(int(y), z), tf.nn.softmax(z)
            case "binary_cross_entropy":
                return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(np.float64(y), z)), tf.sigmoid(z)
            case "mse":
                return tf.reduce_mean((z - y) ** 2), z
        size, delta = tf.abs(z - y), self.graph.huber_delta
        return tf.reduce_mean(tf.where(size <= delta, size**2 / 2, delta * (size - delta / 2))), z


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, of the largest element."""
    largest = np.abs(wanted).max()
    return float(np.abs(got - wanted).max() / largest) if largest else float(np.abs(got).max())


def moved(graph: Graph, random: np.random.Generator) -> Graph:
    """The graph with every weight moved by half of its last place."""

    def around(array: np.ndarray) -> np.ndarray:
        return array * (1 + EPSILON * random.choice([-1, 1], array.shape))

    return replace(
        graph,
        ops=tuple(
            replace(op, weights=around(op.weights), bias=around(op.bias)) if op.kind in WEIGHTED else op
            for op in graph.ops
        ),
    )


def target(graph: Graph, random: np.random.Generator) -> np.ndarray:
    size = graph.tensors[graph.output].size
    if graph.loss == "softmax_cross_entropy":
        return np.float32(random.integers(size))
    if graph.loss == "binary_cross_entropy":
        return random.random(size, np.float32)
    return random.normal(size=size).astype(np.float32)


def many_readers() -> Graph:
    """A layer whose output every operation that trains nothing reads, and sums read too: all but one of them add to
    what others have written of its gradient."""
    tensors = [Tensor((2, 2, 3)), Tensor((2, 2, 3))]
    ops = [Op(Kind.CONV2D, "all", (0,), 1, (1, 1), (1, 1), (1, 1), trains="all")]

    def add(kind: Kind, *inputs: int, **fields: object) -> int:
        tensors.append(Tensor((2, 2, 3)))
        ops.append(Op(kind, kind.name, inputs, len(tensors) - 1, **fields))  # type: ignore[arg-type]
        return len(tensors) - 1

    total = add(Kind.ADD, 1, 1)
    for kind in ACTIVATIONS:
        total = add(Kind.ADD, total, add(kind, 1, slope=0.25 if kind == Kind.LEAKY_RELU else 0.0))
    window = {"kernel": (3, 3), "strides": (1, 1), "dilation": (1, 1), "pads": (1, 1)}
    for kind in (Kind.AVGPOOL, Kind.MAXPOOL, Kind.CONV2D, Kind.DEPTHWISE):
        trains = "all" if kind in WEIGHTED else "nothing"
        total = add(Kind.ADD, total, add(kind, 1, trains=trains, **window))
    total = add(Kind.ADD, total, add(Kind.LAYERNORM, 1, epsilon=0.01, trains="all"))
    total = add(Kind.ADD, total, 1)
    tensors += [Tensor((1, 1, 12), view_of=total), Tensor((1, 1, 3))]
    ops.append(Op(Kind.DENSE, "head", (len(tensors) - 2,), len(tensors) - 1, trains="all"))
    return Graph(tuple(tensors), tuple(ops), len(tensors) - 1, "mse")


@settings(
    max_examples=int(os.environ.get("TINYFLEET_GRADIENT_EXAMPLES", "100")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@example(many_readers(), 9)  # of which all layers learn
@given(graphs(), st.integers(0, 2**32 - 1))
def test_gradients_are_tensorflows(graph: Graph, seed: int) -> None:
    """One step at a known rate changes every parameter that trains by the rate times TensorFlow's gradient, and no
    other: not those masked out at run time, nor the weights where only the bias trains now. So does a step whose
    gradient is clipped to half of its norm, by half of that."""
    random = np.random.default_rng(seed)
    graph = with_weights(graph, random)
    x = random.normal(size=graph.tensors[0].shape).astype(np.float32)
    y = target(graph, random)
    wanted = Reference(graph, x, y)
    assume(wanted.margin > 1e-5)  # else float32 may see a ReLU or a maximum on the other side than float64
    assume(wanted.value > 0.05)  # a gradient p - 1 of a p that is nearly 1 has few digits in float32

    program = assemble(graph)
    learner = MoteLearner(program)
    names = list(dict.fromkeys(name.rpartition("/")[0] for name, _ in program.parameters))
    role = dict(zip(names, random.choice(["masked", "bias", "all", "all"], len(names)), strict=True))
    trains = {
        name
        for name, _ in program.parameters
        if role[name.rpartition("/")[0]] == "all"
        or (role[name.rpartition("/")[0]] == "bias" and name.endswith("/bias"))
    }
    # Where rounding the weights and the input already moves a gradient (sums that cancel), float32 has few digits too.
    for _ in range(3):
        rounded = Reference(moved(graph, random), x * (1 + EPSILON * random.choice([-1, 1], x.shape)), y)
        assume(all(relative_error(rounded.gradients[n], wanted.gradients[n]) < TOLERANCE / 20 for n in trains))
    for op in graph.ops:
        event(op.kind.name)

    learner.mask = sum(1 << i for i, name in enumerate(names) if role[name] != "masked")
    learner.biases_only = sum(1 << i for i, name in enumerate(names) if role[name] == "bias")
    before = learner.parameters
    assert relative_error(learner.infer(x), wanted.output) < TOLERANCE
    assert abs(learner.loss(x, y) - wanted.value) < TOLERANCE * max(wanted.value, 1.0)

    def check(learner: MoteLearner, scale: float) -> None:
        learner.learn(x, y, RATE)
        change = program.split((before.astype(np.float64) - learner.parameters) / RATE)
        for name, got in change.items():
            if name in trains:
                assert relative_error(got, scale * wanted.gradients[name]) < TOLERANCE, name
            else:
                assert not got.any(), name

    check(learner, 1.0)
    norm = np.sqrt(sum(np.sum(wanted.gradients[name] ** 2) for name in trains))
    if norm > 1e-3:
        clipped = MoteLearner(program, clip_norm=norm / 2)
        clipped.mask, clipped.biases_only = learner.mask, learner.biases_only
        check(clipped, 0.5)
