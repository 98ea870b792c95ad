"""Learning online from a stream that changes: detecting it, and going back to the meta-learned initialization.

Every sample is first answered and then learned from (prequential evaluation: Gama, Sebastiao and Rodrigues, "On
evaluating stream learning algorithms", 2013). ADWIN (Bifet and Gavalda, "Learning from Time-Changing Data with Adaptive
Windowing", 2007), in the library river, watches the errors. Where they have risen, the device learns at a higher rate
for some samples; if it is to restart, it first goes back to its meta-learned start.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyfleet.edge._mote import lib
from tinyfleet.edge.device.sources import Sample, Stream
from tinyfleet.edge.model.learner import Learner, LearnerError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Task

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class DriftResponse:
    """delta: how sure ADWIN must be, the bound on a false alarm at each look. steps: samples that adapt to what is new,
    at this rate; restart: from the start, not from what was learned since. Tuned on the digits' validation streams
    (benchmarks/drift.py --tune)."""

    delta: float = 0.02
    steps: int = 80
    rate: float = 0.1
    restart: bool = False


def default_drift_response(task: Task) -> DriftResponse:
    """The response for a task that nobody has tuned it for.

    The rate is twice the task's; for a regression, whose errors have no bound, it is the task's: sine waves diverge at
    twice that. Where each device fits a head of its own, it goes back to the initialization: what the head stood for
    before the change is useless after it.
    """
    rate = task.fedavg.rate * (1 if task.program.loss == "mse" else 2)
    return DriftResponse(rate=rate, restart=task.meta.head_steps > 0)


class SampleResult(NamedTuple):
    """The result of one sample. error: before it was learned from; 0 or 1 where the model tells classes, else the
    squared error. drifted: whether drift was noticed with it."""

    error: float
    drifted: bool


class OnlineLearner:
    """A learner on a stream of its own. Not for two threads at once."""

    def __init__(
        self,
        learner: Learner,
        program: Program,
        start: Vector,
        rate: float,
        drift_response: DriftResponse | None = None,
    ) -> None:
        """start: parameters to begin with, and to go back to. rate: at all other times; 0: none."""
        self._learner = learner
        self._classes = program.loss == "softmax_cross_entropy"
        self._rate = rate
        self._drift_response = drift_response
        self._detector = None if drift_response is None else _adwin(drift_response.delta)
        self._adapting = 0
        self.set_initialization(start)

    def set_initialization(self, start: Vector) -> None:
        """Begin again from these parameters."""
        self._start = np.array(start, np.float32)
        self._learner.set_parameters(self._start)

    @property
    def drift(self) -> float:
        """1 when drift has just been noticed, falling to 0 as the samples come that adapt to it."""
        return self._adapting / self._drift_response.steps if self._drift_response is not None else 0.0

    def learn(self, x: ArrayLike, y: ArrayLike) -> SampleResult:
        """Answers one sample, and learns from it; where that diverges, it begins again from its initialization. Raises
        LearnerError for an invalid sample."""
        error = self._error(x, y)
        drifted = self._detector is not None and math.isfinite(error) and _has_risen(self._detector, error)
        if drifted:
            assert self._drift_response is not None
            if self._drift_response.restart:
                self._learner.set_parameters(self._start)
            self._adapting = self._drift_response.steps
        rate = self._rate
        if self._adapting:
            assert self._drift_response is not None
            rate = self._drift_response.rate
            self._adapting -= not drifted
        if rate:
            try:
                self._learner.learn(x, y, rate)
            except LearnerError as reason:
                if reason.code != lib.MOTE_ERR_DIVERGED:
                    raise
                self._learner.set_parameters(self._start)
        return SampleResult(error, drifted)

    def _error(self, x: ArrayLike, y: ArrayLike) -> float:
        output = self._learner.infer(x)
        if self._classes:
            return float(int(np.argmax(output)) != y)
        return float(np.mean(np.subtract(output, y, dtype=np.float64) ** 2))


def _adwin(delta: float) -> Any:
    from river.drift import ADWIN  # takes a second, and who does not learn online needs none of it

    return ADWIN(delta=delta)  # type: ignore[no-untyped-call]


def _has_risen(detector: Any, error: float) -> bool:
    """ADWIN also notices that errors became fewer: that is learning, not drift."""
    before = detector.estimation
    detector.update(error)
    return bool(detector.drift_detected and detector.estimation > before)


class PacedStream(Stream):
    """A stream of recorded samples, replayed as a sensor would give them: one every `interval` seconds. Those that
    nobody has asked for in time are not made up for later, but for one."""

    def __init__(self, stream: Stream, interval: float) -> None:
        self._stream = stream
        self._interval = interval
        self._due = time.monotonic()

    def open(self, seed: int) -> None:
        """See Stream."""
        self._stream.open(seed)

    def next(self, query: bool) -> Sample | None:
        """See Stream."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = max(self._due + self._interval, now)
        return self._stream.next(query)
