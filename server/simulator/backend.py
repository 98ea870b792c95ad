"""Adaptation of many clients of one model at once, in one compiled loop or by the C engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import keras  # type: ignore[import-untyped]
import numpy as np
from keras import ops
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.learner import MoteLearner, learn_many
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.commands import Phase
from tinyfleet.server.simulator.keras_backend import Tensor, compile_function, devices, gradients
from tinyfleet.server.simulator.networks import Network, network

Vector = NDArray[np.float32]
Floats = NDArray[np.float32]
Targets = NDArray[Any]

ADAM_DECAY, ADAM_EPSILON = 0.999, 1e-8  # beta2 of Kingma and Ba, 2015; beta1 is 0 here
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Moments:
    """The state of Adam without its first moment, which lasts from round to round.

    In supervised-reptile, which visits one task after the other, every task continues from the last; here all tasks of
    a round continue from the mean over the tasks of the last round.

    Parameters
    ----------
    squares
        Mean squares of the gradients, [n_params].
    steps
        Steps taken so far.
    """

    squares: Vector
    steps: int = 0


@dataclass(frozen=True)
class AdaptResult:
    """What clients have learned.

    Parameters
    ----------
    parameters
        [clients, n_params].
    losses
        Each step's loss before the step, [clients, steps].
    before
        The parameters before the last steps, if asked for.
    moments
        Adam's, if it was used.
    """

    parameters: Floats
    losses: Floats
    before: Floats | None = None
    moments: Moments | None = None


class LoopKind(NamedTuple):
    """What the compiled loop is specialised for: Adam, FedProx's term, and how many last steps are kept apart."""

    adam: bool
    proximal: bool
    keep: int


class _Samples(NamedTuple):
    """The clients' samples and the order in which they learn from them, checked against the model."""

    starts: Floats  # [clients, n_params]
    x: Floats  # [clients, samples, features]
    y: Targets  # [clients, samples] or [clients, samples, outputs]
    order: NDArray[Any]  # [clients, steps, batch]

    @classmethod
    def check(
        cls, net: Network, starts: Floats, x: Floats, y: Targets, order: NDArray[Any] | None, steps: int, batch: int
    ) -> _Samples:
        """Brings all to one shape. Raises UserError for shapes that do not fit."""
        clients, samples = x.shape[:2]
        x = np.asarray(x, np.float32).reshape(clients, samples, -1)
        starts = np.broadcast_to(np.asarray(starts, np.float32), (clients, net.n_params))
        features = math.prod(net.input_shape)
        if x.shape[2] != features or not samples:
            raise UserError(f"the samples have {x.shape[2]} features; this model takes {features}")
        if net.loss == "mse":
            y = np.asarray(y, np.float32).reshape(clients, samples, net.outputs)
        if order is None:
            rows = np.arange(steps * batch).reshape(steps, batch) % samples
            order = np.broadcast_to(rows, (clients, steps, batch))
        if order.shape != (clients, steps, batch):
            raise UserError(f"the order has the shape {order.shape}; it must be {(clients, steps, batch)}")
        return cls(starts, x, y, order)

    def part(self, clients: slice) -> tuple[Floats, Floats, Targets, NDArray[np.int32]]:
        """The loop's arguments for some of the clients; the order as rows of [clients * samples]."""
        order = self.order[clients]
        rows = order + np.arange(len(order))[:, None, None] * self.x.shape[1]
        flat = np.ascontiguousarray(rows.transpose(1, 0, 2), np.int32).reshape(order.shape[1], -1)
        return self.starts[clients], self.x[clients], self.y[clients], flat


class Backend:
    """Adapts and scores many clients of one model at once.

    Parameters
    ----------
    model
        A program, or a network that only the simulator has.
    precision
        "mixed" computes in bfloat16 and keeps the parameters in float32.
    exact
        Compute with the C engine, sample by sample, bit-identical to devices: for a program, with batches of 1, and
        without FedProx and Adam.

    Raises
    ------
    UserError
        If `exact` is asked of a network that is not a program.
    """

    def __init__(
        self, model: Program | Network, *, precision: Literal["float32", "mixed"] = "float32", exact: bool = False
    ) -> None:
        if exact and not isinstance(model, Program):
            raise UserError("exact training takes a program for the engine; see tinyfleet.edge.model.layers.build")
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

        A combination of shapes that is new is compiled first.

        Parameters
        ----------
        starts
            Parameters that the clients begin with: [n_params] for all, or [clients, n_params].
        x
            Samples, [clients, samples, ...].
        y
            Classes [clients, samples], or targets [clients, samples, outputs].
        phases
            Steps at one rate with some layers training, in sequence; each step takes a batch.
        batch
            Samples of one step.
        order
            Which samples each step takes, [clients, steps, batch]. Default: one after the other, and again from the
            first.
        proximal
            FedProx's mu (Li et al. 2020).
        moments
            Use Adam, from this state.
        keep
            Also return the parameters before this many of the last steps.

        Returns
        -------
        AdaptResult

        Raises
        ------
        UserError
            For shapes that do not fit.
        """
        steps = sum(phase.steps for phase in phases)
        samples = _Samples.check(self.network, starts, x, y, order, steps, batch)
        if not steps:
            return AdaptResult(samples.starts.copy(), np.zeros((len(x), 0), np.float32), moments=moments)
        if not self.exact:
            kind = LoopKind(moments is not None, bool(proximal), keep)
            return self._adapt_compiled(samples, phases, kind, proximal, moments)
        if batch > 1 or proximal or moments or keep:
            raise UserError("the engine takes one sample a step, by plain gradient descent; leave out exact")
        return self._adapt_exactly(samples, phases)

    def _adapt_compiled(
        self, samples: _Samples, phases: Sequence[Phase], kind: LoopKind, proximal: float, moments: Moments | None
    ) -> AdaptResult:
        net = self.network
        rates = np.concatenate([np.full(p.steps, p.rate, np.float32) for p in phases])
        masks = np.concatenate([np.tile(net.arrays_in(p.layers), (p.steps, 1)) for p in phases])
        before = moments or Moments(np.zeros(0, np.float32))
        shared = (rates[:, None] * masks, np.float32(proximal), before.squares, np.int32(before.steps))
        loop = _loop(net, self.precision, kind)
        parts = self._on_each_device(
            len(samples.x),
            (samples.x.shape, samples.order.shape, *kind),
            lambda part: loop(*samples.part(part), *shared),
        )
        learned, losses, kept, squares = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        after = Moments(squares.mean(0), before.steps + len(rates)) if kind.adam else None
        return AdaptResult(learned, losses, kept if kind.keep else None, after)

    def predict(self, parameters: Floats, x: Floats) -> Floats:
        """Every client's outputs on samples of its own.

        Parameters
        ----------
        parameters
            [clients, n_params].
        x
            [clients, samples, ...].

        Returns
        -------
        ndarray of float32, shape (clients, samples, outputs)
            Logits under a cross-entropy.
        """
        clients, samples = x.shape[:2]
        if self.exact:
            assert isinstance(self.model, Program)
            return np.stack(
                [
                    [learner.infer(sample) for sample in own]
                    for learner, own in zip(self._set_parameters(parameters), x, strict=True)
                ]
            )
        x = np.asarray(x, np.float32).reshape(clients, samples, -1)
        forward = _forward(self.network, self.precision)
        return np.concatenate(self._on_each_device(clients, x.shape, lambda part: forward(parameters[part], x[part])))

    def _on_each_device(self, clients: int, shape: tuple[object, ...], compute: Callable[[slice], Any]) -> list[Any]:
        """Every device computes a share of the clients; the results are NumPy arrays. Each `shape` is compiled once.

        With enough clients the cores of a processor count as devices: the compiler keeps small matrix products on one
        core.
        """
        places = self.devices
        if places == ["cpu:0"] and clients >= 16 * CORES and clients % CORES == 0:
            places = places * CORES
        edges = np.linspace(0, clients, min(len(places), clients) + 1).astype(int).tolist()

        def on(job: tuple[str, slice]) -> Any:
            with keras.device(job[0]):
                return keras.tree.map_structure(ops.convert_to_numpy, compute(job[1]))

        jobs = list(zip(places, map(slice, edges, edges[1:]), strict=False))
        alone = len(jobs) if len(jobs) == 1 else int((clients, *shape) not in self._compiled)
        self._compiled.add((clients, *shape))  # otherwise several threads would compile the same
        done = [on(job) for job in jobs[:alone]]
        if jobs[alone:]:
            with ThreadPoolExecutor(len(jobs)) as pool:
                done += pool.map(on, jobs[alone:])
        return done

    def _set_parameters(self, parameters: Floats) -> list[MoteLearner]:
        """One learner of the engine for each client, with its parameters."""
        assert isinstance(self.model, Program)
        self._learners += [MoteLearner(self.model) for _ in range(len(parameters) - len(self._learners))]
        for learner, vector in zip(self._learners, parameters, strict=False):
            learner.set_parameters(vector)
        return self._learners[: len(parameters)]

    def _adapt_exactly(self, samples: _Samples, phases: Sequence[Phase]) -> AdaptResult:
        learners, losses, first = self._set_parameters(samples.starts), list[Floats](), 0
        order, clients = samples.order[:, :, 0], np.arange(len(samples.x))[:, None]
        trainable = (1 << max(self.network.layers) + 1) - 1
        for phase in phases:
            for learner in learners:
                learner.mask = phase.layers & trainable
            rows = order[:, first : first + phase.steps]
            if phase.steps:
                losses.append(learn_many(learners, samples.x[clients, rows], samples.y[clients, rows], phase.rate))
            first += phase.steps
        for learner in learners:
            learner.mask = trainable
        return AdaptResult(np.stack([learner.parameters for learner in learners]), np.concatenate(losses, 1))


def _losses(net: Network, outputs: Tensor, y: Tensor) -> Tensor:
    """Mean losses [clients] over the batch."""
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

    return compile_function(forward)


@lru_cache
def _loop(net: Network, precision: str, kind: LoopKind) -> Callable[..., Any]:
    """The compiled loop.

    Takes starts [clients, n_params], x [clients, samples, features], y, order [steps, clients * batch], rates [steps,
    arrays], mu, squares and the number of steps before. Returns the learned parameters, losses [clients, steps], the
    parameters before the last `keep` steps, and squares [clients, n_params].
    """
    adam, is_proximal, keep = kind

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
            loss, slopes = gradients(lambda at: _losses(net, _apply(net, precision, at, bx), by), arrays)
            if is_proximal:
                slopes = [g + mu * (w - o) for g, w, o in zip(slopes, arrays, origin, strict=True)]
            scale = 1.0
            if adam:
                square = [ADAM_DECAY * v + (1 - ADAM_DECAY) * g * g for v, g in zip(square, slopes, strict=True)]
                scale = ops.sqrt(1 - ops.power(ADAM_DECAY, ops.cast(taken + s + 1, "float32")))
                slopes = [g / (ops.sqrt(v) + ADAM_EPSILON) for g, v in zip(slopes, square, strict=True)]
            arrays = [w - scale * rates[s, i] * g for i, (w, g) in enumerate(zip(arrays, slopes, strict=True))]
            return arrays, square, ops.slice_update(losses, (s, 0), loss[None])

        state = (origin, square, ops.zeros((steps, clients), "float32"))
        state = ops.fori_loop(0, steps - keep, step, state)
        before = _join(state[0]) if keep else starts[:, :0]
        if keep:
            state = ops.fori_loop(steps - keep, steps, step, state)
        return _join(state[0]), ops.transpose(state[2]), before, _join(state[1]) if adam else starts[:, :0]

    return compile_function(run)


def _join(arrays: list[Tensor]) -> Tensor:
    return ops.concatenate([ops.reshape(array, (array.shape[0], -1)) for array in arrays], axis=1)
