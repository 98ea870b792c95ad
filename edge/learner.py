"""What a device learns with: one interface over the engines."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge._mote import ffi, lib
from edge.errors import UserError
from edge.program import Program

Vector = NDArray[np.float32]


class LearnerError(UserError):
    """A sample or a parameter that a learner cannot take, or training that has diverged."""


class Learner(Protocol):
    """Learns online, one sample a step. Not for two threads at once."""

    def learn(self, x: ArrayLike, y: ArrayLike, rate: float) -> float:
        """One step of gradient descent on one sample: x the features, y the class or the targets. Returns the loss
        before the step. Raises LearnerError, and then has learned nothing."""
        ...

    def infer(self, x: ArrayLike) -> Vector:
        """The model's output for one sample, as a vector: class probabilities, or predictions."""
        ...

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """The loss on one sample; learns nothing."""
        ...

    @property
    def parameters(self) -> Vector:
        """A copy of all that can train, as one vector."""
        ...

    def set_parameters(self, vector: ArrayLike) -> None:
        """Replaces them. Raises LearnerError on another length or on a number that is not finite."""
        ...


# What to do about an error of the engine; see mote.h.
_REASONS = {
    lib.MOTE_ERR_ARGUMENT: "the sample or the rate has a number that is not finite; check the source of the samples",
    lib.MOTE_ERR_FORMAT: "this program does not fit the engine; build it anew with edge.program.build",
    lib.MOTE_ERR_CRC: "this program is damaged; transfer it again",
    lib.MOTE_ERR_ARENA: "the arena is too small for this program",
    lib.MOTE_ERR_FROZEN: "the mask names a layer that this program was not planned to train; build it with that layer "
    "in `trainable`",
    lib.MOTE_ERR_TARGET: "the target is no class of this model, or has a number that is not finite; check the labels",
    lib.MOTE_ERR_DIVERGED: "the loss is not finite: training has diverged; lower the rate and set the parameters anew",
}


def _check(code: int) -> None:
    if code != lib.MOTE_OK:
        raise LearnerError(_REASONS.get(code, f"the engine failed with error {code}"))


class MoteLearner:
    """The C engine: the same bits as on a microcontroller."""

    def __init__(self, program: Program | bytes) -> None:
        """Loads a program; parameters are those that it carries, else 0. Raises ProgramError or LearnerError."""
        self.program = program if isinstance(program, Program) else Program.parse(program)
        self._arena: Vector = np.zeros(self.program.arena_bytes // 4, np.float32)
        self._mote: Any = ffi.new("mote_t *")
        self._data = ffi.from_buffer(self.program.data)
        data, size = self._data, len(self.program.data)
        _check(lib.mote_load(self._mote, data, size, ffi.from_buffer(self._arena), self._arena.nbytes))
        self._inputs: int = lib.mote_inputs(self._mote)
        self._outputs: int = lib.mote_outputs(self._mote)
        self._target: Vector = np.zeros(lib.mote_targets(self._mote), np.float32)
        self._target_pointer = ffi.from_buffer("float[]", self._target)
        self._loss: Any = ffi.new("float *")
        self._output: Any = ffi.new("const float **")

    def _sample(self, x: ArrayLike) -> Any:
        array = np.ascontiguousarray(x, np.float32)
        if array.size != self._inputs:
            raise LearnerError(f"the sample has {array.size} features; this model takes {self._inputs}")
        return ffi.from_buffer("float[]", array)

    def _set_target(self, y: ArrayLike) -> None:
        target = np.asarray(y, np.float32)
        if target.size != self._target.size:
            raise LearnerError(f"the target has {target.size} numbers; this model takes {self._target.size}")
        self._target[:] = target.ravel()

    def _result(self) -> Vector:
        view = np.frombuffer(ffi.buffer(self._output[0], 4 * self._outputs), np.float32)
        return view.copy()

    def learn(self, x: ArrayLike, y: ArrayLike, rate: float) -> float:
        """See Learner. A float32 array goes in without a copy; other threads run meanwhile."""
        self._set_target(y)
        _check(lib.mote_learn(self._mote, self._sample(x), self._target_pointer, rate, self._loss))
        return float(self._loss[0])

    def infer(self, x: ArrayLike) -> Vector:
        """See Learner."""
        _check(lib.mote_infer(self._mote, self._sample(x), self._output))
        return self._result()

    def loss(self, x: ArrayLike, y: ArrayLike) -> float:
        """See Learner."""
        self._set_target(y)
        _check(lib.mote_loss(self._mote, self._sample(x), self._target_pointer, self._loss, self._output))
        return float(self._loss[0])

    @property
    def parameters(self) -> Vector:
        """See Learner. `program.split` names the parts."""
        return self._arena[: self.program.n_params].copy()

    def set_parameters(self, vector: ArrayLike) -> None:
        """See Learner."""
        array = np.asarray(vector, np.float32)
        if array.shape != (self.program.n_params,):
            raise LearnerError(
                f"the parameters have the shape {array.shape}; this model has ({self.program.n_params},)"
            )
        if not np.isfinite(array).all():
            raise LearnerError("the parameters have numbers that are not finite; the old ones stay")
        self._arena[: self.program.n_params] = array

    @property
    def mask(self) -> int:
        """Which layers train now: bit i is the i-th layer with parameters."""
        return int(self._mote.mask)

    @mask.setter
    def mask(self, layers: int) -> None:
        _check(lib.mote_train_mask(self._mote, layers))

    @property
    def ram_bytes(self) -> int:
        """The arena: parameters, values and gradients."""
        return self.program.arena_bytes
