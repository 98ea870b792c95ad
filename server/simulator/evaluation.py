"""Few-shot evaluation of many tasks at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.tasks import Draw, Split
from tinyfleet.edge.wire.commands import Phase
from tinyfleet.server.evaluate import endless, seeds_of
from tinyfleet.server.simulator.backend import Backend, Moments

Vector = NDArray[np.float32]


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
    """Adapts an initialization to each of many tasks, and scores the results.

    The tasks, and the order of each task's samples, are those of `server.evaluate.few_shot` with the same seed.

    Parameters
    ----------
    backend
        Computes the adaptations.
    draw
        Draws episodes: `Task.draw`.
    initialization
        Parameters [n_params] that every task adapts from.
    phases
        How a task is adapted to.
    shots
        Support samples of each class (of a regression: in all).
    tasks
        How many tasks.
    queries
        Query samples of each class (of a regression: in all).
    seed
        Draws the tasks and the orders.
    split
        Where the tasks come from.
    batch
        Samples of one step.
    moments
        Adapt with Adam, from these moments.
    chunk
        Tasks computed at once, which bounds the memory.

    Returns
    -------
    ndarray of float64, shape (tasks,)
        Accuracies, or mean squared errors.
    """
    steps = sum(phase.steps for phase in phases)
    scores: list[NDArray[np.float64]] = []
    for first in range(0, tasks, chunk):
        numbers = range(first, min(first + chunk, tasks))
        seeds = [seeds_of(seed, e) for e in numbers]
        episodes = draw(split, [task for task, _ in seeds], shots, queries)
        samples = episodes.support_x.shape[1]
        orders = (itertools.islice(endless(samples, np.random.default_rng(order)), steps * batch) for _, order in seeds)
        order = np.array([list(order) for order in orders], np.int64)
        learned = backend.adapt(
            initialization, episodes.support_x, episodes.support_y, phases, batch=batch,
            order=order.reshape(len(seeds), steps, batch), moments=moments,
        )  # fmt: skip
        outputs = backend.predict(learned.parameters, episodes.query_x)
        if backend.network.loss == "mse":
            errors = np.square(outputs - episodes.query_y.reshape(outputs.shape), dtype=np.float64)
            scores.append(errors.mean((1, 2)))
        else:
            scores.append((outputs.argmax(-1) == episodes.query_y).mean(1))
    return np.concatenate(scores)
