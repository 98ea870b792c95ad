"""What a device learns with: one interface over the engines."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program

Vector = NDArray[np.float32]


class LearnerError(UserError):
    """A sample or a parameter that a learner cannot take, or training that has diverged.

    `code` is the C engine's error (mote.h), 0 where it has none for it.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Learner(Protocol):
    """Learns online, one sample a step. Not for two threads at once."""

    def learn(self, x: ArrayLike, y: ArrayLike, rate: float) -> float:
        """Take one step of gradient descent on one sample.

        Parameters
        ----------
        x
            Features.
        y
            The class, or the targets.
        rate
            The learning rate.

        Returns
        -------
        float
            The loss before the step.

        Raises
        ------
        LearnerError
            If the learner cannot take the sample, or has diverged; then it has learned nothing.
        """
        ...

    def infer(self, x: ArrayLike) -> Vector:
        """Compute the model's output for one sample: class probabilities or predictions, shape (outputs,)."""
        ...

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """Compute the loss on one sample, without learning."""
        ...

    @property
    def parameters(self) -> Vector:
        """A copy of the parameters, shape (n_params,)."""
        ...

    def set_parameters(self, vector: ArrayLike) -> None:
        """Replace the parameters. Raises LearnerError if the length is wrong or a number is not finite."""
        ...


# What to do about an error of the engine; see mote.h.
_REASONS = {
    lib.MOTE_ERR_ARGUMENT: "the sample has a number that is not finite, or the rate is not from 0 to "
    f"{lib.MOTE_MAX_RATE:,}; check the source of the samples, and the rate",
    lib.MOTE_ERR_FORMAT: "this program does not fit the engine; build it again with edge.model.layers.build",
    lib.MOTE_ERR_CRC: "this program is damaged; transfer it again",
    lib.MOTE_ERR_ARENA: "the arena is too small for this program",
    lib.MOTE_ERR_FROZEN: "this program was not planned for that: to train a layer of the mask, for momentum, for "
    "another class, or to learn at all; build it again with what is wanted",
    lib.MOTE_ERR_TARGET: "the target is no class of this model, or has a number that is not finite; check the labels",
    lib.MOTE_ERR_DIVERGED: "the loss, the output or a gradient is not finite: training has diverged; lower the rate "
    "and set the parameters again",
    lib.MOTE_ERR_UNSUPPORTED: "this build of the engine lacks an operator or a loss of the program; build it with them",
}


def _error(code: int) -> LearnerError:
    return LearnerError(_REASONS.get(code, f"the engine failed with {error_name(code)}"), code)


def _check(code: int) -> None:
    if code != lib.MOTE_OK:
        raise _error(code)


class MoteLearner:
    """The C engine: the same bits as on a microcontroller.

    If the model's input is int8, samples are int8 arrays; if its output is int8, so is the result. If the program
    trains int8 weights, the parameters are the real numbers that these represent, and setting them rounds.

    Every step of `learn` computes ``g = dL/dw``, scaled to a norm of at most `clip_norm` over all that trains;
    ``v = momentum * v + g + weight_decay * w``; ``w -= rate * v``.

    Parameters
    ----------
    program : Program or bytes
        The model; its parameters are those that it carries, otherwise 0.
    momentum : float
        Needs a program with memory for it; 0 for none.
    weight_decay : float
        0 for none.
    clip_norm : float
        0 leaves the gradient as it is.

    Raises
    ------
    ProgramError
        If the bytes are not a program.
    LearnerError
        If the engine cannot load it.

    Examples
    --------
    >>> from tinyfleet.edge.model.layers import Dense, build
    >>> learner = MoteLearner(build([Dense(1)], (2,), "mse"))
    >>> for _ in range(200):
    ...     for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
    ...         loss = learner.learn(x, 2 * x[0] - x[1], rate=0.1)
    >>> learner.infer([2.0, 1.0]).round(2).tolist()
    [3.0]
    """

    def __init__(
        self, program: Program | bytes, *, momentum: float = 0.0, weight_decay: float = 0.0, clip_norm: float = 0.0
    ) -> None:
        self.program = program if isinstance(program, Program) else Program.parse(program)
        data = self.program.data
        self._data = ffi.from_buffer(_aligned(data))
        self._arena = np.zeros(lib.mote_arena_bytes(self._data, len(data)), np.uint8)
        self._mote: Any = ffi.new("mote_t *")
        _check(lib.mote_load(self._mote, self._data, len(data), ffi.from_buffer(self._arena), self._arena.nbytes))
        self._inputs: int = lib.mote_inputs(self._mote)
        self._input_type = _dtype(lib.mote_input_type(self._mote))
        self._output_type = _dtype(lib.mote_output_type(self._mote))
        self._count: int = lib.mote_get_real(self._mote, ffi.NULL)
        count = ffi.new("size_t *")
        block = lib.mote_parameters(self._mote, count)
        self._trains_int8 = block == ffi.NULL
        self._loss: Any = ffi.new("float *")
        self._output: Any = ffi.new("const void **")
        self._sgd: Any = ffi.new("mote_sgd_t *", (0.0, momentum, weight_decay, clip_norm))
        self._plain = not (momentum or weight_decay or clip_norm)
        self._size_outputs()

    def _size_outputs(self) -> None:
        self._outputs: int = lib.mote_outputs(self._mote)
        self._targets: int = lib.mote_targets(self._mote)
        self._target: Vector = np.zeros(self._targets, np.float32)
        self._target_pointer = ffi.from_buffer("float[]", self._target)

    def _sample(self, x: ArrayLike) -> Any:
        array = _input(x, self._input_type)
        if array.size != self._inputs:
            raise LearnerError(f"the sample has {array.size} features; this model takes {self._inputs}")
        return ffi.from_buffer(array)

    def _set_target(self, y: ArrayLike) -> None:
        if self._targets == 1 and isinstance(y, int | float | np.number):
            self._target_pointer[0] = y  # the usual class index, without an array's cost
            return
        target = np.asarray(y, np.float32)
        if target.size != self._targets:
            raise LearnerError(f"the target has {target.size} numbers; this model takes {self._targets}")
        self._target[:] = target.ravel()

    def learn(self, x: ArrayLike, y: ArrayLike, rate: float) -> float:
        """See Learner. An array of the input's type goes in without a copy; other threads run meanwhile."""
        self._set_target(y)
        if self._plain:
            _check(lib.mote_learn(self._mote, self._sample(x), self._target_pointer, rate, self._loss))
        else:
            self._sgd.rate = rate
            _check(lib.mote_learn_with(self._mote, self._sample(x), self._target_pointer, self._sgd, self._loss))
        return float(self._loss[0])

    def infer(self, x: ArrayLike) -> NDArray[Any]:
        """See Learner; int8 if the model's output is."""
        _check(lib.mote_infer(self._mote, self._sample(x), self._output))
        size = self._outputs * self._output_type.itemsize
        return np.frombuffer(ffi.buffer(self._output[0], size), self._output_type).copy()

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """See Learner."""
        self._set_target(y)
        _check(lib.mote_loss(self._mote, self._sample(x), self._target_pointer, self._loss, self._output))
        return float(self._loss[0])

    @property
    def parameters(self) -> Vector:
        """See Learner. `program.split` names the parts."""
        vector: Vector = np.empty(self._count, np.float32)
        lib.mote_get_real(self._mote, ffi.from_buffer("float[]", vector))
        return vector

    def set_parameters(self, vector: ArrayLike) -> None:
        """See Learner. Momentum starts again from 0."""
        array = np.ascontiguousarray(vector, np.float32)
        if np.shape(vector) != (self._count,):
            raise LearnerError(f"the parameters have the shape {np.shape(vector)}; this model has ({self._count},)")
        if not np.isfinite(array).all():
            raise LearnerError("the parameters have numbers that are not finite; the old ones stay")
        lib.mote_set_real(self._mote, ffi.from_buffer("float[]", array))

    @property
    def mask(self) -> int:
        """Which layers train now: bit i is the i-th layer that this program may train."""
        return int(self._mote.mask)

    @mask.setter
    def mask(self, layers: int) -> None:
        _check(lib.mote_train_mask(self._mote, layers, self._mote.biases_only))

    @property
    def biases_only(self) -> int:
        """Of which layers in the mask only the bias trains now, bit by bit as in the mask."""
        return int(self._mote.biases_only)

    @biases_only.setter
    def biases_only(self, layers: int) -> None:
        _check(lib.mote_train_mask(self._mote, self._mote.mask, layers))

    @property
    def outputs(self) -> int:
        """Outputs in use: classes, or predictions."""
        return self._outputs

    def grow(self) -> int:
        """Add a class, with the parameters that the program has for it.

        Returns
        -------
        int
            The number of outputs now.

        Raises
        ------
        LearnerError
            If the program reserves no memory for another class.
        """
        _check(lib.mote_grow(self._mote))
        self._size_outputs()
        return self._outputs

    @property
    def ram_bytes(self) -> int:
        """The arena: parameters, momentum, values and gradients."""
        return self._arena.nbytes


def _dtype(code: int) -> np.dtype[Any]:
    return np.dtype(np.int8 if code == lib.MOTE_INT8 else np.float32)


def _input(x: ArrayLike, dtype: np.dtype[Any]) -> NDArray[Any]:
    """x as the engine reads it. Raises LearnerError if the model takes int8 and x is something else."""
    if dtype == np.int8 and np.asarray(x).dtype != np.int8:
        raise LearnerError(
            f"this model takes int8 and the sample is {np.asarray(x).dtype}; quantise it with the input's scale and "
            "zero point first"
        )
    return np.ascontiguousarray(x, dtype)


def _aligned(data: bytes) -> NDArray[np.uint8]:
    """The bytes where the engine reads them in place: at a multiple of 4."""
    return np.frombuffer(data, np.uint8).copy()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="learn_many")


def learn_many(
    learners: Sequence[MoteLearner], xs: ArrayLike, ys: ArrayLike, rate: float, *, threads: int | None = None
) -> Vector:
    """Train many learners at once: learner i takes a plain step of gradient descent on each sample of xs[i], in order.

    Parameters
    ----------
    learners
        Different ones, whose models have the same input and targets.
    xs
        Samples of the models' input type, shape (learners, steps, ...).
    ys
        Classes, shape (learners, steps), or targets, shape (learners, steps, targets).
    rate
        The learning rate.
    threads
        How many threads share the learners. None: as many as there are cores.

    Returns
    -------
    ndarray of float32, shape (learners, steps)
        The losses before each step: the same numbers as `learn` gives, one learner after the other.

    Raises
    ------
    LearnerError
        If the arguments do not fit each other, or a learner fails; the others have then learned.
    """
    x, y = _check_samples(learners, xs, ys)
    count, steps = x.shape[:2]
    losses: Vector = np.zeros((count, steps), np.float32)
    errors = np.zeros(count, np.int32)
    motes = ffi.new("mote_t *[]", [learner._mote for learner in learners])
    workers = min(threads or os.cpu_count() or 1, count)
    shares = min(4 * workers, count) if workers > 1 else 1  # more than workers: a core may be slower, or busy
    left = iter(range(shares))

    def work() -> None:
        while (i := next(left, None)) is not None:  # next() is atomic
            begin, end = count * i // shares, count * (i + 1) // shares
            lib.mote_learn_many(
                motes + begin, end - begin, steps, ffi.from_buffer(x[begin:end]),
                ffi.from_buffer("float[]", y[begin:end]), rate, ffi.from_buffer("float[]", losses[begin:end]),
                ffi.from_buffer("int[]", errors[begin:end]),
            )  # fmt: skip

    others = [_pool(workers - 1).submit(work) for _ in range(workers - 1)]
    work()
    for other in others:
        if not other.cancel():  # one that has not begun has nothing left to do
            other.result()
    for error in errors:
        _check(int(error))
    return losses


def _check_samples(learners: Sequence[MoteLearner], xs: ArrayLike, ys: ArrayLike) -> tuple[NDArray[Any], Vector]:
    """The samples and targets of `learn_many` as the engine reads them. Raises LearnerError."""
    if not learners:
        raise LearnerError("there is no learner; give at least one")
    kinds = {(learner._inputs, learner._input_type, learner._targets) for learner in learners}
    if len(kinds) > 1:
        raise LearnerError("the learners differ in their inputs or targets; call learn_many for each kind of them")
    if len(set(map(id, learners))) < len(learners):
        raise LearnerError("a learner is in the list twice; each can only take one step at a time")
    ((inputs, input_type, targets),) = kinds
    x, y = _input(xs, input_type), np.ascontiguousarray(ys, np.float32)
    count, steps = len(learners), x.shape[1] if x.ndim > 1 else 0
    if x.size != count * steps * inputs or y.size != count * steps * targets or x.shape[:2] != y.shape[:2]:
        raise LearnerError(
            f"the samples have the shape {x.shape} and the targets {y.shape}; {count} learners take ({count}, steps, "
            f"{inputs}) and ({count}, steps{f', {targets}' if targets > 1 else ''})"
        )
    return x, y


def _interpreter(model: bytes, threads: int) -> Any:
    """A TFLite interpreter: tflite-runtime's, or LiteRT's where that has no wheel or TensorFlow came first.

    A process that has imported tensorflow cannot open an interpreter of tflite-runtime any more (the two clash in
    `vector::reserve`); LiteRT's works there, and so does tflite-runtime's if it was imported before tensorflow.
    """
    clash = "tensorflow" in sys.modules and "tflite_runtime" not in sys.modules
    for name in ("ai_edge_litert",) if clash else ("tflite_runtime", "ai_edge_litert"):
        try:
            module = importlib.import_module(f"{name}.interpreter")
        except ImportError:
            continue
        try:
            return module.Interpreter(model_content=model, num_threads=threads)
        except ValueError as e:
            raise LearnerError(f"this is no .tflite model ({e}); export one with `tinyfleet model export`") from e
    if clash:
        raise LearnerError(
            "TensorFlow is loaded in this process, and tflite-runtime cannot start after it; pip install "
            "ai-edge-litert, or open the learner before importing tensorflow"
        )
    raise LearnerError("running a .tflite model needs tflite-runtime or ai-edge-litert; pip install 'tinyfleet[edge]'")


class LiteRTLearner:
    """A .tflite model with training signatures (firmware_tools/compiler/export.py lists them), in TFLite's interpreter.

    The parameters are the same vector as those of a MoteLearner with the same model, so both can be in one fleet; their
    numbers agree up to rounding, not to the bit.

    Parameters
    ----------
    model
        The content of a .tflite file, or its path.
    threads
        Threads of the interpreter.

    Raises
    ------
    LearnerError
        If the file cannot be read, is not a .tflite model or has no training signatures, or without an interpreter.
    """

    def __init__(self, model: bytes | Path | str, threads: int = 1) -> None:
        if not isinstance(model, bytes):
            path = Path(model)
            try:
                model = path.read_bytes()
            except OSError as e:
                raise LearnerError(f"cannot read the model '{path}': {e.strerror}") from e
        self._interpreter = _interpreter(model, threads)
        missing = {"train", "loss", "infer", "get", "set"} - set(self._interpreter.get_signature_list())
        if missing:
            raise LearnerError(
                f"this .tflite model cannot learn: it lacks the signatures {', '.join(sorted(missing))}; export one "
                "with `tinyfleet model export`"
            )
        runner = self._interpreter.get_signature_runner
        self._train, self._loss, self._infer = runner("train"), runner("loss"), runner("infer")
        self._get, self._set = runner("get"), runner("set")
        details = self._train.get_input_details()
        self._shape: tuple[int, ...] = tuple(details["x"]["shape"])
        self._target_shape: tuple[int, ...] = tuple(details["y"]["shape"])
        self._classes = 0 if details["y"]["dtype"] is np.float32 else self._outputs()
        sizes = self._get()["sizes"]
        self._count = int(sizes.sum())
        self._trained = np.flatnonzero(sizes)  # a mask's bits: the layers that may train
        self._mask = np.asarray(sizes > 0, np.float32)

    def _outputs(self) -> int:
        return int(np.prod(self._infer.get_output_details()["output"]["shape"]))

    def _sample(self, x: ArrayLike) -> Vector:
        array = np.asarray(x, np.float32)
        if array.size != np.prod(self._shape):
            raise LearnerError(f"the sample has {array.size} features; this model takes {np.prod(self._shape)}")
        if not np.isfinite(array).all():
            raise _error(lib.MOTE_ERR_ARGUMENT)
        return array.reshape(self._shape)

    def _target(self, y: ArrayLike) -> NDArray[Any]:
        target = np.asarray(y, np.float32)
        if target.size != np.prod(self._target_shape):
            raise LearnerError(f"the target has {target.size} numbers; this model takes {np.prod(self._target_shape)}")
        if not self._classes:
            if not np.isfinite(target).all():
                raise _error(lib.MOTE_ERR_TARGET)
            return target.reshape(self._target_shape)
        if target.item() not in range(self._classes):
            raise _error(lib.MOTE_ERR_TARGET)
        return np.asarray(target.item(), np.int32)

    def learn(self, x: ArrayLike, y: ArrayLike, rate: float) -> float:
        """See Learner."""
        if not 0 <= rate <= lib.MOTE_MAX_RATE:
            raise _error(lib.MOTE_ERR_ARGUMENT)
        return self._finite(self._train(x=self._sample(x), y=self._target(y), rates=np.float32(rate) * self._mask))

    def infer(self, x: ArrayLike) -> Vector:
        """See Learner."""
        output: Vector = self._infer(x=self._sample(x))["output"].ravel()
        return output

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """See Learner."""
        return self._finite(self._loss(x=self._sample(x), y=self._target(y)))

    @staticmethod
    def _finite(result: Any) -> float:
        if not np.isfinite(result["loss"]):
            raise _error(lib.MOTE_ERR_DIVERGED)
        return float(result["loss"])

    @property
    def parameters(self) -> Vector:
        """See Learner."""
        parameters: Vector = self._get()["parameters"]
        return parameters

    def set_parameters(self, vector: ArrayLike) -> None:
        """See Learner."""
        array = np.asarray(vector, np.float32)
        if array.shape != (self._count,):
            raise LearnerError(f"the parameters have the shape {array.shape}; this model has ({self._count},)")
        if not np.isfinite(array).all():
            raise LearnerError("the parameters have numbers that are not finite; the old ones stay")
        self._set(parameters=array)

    @property
    def mask(self) -> int:
        """Which layers train now: bit i is the i-th layer with parameters."""
        return sum(1 << i for i, layer in enumerate(self._trained) if self._mask[layer])

    @mask.setter
    def mask(self, layers: int) -> None:
        if layers >> len(self._trained):
            raise _error(lib.MOTE_ERR_FROZEN)
        self._mask = np.zeros_like(self._mask)
        self._mask[self._trained] = [layers >> i & 1 for i in range(len(self._trained))]
