"""A node that also learns online, by itself, from a stream that changes: when it has nothing else to do."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.device.drift import DriftResponse, OnlineLearner
from tinyfleet.edge.device.node import MaskedLearner, Node
from tinyfleet.edge.device.sources import Stream
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program

log = logging.getLogger(__name__)


class OnlineLearning(NamedTuple):
    """How a device learns by itself.

    Parameters
    ----------
    stream
        Where its samples come from.
    rate
        The learning rate.
    drift_response
        What it does about drift; None: it does not look for any.
    """

    stream: Stream
    rate: float
    drift_response: DriftResponse | None = DriftResponse()


class AgentNode(Node):
    """A node with a learner of its own beside the fleet's, which begins with each round's parameters.

    Drift that it detects goes into the node's status, and its samples into the node's count. Samples that no model can
    take, with numbers that are not finite, of another size or of no class, are skipped and counted.

    Parameters
    ----------
    online
        How it learns by itself.
    learner
        Makes its learner, and the node's: see Node.
    options
        See Node.

    """

    def __init__(
        self,
        fleet: str,
        id: str,
        td: Mapping[str, Any],
        program: Program,
        source: Stream,
        *,
        online: OnlineLearning,
        learner: Callable[[Program], MaskedLearner] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(fleet, id, td, program, source, learner=learner, **options)
        self._online = online
        self._make_learner = MoteLearner if learner is None else learner
        self._reset()

    def receive(self, topic: str, payload: bytes) -> None:
        """See Node."""
        model, rounds = self.model, self.rounds
        super().receive(topic, payload)
        if self.model != model:
            self._reset()
        elif self.rounds != rounds:
            self._learner.set_initialization(self.parameters)
            self._has_parameters = True

    def step(self) -> bool:
        """See Node."""
        return super().step() or self._learn()

    def _reset(self) -> None:
        """Begin again with the program that runs, once a round has brought parameters for it."""
        program = self.program
        stream, rate, drift_response = self._online
        stream.open(0)
        zeros = np.zeros(program.n_params, np.float32)
        self._learner = OnlineLearner(self._make_learner(program), program, zeros, rate, drift_response)
        self._has_parameters = False
        self.set_drift(0.0)

    def _learn(self) -> bool:
        """Learn from one sample. False if there is none, or if there is something to send first."""
        sample = self._online.stream.next(query=False) if self._has_parameters else None
        if sample is None:
            return False
        if not self._is_usable(*sample):
            self.skipped += 1
            if self.skipped.bit_count() == 1:  # at 1, 2, 4, ...: a broken sensor does not fill the log
                log.warning("%s skipped %d samples: not finite, of another size or of no class", self.id, self.skipped)
            return True
        before = self._learner.drift
        error = self._learner.learn(*sample).error
        self._node.counters.samples = min(self._node.counters.samples + 1, 0xFFFFFFFF)
        self.set_drift(self._learner.drift)
        if not self.observe(error):
            self._reset()
            return False
        return (before > 0) == (self._learner.drift > 0)

    def _is_usable(self, x: NDArray[np.float32], y: float | NDArray[np.float32]) -> bool:
        """Whether the model can take this sample: what a sensor gives may be anything."""
        program = self.program
        if np.size(x) != math.prod(program.input_shape) or not np.isfinite(x).all() or not np.isfinite(y).all():
            return False
        if program.loss == "softmax_cross_entropy":
            return np.size(y) == 1 and float(np.ravel(y)[0]) in range(program.classes)
        return np.size(y) == math.prod(program.output_shape)
