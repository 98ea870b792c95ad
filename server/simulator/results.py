"""What a simulated run reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tinyfleet.server.simulator.backend import Moments

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    """One round.

    Parameters
    ----------
    number
        From 1.
    clients
        How many took part.
    diverged
        How many of them were left out because their parameters were not finite.
    loss
        Mean over clients and steps.
    alpha
        The server's rate.
    bytes_up, bytes_down
        Payload bytes, as MqttGrid counts them where nothing is lost and every client scores itself on fewer than 24
        query samples.
    seconds
        Time that it took.
    """

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
    """The state of a run: the parameters that it began with and those that it has learned, its rounds, and Adam's
    moments if the method uses Adam."""

    initialization: Vector
    parameters: Vector
    rounds: Sequence[Round]
    moments: Moments | None = None
