"""The C engine's outputs, losses and gradients against TensorFlow's, in float64, on random networks."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from edge.learner import MoteLearner
from edge.program import AvgPool2D, Conv2D, Dense, Flatten, Layer, Loss, MaxPool2D, Program, ReLU, Tanh, build

tf = pytest.importorskip("tensorflow", reason="compares with TensorFlow, which is not installed")

#: A power of two, so that multiplying by it is exact, and large, so that w - rate * g keeps all the digits of g.
RATE = 1024.0
TOLERANCE = 1e-5
EPSILON = float(np.finfo(np.float32).eps) / 2


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[Layer], tuple[int, ...], Loss]:
    """A random straight line of layers, the shape of its input, and its loss."""
    layers: list[Layer] = []
    activations: st.SearchStrategy[list[Layer]] = st.sampled_from([[], [ReLU()], [Tanh()]])
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 3))
    if draw(st.booleans()):
        shape = draw(st.tuples(st.integers(6, 9), st.integers(6, 9), st.integers(1, 5)))
        h, w = shape[:2]
        for _ in range(draw(st.integers(1, 3))):
            kernel, strides = draw(sizes), draw(sizes)
            padding = draw(st.sampled_from(["valid", "same"]))
            if padding == "valid" and (kernel[0] > h or kernel[1] > w):
                continue
            kind = draw(st.sampled_from(["conv", "conv", "avg", "max"]))
            if kind == "conv":
                layers += [Conv2D(draw(st.integers(1, 6)), kernel, strides, padding), *draw(activations)]
            else:
                layers += [(AvgPool2D if kind == "avg" else MaxPool2D)(kernel, strides, padding)]
            h, w = (
                -(-n // s) if padding == "same" else (n - k) // s + 1
                for n, k, s in zip((h, w), kernel, strides, strict=True)
            )
        layers.append(Flatten())
    else:
        shape = (draw(st.integers(1, 40)),)
    for _ in range(draw(st.integers(0, 2))):
        layers += [Dense(draw(st.integers(1, 17))), *draw(activations)]
    layers += [Dense(draw(st.integers(2, 10)))]
    return layers, shape, draw(st.sampled_from(["softmax_cross_entropy", "mse"]))


def random_weights(program: Program, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights that keep values of about 1 through the layers, and biases that are not 0."""
    return {
        name: random.normal(0, 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.5, shape).astype(np.float32)
        for name, shape in program.all_parameters
    }


def reference(layers, x, y, loss, weights):
    """Output, loss and gradients by name, in float64; and how near a ReLU or a maximum came to tipping over."""
    variables = {name: tf.Variable(w, dtype=tf.float64) for name, w in weights.items()}
    arrays = iter(variables.values())
    margin = np.inf
    with tf.GradientTape() as tape:
        v = tf.constant(x[None], tf.float64)
        for layer in layers:
            match layer:
                case Dense():
                    v = tf.matmul(v, next(arrays), transpose_b=True) + next(arrays)
                case Conv2D():
                    filters = tf.transpose(next(arrays), [1, 2, 3, 0])
                    v = tf.nn.conv2d(v, filters, layer.strides, layer.padding.upper()) + next(arrays)
                case AvgPool2D():
                    v = tf.nn.avg_pool2d(v, layer.size, layer.strides, layer.padding.upper())
                case MaxPool2D():
                    values = np.unique(v.numpy())
                    margin = min(margin, np.diff(values).min(initial=np.inf))
                    v = tf.nn.max_pool2d(v, layer.size, layer.strides, layer.padding.upper())
                case Flatten():
                    v = tf.reshape(v, [1, -1])
                case ReLU():
                    margin = min(margin, np.abs(v.numpy()).min())
                    v = tf.nn.relu(v)
                case Tanh():
                    v = tf.tanh(v)
        if loss == "mse":
            value, output = tf.reduce_mean((v[0] - y) ** 2), v[0]
        else:
            value, output = tf.nn.sparse_softmax_cross_entropy_with_logits(y, v[0]), tf.nn.softmax(v[0])
    return output.numpy(), float(value), tape.gradient(value, variables), margin


def relative_error(got, wanted) -> float:
    """The largest difference, of the largest element."""
    largest = np.abs(wanted).max()
    return float(np.abs(got - wanted).max() / largest) if largest else float(np.abs(got).max())


worst = {"output": 0.0, "loss": 0.0, "gradient": 0.0}


@settings(
    max_examples=int(os.environ.get("TINYFLEET_GRADIENT_EXAMPLES", "120")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(networks(), st.integers(0, 2**32 - 1))
def test_gradients_are_tensorflows(network, seed):
    """One step at a known rate changes every weight that trains by the rate times TensorFlow's gradient, and no other:
    not those frozen by the plan, nor those masked out at run time."""
    layers, shape, loss = network
    random = np.random.default_rng(seed)
    weights = random_weights(build(layers, shape, loss), random)
    x = random.normal(size=shape).astype(np.float32)
    outputs = layers[-1].units
    y = random.integers(outputs) if loss == "softmax_cross_entropy" else random.normal(size=outputs).astype(np.float32)
    output, value, gradients, margin = reference(layers, x, y, loss, weights)
    assume(margin > 1e-5)  # else float32 may see a ReLU or a maximum on the other side than float64
    assume(value > 0.05)  # a gradient p - 1 of a p that is nearly 1 has few digits in float32
    # Where rounding the weights and the input already moves a gradient (sums that cancel), float32 has few digits too.
    rounded = {name: w * (1 + EPSILON * random.choice([-1, 1], w.shape)) for name, w in weights.items()}
    _, _, moved, _ = reference(layers, x * (1 + EPSILON * random.choice([-1, 1], x.shape)), y, loss, rounded)
    assume(all(relative_error(moved[name].numpy(), g.numpy()) < TOLERANCE / 20 for name, g in gradients.items()))

    role = random.choice(["frozen", "masked", "trains", "trains"], len(weights) // 2)
    program = build(layers, shape, loss, trainable=np.flatnonzero(role != "frozen").tolist(), weights=weights)
    learner = MoteLearner(program)
    learner.mask = sum(1 << int(i) for i in np.flatnonzero(role == "trains"))
    before = learner.parameters
    worst["output"] = max(worst["output"], relative_error(learner.infer(x), output))
    worst["loss"] = max(worst["loss"], abs(learner.loss(x, y) - value) / max(value, 1.0))
    learner.learn(x, y, RATE)
    change = program.split((before.astype(np.float64) - learner.parameters) / RATE)
    for name, got in change.items():
        trains = role[int(name.rpartition("/")[0].rpartition("_")[2])] == "trains"
        error = relative_error(got, gradients[name].numpy()) if trains else np.abs(got).max()
        worst["gradient"] = max(worst["gradient"], error)
        assert error < TOLERANCE, name
    assert worst["output"] < TOLERANCE
    assert worst["loss"] < TOLERANCE
