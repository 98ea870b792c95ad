"""Few-shot evaluation: how well a start adapts to tasks of classes that no device has trained on.

Of every held-out task the learner sees K samples a class, learns from them as a device does (online, one sample a step,
in C), and is scored on samples it has not seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.learner import MoteLearner
from edge.protocol import ALL_LAYERS, Phase
from edge.tasks import Split, Task

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""That `one_pass` tries."""


@dataclass(frozen=True)
class Score:
    """Accuracies [episodes] on the queries of held-out tasks, after learning from `shots` samples a class."""

    shots: int
    accuracies: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def spread(self) -> float:
        """Standard deviation over the tasks; of the mean, it is this over the root of their number."""
        return float(self.accuracies.std(ddof=1)) if len(self.accuracies) > 1 else 0.0


def few_shot(
    task: Task,
    start: NDArray[np.float32],
    phases: Sequence[Phase],
    *,
    shots: int,
    episodes: int = 100,
    queries: int = 15,
    seed: int = 0,
    split: Split = "held_out",
) -> Score:
    """Adapts `start` (the program's parameter vector) to each of `episodes` tasks through the phases, and scores it.

    A phase learns `steps` samples, going through the support set again and again, each time in a new order. queries: a
    class. split: where tasks come from. The same seed gives the same tasks and orders,
    whatever the start and the phases are, so that starts can be compared task by task.
    """
    learner = MoteLearner(task.program)
    every_layer = learner.mask
    accuracies = np.empty(episodes)
    for e in range(episodes):
        episode_seed, order_seed = (int(s) for s in np.random.SeedSequence([seed, e]).generate_state(2))
        episode = task.draw(split, [episode_seed], shots, queries)[0]
        order = _endless(len(episode.support_y), np.random.default_rng(order_seed))
        learner.set_parameters(start)
        for phase in phases:
            learner.mask = phase.layers & every_layer
            for _ in range(phase.steps):
                i = next(order)
                learner.learn(episode.support_x[i], episode.support_y[i], phase.rate)
        learner.mask = every_layer
        answers = [int(np.argmax(learner.infer(x))) for x in episode.query_x]
        accuracies[e] = np.mean(np.asarray(answers) == episode.query_y)
    return Score(shots, accuracies)


def one_pass(
    task: Task, start: NDArray[np.float32], *, shots: int, episodes: int = 200, queries: int = 10, seed: int = 0
) -> Score:
    """Adapts once through the K samples a class, all layers, at the rate that is best for this start on validation
    tasks: what a start is worth to a device that cannot keep its samples."""
    steps = shots * task.ways

    def at(rate: float, count: int, split: Split, seed: int) -> Score:
        phases = [Phase(ALL_LAYERS, steps, rate)]
        return few_shot(task, start, phases, shots=shots, episodes=count, queries=queries, seed=seed, split=split)

    best = max(RATES, key=lambda rate: at(rate, 50, "validation", seed + 1).mean)
    return at(best, episodes, "held_out", seed)


def _endless(count: int, random: np.random.Generator) -> Iterator[int]:
    """0 .. count - 1 in random order, and again in another, without end."""
    while True:
        yield from random.permutation(count).tolist()
