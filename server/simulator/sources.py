"""Where the samples of a simulated round come from: the server's own tasks, or a simulated fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.tasks import Task

Floats = NDArray[np.float32]
Targets = NDArray[Any]


@dataclass(frozen=True)
class ClientSource:
    """Where a round's samples come from.

    Parameters
    ----------
    clients
        How many clients there are to draw from.
    samples
        Called with clients, their seeds and a count; returns x [clients, n, ...] and y [clients, n, ...].
    stores_samples
        False: the samples arrive in this order, and n is at least the count. True: these are all that a client has,
        and its steps go through them again and again in random order.
    """

    clients: int
    samples: Callable[[Sequence[int], Sequence[int], int], tuple[Floats, Targets]]
    stores_samples: bool


def server_tasks(task: Task, shots: int = 10) -> ClientSource:
    """The server's own tasks: every client is a new training task, with `shots` samples of each class."""

    def samples(_: Sequence[int], seeds: Sequence[int], count: int) -> tuple[Floats, Targets]:
        episodes = task.draw("training", seeds, shots, 1)
        return episodes.support_x, episodes.support_y

    return ClientSource(2**31, samples, stores_samples=True)


def simulated_fleet(task: Task, size: int) -> ClientSource:
    """A simulated fleet of `size` devices: the samples that its devices hold, in the order of their streams."""

    def samples(clients: Sequence[int], seeds: Sequence[int], count: int) -> tuple[Floats, Targets]:
        drawn = []
        for client, seed in zip(clients, seeds, strict=True):
            stream = DatasetStream(task.client(client, size))
            stream.open(seed)
            drawn.append([stream.next(query=False) for _ in range(count)])
        return np.stack([[x for x, _ in own] for own in drawn]), np.array([[y for _, y in own] for own in drawn])

    return ClientSource(size, samples, stores_samples=False)
