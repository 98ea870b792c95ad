"""Few-shot evaluation: how well a start adapts to tasks that no device has trained on.

Of every held-out task the learner sees K samples a class (of a regression: K in all), learns from them as a device does
(online, one sample a step, in C), and is scored on samples it has not seen: by its accuracy, or by its mean squared
error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge._mote import lib
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.tasks import Episode, Split, Task
from tinyfleet.edge.wire.messages import ALL_LAYERS, Phase

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""That `one_pass` tries."""


SHOTS = (1, 5, 10)
"""That `baselines` scores."""

QUERIES = 10
"""A class, of each of its tasks: with most of SHOTS, what a class of Omniglot has."""

Metric = Literal["accuracy", "mean squared error"]


@dataclass(frozen=True)
class Score:
    """What the metric came to on the queries of held-out tasks [episodes], after learning from `shots` samples a class
    (of a regression: in all). Where training diverged it is the worst there is: 0 of accuracy, infinite error."""

    shots: int
    values: NDArray[np.float64]
    metric: Metric = "accuracy"

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def spread(self) -> float:
        """Standard deviation over the tasks; of the mean, it is this over the root of their number."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Of the 95 % interval of the mean: 1.96 standard errors."""
        return float(1.96 * self.spread / len(self.values) ** 0.5)

    @property
    def merit(self) -> float:
        """The mean, so signed that more is better."""
        return self.mean if self.metric == "accuracy" else -self.mean


def few_shot(
    task: Task,
    initialization: NDArray[np.float32],
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
    class. split: where tasks come from. The same seed gives the same tasks and orders, whatever the start and the
    phases are, so that starts can be compared task by task.
    """
    learner = MoteLearner(task.program)
    every_layer = learner.mask
    metric: Metric = "accuracy" if task.program.loss == "softmax_cross_entropy" else "mean squared error"
    values = np.empty(episodes)
    for e in range(episodes):
        episode_seed, order_seed = seeds_of(seed, e)
        episode = task.draw(split, [episode_seed], shots, queries)[0]
        order = endless(len(episode.support_y), np.random.default_rng(order_seed))
        learner.set_parameters(initialization)
        try:
            for phase in phases:
                learner.mask = phase.layers & every_layer
                for _ in range(phase.steps):
                    i = next(order)
                    learner.learn(episode.support_x[i], episode.support_y[i], phase.rate)
        except LearnerError as error:
            if error.code != lib.MOTE_ERR_DIVERGED:
                raise
            values[e] = 0 if metric == "accuracy" else np.inf
            continue
        learner.mask = every_layer
        values[e] = _score(learner, episode)
    return Score(shots, values, metric)


def _score(learner: MoteLearner, episode: Episode) -> float:
    answers = np.array([learner.infer(x) for x in episode.query_x], np.float64)
    if learner.program.loss == "softmax_cross_entropy":
        return float(np.mean(answers.argmax(axis=1) == episode.query_y))
    return float(np.mean((answers - episode.query_y) ** 2))


def one_pass(
    task: Task,
    initialization: NDArray[np.float32],
    *,
    shots: int,
    episodes: int = 200,
    queries: int = QUERIES,
    seed: int = 0,
    layers: int = ALL_LAYERS,
) -> Score:
    """Adapts once through the K samples a class, at the rate that is best for this start on validation tasks: what a
    start is worth to a device that cannot keep its samples. layers: mask of those that learn."""
    steps = shots * (task.ways if task.program.loss == "softmax_cross_entropy" else 1)

    def at(rate: float, count: int, split: Split, seed: int) -> Score:
        phases = [Phase(layers, steps, rate)]
        return few_shot(
            task, initialization, phases, shots=shots, episodes=count, queries=queries, seed=seed, split=split
        )

    best = max(RATES, key=lambda rate: at(rate, 50, "validation", seed + 1).merit)
    return at(best, episodes, "held_out", seed)


def baselines(
    task: Task, learned: NDArray[np.float32], *, shots: Sequence[int] = SHOTS, seed: int = 0
) -> dict[str, list[Score]]:
    """What a learned start is worth (for FedAvg's this is FedAvg with local fine-tuning), beside what needs less of it:
    its body under a head that alone learns (as TinyOL, Ren, Anicic and Runkler 2021), and training from scratch."""
    starts = {
        "learned": (learned, ALL_LAYERS),
        "learned, head alone (TinyOL)": (learned, task.program.head),
        "from scratch": (task.program.initial(seed), ALL_LAYERS),
    }
    return {
        name: [one_pass(task, initialization, shots=k, seed=seed, layers=layers) for k in shots]
        for name, (initialization, layers) in starts.items()
    }


def seeds_of(seed: int, episode: int) -> tuple[int, int]:
    """Of the task, and of the order in which it is learned from."""
    task, order = np.random.SeedSequence([seed, episode]).generate_state(2).tolist()
    return task, order


def endless(count: int, random: np.random.Generator) -> Iterator[int]:
    """0 .. count - 1 in random order, and again in another, without end."""
    while True:
        yield from random.permutation(count).tolist()
