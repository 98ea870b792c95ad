"""Meta-training without a fleet: many clients at once, as one more axis of every tensor, in one compiled loop.

Written on Keras 3: TensorFlow, or JAX with KERAS_BACKEND=jax. A client's parameters are its program's vector, so that
starts go to devices, and come from them, as they are. What a round means is what the strategies say. `exact` runs
the C engine instead: the same bits as on the devices.

Importing this imports Keras and its backend, which takes seconds; nothing that a device or a run needs does so.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # type: ignore[import-untyped]
from keras import ops
from tinyfleet.edge.device.node import OUT_BYTES
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import Kind, Op, Shape3
from tinyfleet.edge.model.learner import MoteLearner, learn_many
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Draw, Split, Task
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.messages import (
    ALL_LAYERS,
    Dense,
    ErrorCode,
    Failure,
    Metrics,
    Phase,
    Sparse,
    Success,
    TrainTask,
    UpdateFormat,
    encode,
)
from tinyfleet.edge.wire.updates import HEAD_BYTES, dense_parts, sparse_parts, varint_sizes
from tinyfleet.server.evaluate import endless, seeds_of
from tinyfleet.server.flower.strategies import TinyMetaFed
from tinyfleet.server.flower.strategies.reptile import draw_nodes, task_seed
from tinyfleet.server.training_run import META_STRATEGIES, random_initialization, strategy

Vector = NDArray[np.float32]
Floats = NDArray[np.float32]
Targets = NDArray[Any]
Tensor = Any
"""Of Keras's backend."""

EPSILON = 1e-3  # of batch normalisation, as in Keras
ADAM_DECAY, ADAM_EPSILON = 0.999, 1e-8  # beta2 of Kingma and Ba, 2015; beta1 is 0 here
ALL = UpdateFormat()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ROOM = OUT_BYTES - HEAD_BYTES  # for values and gaps in one part of a reply, as a node sends it
ID = 1 << 31  # as long as numbers drawn from 32 bits are, all but one in 65,536


# The backend: all that Keras itself does not have

if keras.backend.backend() == "jax":
    import jax

    def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function)

    def _gradients(loss: Callable[[Any], Tensor], at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Losses [clients], and of each its gradients: no loss depends on another client's parameters."""

        def total(at: list[Tensor]) -> tuple[Tensor, Tensor]:
            losses = loss(at)
            return ops.sum(losses), losses

        (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(at)
        return losses, gradients

else:
    import tensorflow as tf  # type: ignore[import-untyped]

    def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = tf.function(function, jit_compile=True, autograph=False)
        return compiled

    def _gradients(loss: Callable[[Any], Tensor], at: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Losses [clients], and of each its gradients: no loss depends on another client's parameters."""
        with tf.GradientTape() as tape:
            tape.watch(at)
            losses = loss(at)
        return losses, tape.gradient(losses, at)


def devices() -> list[str]:
    """The devices that the work is shared by: all accelerators, or else the processor."""
    found = keras.distribution.list_devices()
    accelerators = [name for name in found if not name.startswith("cpu")]
    return accelerators or found


# Models


@dataclass(frozen=True, eq=False)
class Network:
    """A model as tensors with a client axis.

    shapes: of its parameter arrays, in the order of the vector; layers: which bit of a mask each belongs to.
    apply: (arrays [clients, ...], x [clients, samples, h, w, c]) -> [clients, samples, outputs] (logits under a
    cross-entropy). work: multiply-adds of one inference.
    """

    input_shape: Shape3
    outputs: int
    loss: Literal["softmax_cross_entropy", "mse"]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    apply: Callable[[list[Tensor], Tensor], Tensor]
    work: int

    @cached_property
    def n_params(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, vectors: Tensor) -> list[Tensor]:
        """[clients, n_params] as arrays [clients, *shape]."""
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes))
        parts = zip([0, *ends], ends, self.shapes, strict=False)
        return [ops.reshape(vectors[:, first:end], (vectors.shape[0], *shape)) for first, end, shape in parts]

    def chosen(self, mask: int) -> NDArray[np.bool_]:
        """[n_params]: which parameters belong to the layers of a mask."""
        return np.repeat(self._bits(mask), [math.prod(shape) for shape in self.shapes])

    def _bits(self, mask: int) -> NDArray[np.bool_]:
        return np.array([bool(mask >> layer & 1) for layer in self.layers])


Layer = Callable[[list[Tensor], Tensor], Tensor]
"""([arrays of the layer], x) -> y, both [clients, samples, h, w, c]."""


def _windows(op: Op, x: Tensor, y_shape: Shape3, fill: float = 0.0) -> list[Tensor]:
    """What every place of the kernel sees: kernel h * kernel w tensors [clients, samples, rows, columns, c]."""
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


def _dense(weights: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x [clients, n, inputs] by weights [clients, units, inputs]."""
    if weights.shape[2] == 1:  # outer products and sums fuse with what is around them, products of matrices do not
        return x * weights[:, None, :, 0] + bias[:, None]
    if weights.shape[1] == 1:
        return ops.sum(x * weights, axis=2, keepdims=True) + bias[:, None]
    return ops.matmul(x, ops.transpose(weights, (0, 2, 1))) + bias[:, None]


def _conv(op: Op, y_shape: Shape3, arrays: list[Tensor], x: Tensor) -> Tensor:
    """As a product of matrices: every client has filters of its own, which grouped convolutions are slow at."""
    clients, samples = x.shape[:2]
    patches = ops.concatenate(_windows(op, x, y_shape), axis=-1)
    weights = ops.reshape(arrays[0], (clients, y_shape[2], -1))
    return ops.reshape(
        _dense(weights, arrays[1], ops.reshape(patches, (clients, -1, patches.shape[-1]))),
        (clients, samples, *y_shape),
    )


def _depthwise(op: Op, y_shape: Shape3, arrays: list[Tensor], x: Tensor) -> Tensor:
    weights = ops.reshape(arrays[0], (x.shape[0], -1, 1, 1, 1, y_shape[2]))
    windows = _windows(op, ops.repeat(x, y_shape[2] // x.shape[-1], axis=-1), y_shape)
    return sum(window * weights[:, i] for i, window in enumerate(windows)) + arrays[1][:, None, None, None]


def _max_pool(op: Op, y_shape: Shape3, x: Tensor) -> Tensor:
    """Among equals the first gets the gradient, as in the engine."""
    first, *others = _windows(op, x, y_shape, -math.inf)
    for other in others:
        first = ops.where(other > first, other, first)
    return first


def _average_pool(op: Op, y_shape: Shape3, x: Tensor) -> Tensor:
    inside = ops.ones((1, 1, *x.shape[2:4], 1), x.dtype)
    return sum(_windows(op, x, y_shape)) / sum(_windows(op, inside, y_shape))


def _layer(op: Op, x_shape: Shape3, y_shape: Shape3) -> Layer:
    def flat(arrays: list[Tensor], x: Tensor) -> Tensor:
        return _dense(arrays[0], arrays[1], ops.reshape(x, (*x.shape[:2], -1)))[:, :, None, None]

    match op.kind:
        case Kind.DENSE:
            return flat
        case Kind.CONV2D:
            return lambda arrays, x: _conv(op, y_shape, arrays, x)
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
        f"meta-training has no {op.kind.name.lower()} layer; it has dense, conv2d, depthwise, pools, relu, relu6, tanh "
        "and sigmoid. Train this model on devices, or with exact=True"
    )


@lru_cache
def network(program: Program) -> Network:
    """A program's model. Raises UserError if it has layers, a loss or frozen parameters that are not known here."""
    if program.loss not in ("softmax_cross_entropy", "mse"):
        raise UserError(f"meta-training has softmax_cross_entropy and mse; this model's loss is {program.loss}")
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
    work = sum(info.macs for info in program.layers)
    return Network(program.input.shape, program.output.size, program.loss, shapes, layers, apply, work)


def omniglot_network(ways: int = 5) -> Network:
    """The network that Reptile was published with on Omniglot (Nichol et al. 2018): 113,221 parameters for five ways.

    Four times: 64 filters 3x3 with stride 2, batch normalisation by the batch's own statistics (so the score is
    transductive: it depends on which queries are asked together), ReLU; then a dense layer.
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
            x = _conv(op, y_shape, [kernel, bias], x)
            mean, variance = ops.moments(x, axes=(1, 2, 3), keepdims=True)
            scale = gamma[:, None, None, None] * ops.rsqrt(variance + EPSILON)
            x = ops.relu((x - mean) * scale + beta[:, None, None, None])
        return _dense(arrays[-2], arrays[-1], ops.reshape(x, (*x.shape[:2], -1)))

    layers = (*(i // 4 for i in range(16)), 4, 4)
    work = sum(math.prod(y) * 9 * c for (_, y), c in zip(convs, channels, strict=False)) + 256 * ways
    return Network((28, 28, 1), ways, "softmax_cross_entropy", tuple(shapes), layers, apply, work)


def omniglot_initialization(model: Network, seed: int) -> Vector:
    """Its first parameters: weights uniform after Glorot and Bengio 2010, gamma 1, the rest 0."""
    random, arrays = np.random.default_rng(seed), list[NDArray[Any]]()
    for i, shape in enumerate(model.shapes):
        if len(shape) == 1:
            arrays.append(np.full(shape, float(i % 4 == 2 and i < 16)))
        else:
            limit = math.sqrt(6 / ((shape[0] + shape[-1]) * math.prod(shape[1:-1])))
            arrays.append(random.uniform(-limit, limit, shape))
    initialization: Vector = np.concatenate([array.ravel() for array in arrays]).astype(np.float32)
    return initialization


# Adaptation


@dataclass(frozen=True)
class Moments:
    """Of Adam without its first moment: the mean square of gradients [n_params], after so many steps. They last from
    round to round, as in supervised-reptile, which visits one task after the other; here it is the tasks' mean."""

    squares: Vector
    steps: int = 0


@dataclass(frozen=True)
class AdaptResult:
    """parameters: [clients, n_params]. losses: [clients, steps], each before its step. before: the parameters before
    the last step, if asked for. moments: Adam's, if it was used."""

    parameters: Floats
    losses: Floats
    before: Floats | None = None
    moments: Moments | None = None


class Backend:
    """Adapts and scores many clients of one model at once.

    precision: "mixed" computes in bfloat16 and keeps parameters in float32. exact: by the C engine, sample by sample,
    to the bit as devices do; it takes a program, a batch of 1, and neither FedProx nor Adam.
    """

    def __init__(
        self, model: Program | Network, *, precision: Literal["float32", "mixed"] = "float32", exact: bool = False
    ) -> None:
        if exact and not isinstance(model, Program):
            raise UserError("exact training takes a program for the engine; build one with edge.program.build")
        self.model = model
        self.network = network(model) if isinstance(model, Program) else model
        self.precision = precision
        self.exact = exact
        self.devices = ["the C engine"] if exact else devices()
        self._learners: list[MoteLearner] = []
        self._compiled: set[tuple[object, ...]] = set()

    def adapt(
        self,
        starts: Floats,
        x: Floats,
        y: Targets,
        phases: Sequence[Phase],
        *,
        batch: int = 1,
        order: NDArray[Any] | None = None,
        proximal: float = 0.0,
        moments: Moments | None = None,
        keep: int = 0,
    ) -> AdaptResult:
        """Every client learns through the phases by gradient descent on the mean loss of a batch.

        starts: [n_params], or one each: [clients, n_params]. x: [clients, samples, ...]; y: [clients, samples] of
        classes, or [clients, samples, outputs]. order: which samples each step takes, [clients, steps, batch]; by
        default one after the other, and again from the first. proximal: FedProx's mu (Li et al. 2020). moments: use
        Adam. keep: also return the parameters before so many of the last steps.

        A shape that has not been seen before is compiled first. Raises UserError for shapes that do not fit.
        """
        net, (clients, samples) = self.network, x.shape[:2]
        steps = sum(phase.steps for phase in phases)
        x = np.asarray(x, np.float32).reshape(clients, samples, -1)
        starts = np.broadcast_to(np.asarray(starts, np.float32), (clients, net.n_params))
        if x.shape[2] != math.prod(net.input_shape) or not samples:
            raise UserError(f"the samples have {x.shape[2]} features; this model takes {math.prod(net.input_shape)}")
        if net.loss == "mse":
            y = np.asarray(y, np.float32).reshape(clients, samples, net.outputs)
        if order is None:
            rows = np.arange(steps * batch).reshape(steps, batch) % samples
            order = np.broadcast_to(rows, (clients, steps, batch))
        if order.shape != (clients, steps, batch):
            raise UserError(f"the order has the shape {order.shape}; it must be {(clients, steps, batch)}")
        if not steps:
            return AdaptResult(starts.copy(), np.zeros((clients, 0), np.float32), moments=moments)
        if self.exact:
            if batch > 1 or proximal or moments or keep:
                raise UserError("the engine takes one sample a step, by plain gradient descent; leave out exact")
            return self._exactly(starts, x, y, order[:, :, 0], phases)
        rates = np.concatenate([np.full(p.steps, p.rate, np.float32) for p in phases])
        masks = np.concatenate([np.tile(net._bits(p.layers), (p.steps, 1)) for p in phases])
        squares = np.zeros(net.n_params if moments else 0, np.float32) if moments is None else moments.squares
        taken = np.int32(0 if moments is None else moments.steps)
        shared = (rates[:, None] * masks, np.float32(proximal), squares, taken)
        loop = _loop(net, self.precision, moments is not None, bool(proximal), keep)
        parts = self._on_each(
            clients,
            (x.shape, order.shape, moments is not None, bool(proximal), keep),
            lambda part: loop(starts[part], x[part], y[part], _flat(order[part], samples), *shared),
        )
        learned, losses, before, squares = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return AdaptResult(
            learned, losses, before if keep else None,
            Moments(squares.mean(0), int(taken) + steps) if moments is not None else None,
        )  # fmt: skip

    def predict(self, parameters: Floats, x: Floats) -> Floats:
        """Outputs [clients, samples, outputs] (logits under a cross-entropy) of each client on samples of its own."""
        clients, samples = x.shape[:2]
        if self.exact:
            assert isinstance(self.model, Program)
            return np.stack(
                [
                    [learner.infer(sample) for sample in own]
                    for learner, own in zip(self._set(parameters), x, strict=True)
                ]
            )
        x = np.asarray(x, np.float32).reshape(clients, samples, -1)
        forward = _forward(self.network, self.precision)
        return np.concatenate(self._on_each(clients, x.shape, lambda part: forward(parameters[part], x[part])))

    def _on_each(self, clients: int, shape: tuple[object, ...], work: Callable[[slice], Any]) -> list[Any]:
        """Every device does its share of the clients; arrays as NumPy's. shape: of the work, compiled once for each.

        A processor's cores are such devices where there are clients enough: its compiler keeps small products of
        matrices on one core.
        """
        places = self.devices
        if places == ["cpu:0"] and clients >= 16 * CORES and clients % CORES == 0:
            places = places * CORES
        edges = np.linspace(0, clients, min(len(places), clients) + 1).astype(int).tolist()

        def on(job: tuple[str, slice]) -> Any:
            with keras.device(job[0]):
                return keras.tree.map_structure(ops.convert_to_numpy, work(job[1]))

        jobs = list(zip(places, map(slice, edges, edges[1:]), strict=False))
        alone = len(jobs) if len(jobs) == 1 else int((clients, *shape) not in self._compiled)
        self._compiled.add((clients, *shape))  # else several threads would compile the same
        done = [on(job) for job in jobs[:alone]]
        if jobs[alone:]:
            with ThreadPoolExecutor(len(jobs)) as pool:
                done += pool.map(on, jobs[alone:])
        return done

    def _set(self, parameters: Floats) -> list[MoteLearner]:
        """A learner of the engine for each client, with its parameters."""
        assert isinstance(self.model, Program)
        self._learners += [MoteLearner(self.model) for _ in range(len(parameters) - len(self._learners))]
        for learner, vector in zip(self._learners, parameters, strict=False):
            learner.set_parameters(vector)
        return self._learners[: len(parameters)]

    def _exactly(
        self, starts: Floats, x: Floats, y: Targets, order: NDArray[Any], phases: Sequence[Phase]
    ) -> AdaptResult:
        learners, losses, first = self._set(starts), list[Floats](), 0
        trainable = (1 << max(self.network.layers) + 1) - 1
        for phase in phases:
            for learner in learners:
                learner.mask = phase.layers & trainable
            rows = order[:, first : first + phase.steps]
            taken = np.arange(len(x))[:, None]
            if phase.steps:
                losses.append(learn_many(learners, x[taken, rows], y[taken, rows], phase.rate))
            first += phase.steps
        for learner in learners:
            learner.mask = trainable
        return AdaptResult(np.stack([learner.parameters for learner in learners]), np.concatenate(losses, 1))


def _flat(order: NDArray[Any], samples: int) -> NDArray[np.int32]:
    """[clients, steps, batch] -> [steps, clients * batch], as rows of [clients * samples]."""
    rows = order + np.arange(len(order))[:, None, None] * samples
    return np.ascontiguousarray(rows.transpose(1, 0, 2), np.int32).reshape(order.shape[1], -1)


def _losses(net: Network, outputs: Tensor, y: Tensor) -> Tensor:
    """[clients]: the mean over the batch."""
    outputs = ops.cast(outputs, "float32")
    if net.loss == "mse":
        return ops.mean(ops.square(outputs - y), axis=(1, 2))
    chosen = ops.one_hot(ops.cast(y, "int32"), net.outputs, dtype="float32")
    return -ops.mean(ops.sum(chosen * ops.log_softmax(outputs), axis=-1), axis=1)


def _apply(net: Network, precision: str, arrays: list[Tensor], x: Tensor) -> Tensor:
    if precision == "mixed":
        arrays, x = [ops.cast(array, "bfloat16") for array in arrays], ops.cast(x, "bfloat16")
    return net.apply(arrays, x)


@lru_cache
def _forward(net: Network, precision: str) -> Callable[..., Tensor]:
    def forward(vectors: Tensor, x: Tensor) -> Tensor:
        outputs = _apply(net, precision, net.split(vectors), ops.reshape(x, (*x.shape[:2], *net.input_shape)))
        return ops.cast(outputs, "float32")

    return _compile(forward)


@lru_cache
def _loop(net: Network, precision: str, adam: bool, is_proximal: bool, keep: int) -> Callable[..., Any]:
    """(starts [clients, n_params], x [clients, samples, size], y, order [steps, clients * batch], rates [steps,
    arrays], mu, squares, steps before) -> (learned, losses [clients, steps], parameters before the last `keep` steps,
    squares [clients, n_params])."""

    def run(
        starts: Tensor, x: Tensor, y: Tensor, order: Tensor, rates: Tensor, mu: Tensor, squares: Tensor, taken: Tensor
    ) -> Any:
        clients, samples = x.shape[:2]
        steps, batch = order.shape[0], order.shape[1] // clients
        x = ops.reshape(x, (clients * samples, -1))
        y = ops.reshape(y, (clients * samples, *y.shape[2:]))
        origin = net.split(starts)
        square = net.split(ops.broadcast_to(squares[None], (clients, net.n_params))) if adam else []

        def step(s: Tensor, state: Any) -> Any:
            arrays, square, losses = state
            rows = order[s]
            bx = ops.reshape(ops.take(x, rows, axis=0), (clients, batch, *net.input_shape))
            by = ops.reshape(ops.take(y, rows, axis=0), (clients, batch, *y.shape[1:]))
            loss, gradients = _gradients(lambda at: _losses(net, _apply(net, precision, at, bx), by), arrays)
            if is_proximal:
                gradients = [g + mu * (w - o) for g, w, o in zip(gradients, arrays, origin, strict=True)]
            scale = 1.0
            if adam:
                square = [ADAM_DECAY * v + (1 - ADAM_DECAY) * g * g for v, g in zip(square, gradients, strict=True)]
                scale = ops.sqrt(1 - ops.power(ADAM_DECAY, ops.cast(taken + s + 1, "float32")))
                gradients = [g / (ops.sqrt(v) + ADAM_EPSILON) for g, v in zip(gradients, square, strict=True)]
            arrays = [w - scale * rates[s, i] * g for i, (w, g) in enumerate(zip(arrays, gradients, strict=True))]
            return arrays, square, ops.slice_update(losses, (s, 0), loss[None])

        state = (origin, square, ops.zeros((steps, clients), "float32"))
        state = ops.fori_loop(0, steps - keep, step, state)
        before = _join(state[0]) if keep else starts[:, :0]
        if keep:
            state = ops.fori_loop(steps - keep, steps, step, state)
        return _join(state[0]), ops.transpose(state[2]), before, _join(state[1]) if adam else starts[:, :0]

    return _compile(run)


def _join(arrays: list[Tensor]) -> Tensor:
    return ops.concatenate([ops.reshape(array, (array.shape[0], -1)) for array in arrays], axis=1)


# Few-shot evaluation


def evaluate(
    backend: Backend,
    draw: Draw,
    initialization: Vector,
    phases: Sequence[Phase],
    *,
    shots: int,
    tasks: int = 1000,
    queries: int = 15,
    seed: int = 0,
    split: Split = "held_out",
    batch: int = 1,
    moments: Moments | None = None,
    chunk: int = 250,
) -> NDArray[np.float64]:
    """Scores [tasks] of a start that adapts to each task through the phases: accuracies, or mean squared errors.

    The tasks, and the order in which a phase goes through a task's samples again and again, are those of
    server.evaluate.few_shot with this seed. queries: a class (of a regression: in all). chunk: tasks at once, which
    bounds the memory.
    """
    steps = sum(phase.steps for phase in phases)
    scores: list[NDArray[np.float64]] = []
    for first in range(0, tasks, chunk):
        numbers = range(first, min(first + chunk, tasks))
        seeds = [seeds_of(seed, e) for e in numbers]
        some = draw(split, [task for task, _ in seeds], shots, queries)
        samples = some.support_x.shape[1]
        orders = (itertools.islice(endless(samples, np.random.default_rng(order)), steps * batch) for _, order in seeds)
        order = np.array([list(order) for order in orders], np.int64)
        learned = backend.adapt(
            initialization, some.support_x, some.support_y, phases, batch=batch,
            order=order.reshape(len(seeds), steps, batch), moments=moments,
        )  # fmt: skip
        outputs = backend.predict(learned.parameters, some.query_x)
        if backend.network.loss == "mse":
            errors = np.square(outputs - some.query_y.reshape(outputs.shape), dtype=np.float64)
            scores.append(errors.mean((1, 2)))
        else:
            scores.append((outputs.argmax(-1) == some.query_y).mean(1))
    return np.concatenate(scores)


# Rounds


@dataclass(frozen=True)
class ClientSource:
    """Where a round's samples come from.

    clients: how many there are to choose from. samples: (clients, seeds, count) -> x [clients, n, ...] and y, what each
    of these clients has in a round with the seed: at least `count` in the order in which they arrive, or, if it keeps
    its samples, all that it has; then its steps go through them again and again in random order.
    """

    clients: int
    samples: Callable[[Sequence[int], Sequence[int], int], tuple[Floats, Targets]]
    keeps: bool


def server_tasks(task: Task, shots: int = 10) -> ClientSource:
    """The server's own tasks: every client is a training task that nobody has had, with so many samples a class."""

    def samples(_: Sequence[int], seeds: Sequence[int], count: int) -> tuple[Floats, Targets]:
        some = task.draw("training", seeds, shots, 1)
        return some.support_x, some.support_y

    return ClientSource(2**31, samples, keeps=True)


def simulated_fleet(task: Task, size: int) -> ClientSource:
    """A simulated fleet: what its devices hold, in the order in which their streams give it, to the bit."""

    def samples(clients: Sequence[int], seeds: Sequence[int], count: int) -> tuple[Floats, Targets]:
        own = []
        for client, seed in zip(clients, seeds, strict=True):
            stream = DatasetStream(task.client(client, size))
            stream.open(seed)
            own.append([stream.next(query=False) for _ in range(count)])
        return np.stack([[x for x, _ in some] for some in own]), np.array([[y for _, y in some] for some in own])

    return ClientSource(size, samples, keeps=False)


@dataclass(frozen=True)
class Settings:
    """A method: what a round asks of its clients, and what it makes of their answers.

    phases: of a client in a round; adapts: of a new one, to be scored; both one step a batch. clients: a round. alpha:
    the server's rate, which falls along a half cosine, or a line, to alpha_end (None: it stays). update: what clients
    send (layers that it leaves out keep their first values; with `since`, the changes after that phase, as first-order
    MAML does). proximal: FedProx's mu. adam: on the clients.
    """

    name: str
    phases: tuple[Phase, ...]
    adapts: tuple[Phase, ...]
    clients: int = 5
    batch: int = 1
    alpha: float = 1.0
    alpha_end: float | None = None
    anneal: Literal["cosine", "linear"] = "cosine"
    update: UpdateFormat = ALL
    proximal: float = 0.0
    adam: bool = False

    def rate(self, number: int, rounds: int) -> float:
        """The server's rate in this round, which counts from 1."""
        if self.alpha_end is None:
            return self.alpha
        progress = min(max((number - 1) / rounds, 0.0), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.anneal == "cosine" else 1 - progress
        return self.alpha_end + (self.alpha - self.alpha_end) * left

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def kept(self) -> int:
        """So many of the last steps are what a client's update speaks of; 0: all."""
        return sum(phase.steps for phase in self.phases[self.update.since :]) if self.update.since else 0


METHODS = (
    "tinymetafed",
    "tinyreptile",
    "reptile",
    "fomaml",
    "fedavg",
    "fedprox",
    "fedavg-finetuned",
    "tinyol",
    "scratch",
)


def settings(name: str, task: Task, *, clients: int = 5) -> Settings:
    """A method of METHODS with the task's recipe: what `tinyfleet run` does with the strategy of that name.
    `dataclasses.replace` changes what is to be another.

    fedavg and fedprox are scored as they are, fedavg-finetuned after fine-tuning. tinyol: what FedAvg learned, whose
    head alone a device trains. scratch: nothing is learned before a device adapts. Raises UserError for another name.
    """
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'; choose one of {', '.join(METHODS)}")
    if name in META_STRATEGIES:
        ours = strategy(name, task, rounds=1, clients=clients)
        phases = tuple(ours.phases)
        adapts = (Phase(ALL_LAYERS, task.meta.steps, task.meta.rate),) if ours.update.since else phases
        end = ours.alpha_end if isinstance(ours, TinyMetaFed) else None
        return Settings(name, phases, adapts, ours.clients, alpha=ours.alpha, alpha_end=end, update=ours.update)
    everything = (Phase(ALL_LAYERS, task.fedavg.steps, task.fedavg.rate),)
    only_head = (replace(everything[0], layers=task.program.head),)
    adapts = {"fedavg": (), "fedprox": (), "tinyol": only_head}.get(name, everything)
    phases = () if name == "scratch" else everything
    return Settings(name, phases, adapts, clients, proximal=0.1 if name == "fedprox" else 0.0)


def initial_parameters(program: Program, how: Settings, seed: int = 0) -> Vector:
    """Random from the seed, but 0 in layers that stay on the devices (see server.run.initial_parameters)."""
    return random_initialization(program, how.update.shared, seed)


@dataclass(frozen=True)
class Round:
    """loss: mean over clients and steps. diverged: clients that were left out. Bytes: of payloads, as MqttGrid counts
    them where nothing is lost and every client scores itself on fewer than 24 queries."""

    number: int
    clients: int
    diverged: int
    loss: float
    alpha: float
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True)
class SimulationResult:
    """What a run began with and what it learned, its rounds, and Adam's moments if it had any."""

    initialization: Vector
    parameters: Vector
    rounds: Sequence[Round]
    moments: Moments | None = None


def simulate(
    backend: Backend,
    source: ClientSource,
    how: Settings,
    initialization: Vector,
    *,
    rounds: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 100,
    chunk: int = 256,
    on_round: Callable[[SimulationResult], None] | None = None,
) -> SimulationResult:
    """Whole rounds: clients are drawn, learn, send their update; the start moves.

    Clients and their seeds are those that server.strategies draws with this seed of nodes 0 to source.clients - 1.
    checkpoint: a file that holds the state every so many rounds; where it exists, the run goes on from it, to the
    same end. chunk: clients at once, which bounds the memory whatever the round's size. Raises UserError if all clients
    of a round diverge, or the checkpoint is of another run.
    """
    if 0 < how.steps < 2 and how.name in ("reptile", "tinyreptile", "tinymetafed"):
        raise UserError("meta-learning takes at least 2 steps on each client (1 is joint training); raise steps")
    identity = f"{astuple(how)} {seed} {rounds} {source.clients} {hashlib.sha256(initialization.tobytes()).hexdigest()}"
    outcome = SimulationResult(
        initialization, initialization, [], Moments(np.zeros_like(initialization)) if how.adam else None
    )
    if checkpoint is not None and checkpoint.exists():
        outcome = _resume(checkpoint, identity, outcome)
    if not how.steps:
        return outcome
    for number in range(len(outcome.rounds) + 1, rounds + 1):
        began = time.perf_counter()
        parameters, this, moments = _round(backend, source, how, outcome, number, rounds, seed, chunk)
        this = replace(this, seconds=time.perf_counter() - began)
        outcome = SimulationResult(initialization, parameters, [*outcome.rounds, this], moments)
        if checkpoint is not None and (number % every == 0 or number == rounds):
            _save(checkpoint, identity, outcome)
        if on_round is not None:
            on_round(outcome)
    return outcome


def _round(
    backend: Backend,
    source: ClientSource,
    how: Settings,
    at: SimulationResult,
    number: int,
    rounds: int,
    seed: int,
    chunk: int,
) -> tuple[Vector, Round, Moments | None]:
    net, initialization, moments = backend.network, at.parameters, at.moments
    random = np.random.default_rng([seed, number])
    chosen = draw_nodes(source.clients, how.clients, random)
    seeds = [task_seed(seed, number, node) for node in chosen]
    change_sum, losses, squares = np.zeros(net.n_params), list[Floats](), list[Vector]()
    up, good = 0, 0
    arena = backend.model.arena_bytes if isinstance(backend.model, Program) else 4 * net.n_params
    metrics = Metrics(how.steps, 0.0, 0, 0, 0.0, arena)
    for first in range(0, len(chosen), chunk):
        part = slice(first, first + chunk)
        x, y = source.samples(chosen[part], seeds[part], how.steps * how.batch)
        order = None
        if source.keeps:
            passes = np.tile(np.arange(x.shape[1]), (len(x), -(-how.steps * how.batch // x.shape[1]), 1))
            rows = random.permuted(passes, axis=2).reshape(len(x), -1)  # one client after the other, whatever the chunk
            order = rows[:, : how.steps * how.batch].reshape(len(x), how.steps, how.batch)
        learned = backend.adapt(
            initialization, x, y, how.phases, batch=how.batch, order=order, proximal=how.proximal, moments=moments,
            keep=how.kept,
        )  # fmt: skip
        answer = (
            learned.parameters if learned.before is None else initialization + (learned.parameters - learned.before)
        )
        finite = np.isfinite(answer).all(1)
        received, sizes = encoded(initialization, answer[finite], how.update, net.chosen(how.update.shared), metrics)
        for vector in received:  # one after the other, as the strategies add them
            change_sum += vector.astype(np.float64) - initialization
        good += len(received)
        up += int(sizes.sum()) + (len(answer) - len(received)) * len(encode(Failure(ID, ErrorCode.DIVERGED)))
        losses.append(learned.losses[finite].mean(1))
        if learned.moments is not None:
            squares.append(learned.moments.squares * len(x))
            moments_steps = learned.moments.steps
    if not good:
        raise UserError(f"all clients diverged in round {number}; lower the rate")
    alpha = how.rate(number, rounds)
    parameters = np.asarray(initialization + alpha * (change_sum / good), np.float32)
    if moments is not None:
        moments = Moments(np.asarray(sum(squares) / np.float32(len(chosen)), np.float32), moments_steps)
    down = _asked_bytes(initialization, how, number, len(chosen))
    loss = float(np.concatenate(losses).mean(dtype=np.float64))
    return parameters, Round(number, len(chosen), len(chosen) - good, loss, alpha, up, down, 0.0), moments


# Updates as they travel


def encoded(
    initialization: Vector, learned: Floats, how: UpdateFormat, shared: NDArray[np.bool_], metrics: Metrics
) -> tuple[Floats, NDArray[np.int64]]:
    """What the server makes of clients' updates [clients, n_params], and the bytes [clients] of each one's payloads.

    The same choice and the same numbers as mote_update.c's, all clients at once. metrics:
    what goes with every update; of it only the lengths of its numbers matter.
    """
    if how.density >= 1:
        length = _reply_bytes([*dense_parts(initialization, shared, how.half, ROOM)], metrics)
        return np.where(shared, _rounded(learned, how.half), initialization), np.full(len(learned), length)
    changes = learned - initialization
    magnitude = np.where(shared, np.abs(changes), np.float32(0))
    k = max(1, int(np.ceil(np.float32(how.density) * np.float32(shared.sum()))))
    least = np.partition(magnitude, -k, axis=1)[:, -k, None]
    above, equal = magnitude > least, magnitude == least
    room = k - above.sum(1, keepdims=True)
    chosen = (above | (equal & (np.cumsum(equal, 1) <= room))) & (magnitude > 0)  # among equals the first
    client, index = np.nonzero(chosen)
    follows = np.diff(client, prepend=-1) == 0
    between = varint_sizes(index - np.where(follows, np.roll(index, 1), -1) - 1)
    gaps = np.bincount(client, between, len(learned)).astype(np.int64)
    values = chosen.sum(1) * (2 if how.half else 4)
    empty = Sparse(np.zeros(0, np.uint32), np.zeros(0, np.float32), how.half)
    bytes_ = _reply_bytes([empty], metrics) + gaps + _head(gaps) + values + _head(values)
    for i in np.flatnonzero(gaps + values > ROOM):  # too long for one message
        indices = np.flatnonzero(chosen[i]).astype(np.uint32)
        bytes_[i] = _reply_bytes([*sparse_parts(indices, changes[i], how.half, ROOM)], metrics)
    return np.where(chosen, initialization + _rounded(changes, how.half), initialization), bytes_


def _rounded(values: Floats, half: bool) -> Floats:
    return values.astype(np.float16).astype(np.float32) if half else values


def _reply_bytes(updates: Sequence[Dense | Sparse], metrics: Metrics) -> int:
    """Of a reply's messages."""
    parts = enumerate(updates)
    return sum(len(encode(Success(ID, i, len(updates), None if i else metrics, update))) for i, update in parts)


def _head(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of a CBOR byte string of each size, beside its own and the first."""
    return (sizes >= 24).astype(np.int64) + (sizes >= 1 << 8) + 2 * (sizes >= 1 << 16)


def _asked_bytes(initialization: Vector, how: Settings, number: int, clients: int) -> int:
    """The weights once for all, and to each client its order."""
    phases = tuple(replace(phase, proximal_mu=how.proximal) for phase in how.phases)
    order = len(encode(TrainTask(ID, "train", ID, number, bytes(8), ID, phases, 0, how.update)))
    return sum(map(len, chunks(initialization.astype("<f4").tobytes()))) + clients * order


# Checkpoints

_COLUMNS = tuple(Round.__dataclass_fields__)


def _save(path: Path, identity: str, at: SimulationResult) -> None:
    moments = at.moments or Moments(np.zeros(0, np.float32))
    table = np.array([astuple(this) for this in at.rounds], np.float64).reshape(-1, len(_COLUMNS))
    new = path.with_name(path.name + ".new.npz")
    np.savez(
        new, identity=identity, parameters=at.parameters, rounds=table, squares=moments.squares, steps=moments.steps
    )
    new.replace(path)


def _resume(path: Path, identity: str, begin: SimulationResult) -> SimulationResult:
    try:
        with np.load(path) as saved:
            found = {name: saved[name] for name in ("identity", "parameters", "rounds", "squares", "steps")}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is no checkpoint ({error}); remove it, or choose another file") from error
    if str(found["identity"]) != identity:
        raise UserError(f"{path} is of a run with other settings; remove it, or choose another file")
    kinds: list[Callable[[float], Any]] = [int, int, int, float, float, int, int, float]
    rounds = [Round(*(kind(v) for kind, v in zip(kinds, row, strict=True))) for row in found["rounds"].tolist()]
    moments = Moments(found["squares"], int(found["steps"])) if begin.moments is not None else None
    return SimulationResult(begin.initialization, found["parameters"], rounds, moments)
