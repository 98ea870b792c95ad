"""Learning online from a stream that changes: detecting it, and going back to the meta-learned initialization.

Every sample is first answered and then learned from (prequential evaluation: Gama, Sebastiao and Rodrigues, "On
evaluating stream learning algorithms", 2013). ADWIN (Bifet and Gavalda, "Learning from Time-Changing Data with Adaptive
Windowing", 2007), in the library river, watches the errors. Where they have risen, the device learns at a higher rate
for some samples; if it is to restart, it first goes back to its meta-learned initialization.
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
    """What an online learner does when it detects drift.

    The defaults were tuned on the digits' validation streams (benchmarks/drift.py --tune).

    Parameters
    ----------
    delta
        ADWIN's bound on the probability of a false alarm, each time it looks.
    steps
        Samples that adapt to the change.
    rate
        The learning rate of these samples.
    restart
        Whether to adapt from the initialization, not from what was learned since.
    """

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
    """The error on one sample, and whether it revealed drift.

    Parameters
    ----------
    error
        Before the sample was learned from: 0 or 1 for a classifier, otherwise the mean squared error.
    drifted
        Whether drift was detected with this sample.
    """

    error: float
    drifted: bool


class OnlineLearner:
    """Learns from a stream, one sample after the other, and detects drift. Not for two threads at once.

    Parameters
    ----------
    learner
        The engine.
    program
        The learner's model.
    initialization
        Parameters to begin with, and to go back to, shape (n_params,).
    rate
        The learning rate while nothing drifts; 0 learns only from drift.
    drift_response
        What to do about drift. None detects none.
    """

    def __init__(
        self,
        learner: Learner,
        program: Program,
        initialization: Vector,
        rate: float,
        drift_response: DriftResponse | None = None,
    ) -> None:
        self._learner = learner
        self._classes = program.loss == "softmax_cross_entropy"
        self._rate = rate
        self._drift_response = drift_response
        self._detector = None if drift_response is None else _adwin(drift_response.delta)
        self._adapting = 0
        self.set_initialization(initialization)

    def set_initialization(self, initialization: Vector) -> None:
        """Begin again from these parameters, shape (n_params,)."""
        self._initialization = np.array(initialization, np.float32)
        self._learner.set_parameters(self._initialization)

    @property
    def drift(self) -> float:
        """1 when drift has just been detected, falling to 0 over the samples that adapt to it."""
        return self._adapting / self._drift_response.steps if self._drift_response is not None else 0.0

    def learn(self, x: ArrayLike, y: ArrayLike) -> SampleResult:
        """Predict one sample, then learn from it. If learning diverges, begin again from the initialization.

        Parameters
        ----------
        x
            Features.
        y
            The class, or the targets.

        Returns
        -------
        SampleResult

        Raises
        ------
        LearnerError
            If the model cannot take this sample.
        """
        error = self._error(x, y)
        drifted = self._detector is not None and math.isfinite(error) and _has_risen(self._detector, error)
        if drifted:
            assert self._drift_response is not None
            if self._drift_response.restart:
                self._learner.set_parameters(self._initialization)
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
                self._learner.set_parameters(self._initialization)
        return SampleResult(error, drifted)

    def _error(self, x: ArrayLike, y: ArrayLike) -> float:
        output = self._learner.infer(x)
        if self._classes:
            return float(int(np.argmax(output)) != y)
        return float(np.mean(np.subtract(output, y, dtype=np.float64) ** 2))


def _adwin(delta: float) -> Any:
    from river.drift import ADWIN  # takes a second, and is needed only to learn online

    return ADWIN(delta=delta)  # type: ignore[no-untyped-call]


def _has_risen(detector: Any, error: float) -> bool:
    """ADWIN also notices that errors became fewer: that is learning, not drift."""
    before = detector.estimation
    detector.update(error)
    return bool(detector.drift_detected and detector.estimation > before)


class PacedStream(Stream):
    """Recorded samples, replayed at the pace of a sensor.

    At most one sample waits: a reader that is late misses the others.

    Parameters
    ----------
    stream
        The recording.
    interval
        Seconds between two samples.
    """

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
